"""The optimizer of a language model: AdamW with decoupled weight decay, warm-up and cosine decay."""

import keras

from tfdist.config import OptimizerConfig


def schedule(config: OptimizerConfig, num_steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear from 0 over `warmup_steps` updates, then a cosine down to the final fraction at `num_steps`."""
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if config.warmup_steps else config.learning_rate,
        decay_steps=max(1, num_steps - config.warmup_steps),
        alpha=config.final_learning_rate_fraction,
        warmup_target=config.learning_rate if config.warmup_steps else None,
        warmup_steps=config.warmup_steps,
    )


def adamw(config: OptimizerConfig, num_steps: int, model: keras.Model) -> keras.optimizers.Optimizer:
    """Make it under the strategy's scope; clipping is the trainer's."""
    optimizer = keras.optimizers.AdamW(
        schedule(config, num_steps),
        weight_decay=config.weight_decay,
        beta_1=config.beta_1,
        beta_2=config.beta_2,
        epsilon=config.epsilon,
        use_ema=config.ema_momentum > 0,
        ema_momentum=config.ema_momentum or 0.99,
    )
    optimizer.exclude_from_weight_decay(var_list=without_decay(model))
    return optimizer


def without_decay(model: keras.Model) -> list[keras.Variable]:
    """Norms and biases (vectors) and embedding tables: only the matrices of projections decay."""
    tables = {"embeddings"}
    return [v for v in model.trainable_variables if len(v.shape) < 2 or v.name in tables]
