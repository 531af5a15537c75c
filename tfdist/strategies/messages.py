"""Bytes between the workers, over the collectives that training uses anyway: for what every worker must agree on."""

from collections.abc import Callable

import numpy as np

MAX_MESSAGE_BYTES = 1000
_SLOT_BYTES = MAX_MESSAGE_BYTES + 2
_CHUNK_BYTES = 1 << 22

# array [n] float32 of this worker -> the sum over all workers. Sums of small whole numbers are exact in any order, and
# every device and transport has float32.
Sum = Callable[[np.ndarray], np.ndarray]


def exchange(total: Sum, message: bytes, worker: int, num_workers: int) -> list[bytes]:
    """Everybody's message, in the order of the workers."""
    assert len(message) <= MAX_MESSAGE_BYTES, f"expected at most {MAX_MESSAGE_BYTES} bytes, found {len(message)}"
    slots = np.zeros([num_workers, _SLOT_BYTES], np.uint8)
    framed = len(message).to_bytes(2, "little") + message
    slots[worker, : len(framed)] = np.frombuffer(framed, np.uint8)
    summed = total(slots.astype(np.float32).reshape(-1)).astype(np.uint8).reshape(num_workers, _SLOT_BYTES)
    return [bytes(slot[2 : 2 + int.from_bytes(slot[:2].tobytes(), "little")]) for slot in summed]


def broadcast(total: Sum, data: bytes, worker: int, num_workers: int) -> bytes:
    """Worker 0's data, in chunks of one size (each size of a collective is compiled once)."""
    size = int.from_bytes(exchange(total, len(data).to_bytes(8, "little"), worker, num_workers)[0], "little")
    received = bytearray()
    for start in range(0, size, _CHUNK_BYTES):
        pairs = np.zeros(_CHUNK_BYTES // 2, np.uint16)  # two bytes are one whole number below 2**16
        if worker == 0:
            piece = data[start : start + _CHUNK_BYTES]
            pairs.view(np.uint8)[: len(piece)] = np.frombuffer(piece, np.uint8)
        received += total(pairs.astype(np.float32)).astype(np.uint16).tobytes()
    return bytes(received[:size])
