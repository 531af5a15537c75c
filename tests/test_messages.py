"""Bytes over sums: every worker gets what was sent, whatever it is. The sum is NumPy's, over threads that play workers."""

import threading

import numpy as np
import pytest

from tfdist.strategies import messages


def play(num_workers: int, work):
    """Runs `work(total, worker)` for every worker, with a sum that waits for all. Returns the results in order."""
    barrier, parts, results = threading.Barrier(num_workers), [None] * num_workers, [None] * num_workers

    def run(worker: int) -> None:
        def total(array):
            assert array.dtype == np.float32
            parts[worker] = array
            barrier.wait(10)
            summed = np.sum(parts, axis=0, dtype=np.float32)
            barrier.wait(10)
            return summed

        results[worker] = work(total, worker)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_everybody_gets_everybodys_message(num_workers):
    sent = [bytes([255 - worker]) * (worker * 200) for worker in range(num_workers)]
    got = play(num_workers, lambda total, w: messages.exchange(total, sent[w], w, num_workers))
    assert got == [sent] * num_workers


def test_a_message_that_is_too_long_is_our_mistake():
    with pytest.raises(AssertionError, match="at most 1000 bytes"):
        messages.exchange(lambda a: a, b"x" * 1001, 0, 1)


@pytest.mark.parametrize("size", [0, 1, 3, 4096, (1 << 22) - 1, (1 << 22), (1 << 22) + 5, 3 * (1 << 22) + 1])
def test_everybody_gets_the_chiefs_bytes(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    got = play(3, lambda total, w: messages.broadcast(total, data if w == 0 else b"not looked at", w, 3))
    assert got == [data] * 3
