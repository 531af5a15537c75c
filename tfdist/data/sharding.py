"""Which worker reads what (`data.sharding`). Each policy is a pure function; all but `batch` give something up.

`batch`: the rows of every global batch are divided (`InputContext.rows`): the batches are those of one worker, whatever the
number of workers, also across restarts. What the others divide is the corpus, and each worker has an order of its own:

`file`: whole shard files: a worker opens and reads its own files only.
`hash`: samples by the key of the document that they begin in: a document stays with its worker when others come or go.
`random`: samples by a seeded permutation: as many for each worker.
`replicate`: nothing is divided: every worker reads all samples, the same ones in each step.
"""

import tensorflow as tf
from absl import logging

from tfdist.data.order import Order

_GIVES_UP = {
    "file": "batches depend on the number of workers, and epochs end for each worker by itself, after its own files",
    "hash": "batches depend on the number of workers, and epochs end for each worker by itself; shares are even on average",
    "random": "batches depend on the number of workers",
    "replicate": "every worker reads the same samples: a step sees each of them once per worker",
}


def say_what_is_given_up(policy: str) -> None:
    if policy in _GIVES_UP:
        logging.warning("data.sharding=%s: %s; a run is not equal to one on another number of workers, and one that goes on "
                        "with another number repeats samples and leaves others out", policy, _GIVES_UP[policy])  # fmt: skip


def say_what_the_service_gives_up() -> None:
    logging.warning("data.service=true: the order of samples is given up: no two runs are equal, and one that goes on reads "
                    "some samples again and others not at all")  # fmt: skip


def owner_of_files(number: int, workers: int) -> list[int]:
    """Who reads each of `number` files: in turns, so that nobody has more than one more than another."""
    return [i % workers for i in range(number)]


def owner_by_hash(keys: tf.Tensor, workers: int) -> tf.Tensor:
    """Who reads what belongs to documents with these keys, int64 [n] -> int64 [n]."""
    return keys % workers


def owner_at_random(number: int, workers: int, seed: int) -> tf.Tensor:
    """Who reads each of `number` samples, int64 [number]: shares differ by one at most."""
    return Order(number, seed).sample(tf.range(number, dtype=tf.int64)) % workers
