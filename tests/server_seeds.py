"""The validation loss of a small language model after 150 steps, for five seeds, into a file; one process or a cluster."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tfdist
from tfdist.config import ModelConfig
from tfdist.models.transformer import TransformerLM, next_token_loss

LENGTH, VOCABULARY, BATCH, NUM_STEPS, SEEDS = 16, 17, 8, 150, 5


def texts(seed: int, number: int) -> np.ndarray:
    """A walk that mostly goes on by a step that depends on where it is, and sometimes jumps."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((number, LENGTH + 1), np.int32)
    rows[:, 0] = rng.integers(0, VOCABULARY, number)
    for i in range(LENGTH):
        jump = rng.integers(0, VOCABULARY, number)
        rows[:, i + 1] = np.where(rng.uniform(size=number) < 0.2, jump, (3 * rows[:, i] + 1) % VOCABULARY)
    return rows


def dataset_fn(rows: np.ndarray):
    def dataset(context):
        batches = rows.reshape(-1, BATCH, LENGTH + 1)[:, context.rows(BATCH)]
        return tf.data.Dataset.from_tensor_slices((batches[..., :-1], batches[..., 1:])).skip(context.start_step)

    return dataset


def main(out: str) -> None:
    strategy = tfdist.from_environment()
    losses = []
    for seed in range(SEEDS):
        keras.utils.set_random_seed(seed)
        with strategy.scope():
            model = TransformerLM(
                ModelConfig(vocab_size=VOCABULARY, num_layers=1, num_heads=2, model_dim=16, dropout=0.1), LENGTH
            )
            optimizer = keras.optimizers.AdamW(1e-2)
        trainer = tfdist.Trainer(strategy, model, optimizer, next_token_loss, clip_norm=1.0, seed=seed, writers=[])
        trainer.train(dataset_fn(texts(seed, BATCH * NUM_STEPS)), NUM_STEPS)
        losses.append(trainer.evaluate(dataset_fn(texts(1000, BATCH * 20))).loss)
    Path(out).write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1])
