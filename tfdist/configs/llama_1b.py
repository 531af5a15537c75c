"""The shape of Llama 3.2 1B: 1,235,814,400 parameters. For GPUs with 80 GB.

    tfdist train --config=llama_1b --workdir=runs/llama --config.data.source='files:corpus/**/*.txt'

The vocabulary is Llama's; until there is a BPE tokenizer the text is read as bytes, which use its first 258 entries.
"""

from tfdist.config import Config, DataConfig, EvalConfig, LogConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=128256, num_layers=16, num_heads=32, num_kv_heads=8, model_dim=2048, mlp_dim=8192,
            positions="rotary", rope_theta=500_000.0, norm="rms", activation="swiglu", use_bias=False,
            tie_embeddings=True, recompute=True, dtype="mixed_bfloat16",
        ),
        data=DataConfig(sequence_length=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000, weight_decay=0.1),
        train=TrainConfig(num_steps=100_000, global_batch_size=256, accumulate_steps=32),
        eval=EvalConfig(every_steps=1000, max_steps=50, batch_size=8),
        log=LogConfig(every_steps=10),
    )  # fmt: skip
