"""The model of lm_tiny, trained asynchronously: tfdist launch --workers=3 --ps=2 -- train --config=lm_ps"""

from tfdist.config import Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, StrategyConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(vocab_size=258, num_layers=4, num_heads=4, model_dim=256),
        data=DataConfig(source="stdlib", sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.1),
        train=TrainConfig(num_steps=500, global_batch_size=16),
        strategy=StrategyConfig(kind="parameter_server"),
        eval=EvalConfig(every_steps=250, max_steps=20),
    )
