"""The smallest real config: a one-layer model, seconds on a CPU. Tests give the text with --config.data.source."""

from tfdist.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)  # fmt: skip


def get_config() -> Config:
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, model_dim=16, dropout=0.1),
        data=DataConfig(sequence_length=32, validation_fraction=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(num_steps=30, global_batch_size=8, accumulate_steps=2, steps_per_loop=7, jit_compile="off"),
        checkpoint=CheckpointConfig(every_steps=10),
        eval=EvalConfig(every_steps=15, max_steps=2),
        log=LogConfig(sample_tokens=20),
    )
