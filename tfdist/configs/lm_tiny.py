"""A small byte-level language model of Python source code. It trains on a CPU in minutes.

    tfdist train --config=lm_tiny --workdir=runs/lm_tiny

Text: the source of the standard library of the running Python. Result on 2 CPU cores: 3.5 minutes,
validation loss 1.45 nats per byte (docs/benchmarks.md).
"""

from tfdist.config import Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=258, num_layers=4, num_heads=4, model_dim=128, positions="rotary", norm="rms",
            activation="swiglu", mlp_dim=384, use_bias=False, tie_embeddings=True, dropout=0.0,
        ),
        data=DataConfig(source="stdlib", sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, weight_decay=0.1),
        train=TrainConfig(num_steps=600, global_batch_size=16, steps_per_loop=25, clip_norm=1.0),
        eval=EvalConfig(every_steps=200, max_steps=20),
    )  # fmt: skip
