"""GPT-2 small: exactly 124,439,808 parameters (Radford et al. 2019). For a GPU.

    tfdist train --config=gpt2_124m --workdir=runs/gpt2 --config.data.source='files:corpus/**/*.txt'

The vocabulary is GPT-2's; until there is a BPE tokenizer the text is read as bytes, which use its first 258 entries.
"""

from tfdist.config import Config, DataConfig, EvalConfig, LogConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=50257, num_layers=12, num_heads=12, model_dim=768, positions="learned", norm="layer",
            activation="gelu", use_bias=True, tie_embeddings=True, dtype="mixed_bfloat16",
        ),
        data=DataConfig(sequence_length=1024),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700, weight_decay=0.1),
        train=TrainConfig(num_steps=20_000, global_batch_size=512, accumulate_steps=16),
        eval=EvalConfig(every_steps=1000, max_steps=50, batch_size=32),
        log=LogConfig(every_steps=10),
    )  # fmt: skip
