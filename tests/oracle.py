"""The one-device run is the oracle: the same cells on another strategy must give its losses and variables."""

import math

import numpy as np
from cells import ALONE, CELLS, NOT_IN_PARTS, NOT_ON_SERVERS, ON_TWO_REPLICAS_ONLY, SIXTEEN_BITS, ZERO_GRADIENT
from results import results

PROGRAM = "cells.py"
OWN = ("|traces", "|collectives")  # of a strategy, as is a stock layer's mask
EXACT = ("tokens", "skipped", "who", "scales")  # equal whatever the precision

# in float32 on more than two replicas: what rounds most, and one of each kind of layer
IN_FLOAT32 = (
    "accumulation_dropout_weights_and_a_step_without_any",
    "batch_norm_with_empty_replicas_and_added_losses",
    "convolution_with_batch_norm_accumulation_and_adafactor",
    "recurrent_with_sparse_embedding_and_lion",
    "dense_model_with_l2_momentum_and_clip_by_value",
)


def cells_of(strategy: str, dtype: str) -> tuple[str, ...]:
    """All cells that a strategy can be shown with: those in 16 bits in one precision only, some on two replicas only."""
    if dtype == "float32" and strategy in ("mirrored:4", "multi_worker:2x2", "multi_worker:3x1"):
        return IN_FLOAT32
    alone = ALONE | (set() if strategy in ("one_device", "mirrored:2") else ON_TWO_REPLICAS_ONLY)
    if strategy.startswith("parameter_server"):
        alone = alone | (NOT_IN_PARTS if strategy.count("x") > 1 else NOT_ON_SERVERS)
    return tuple(cell for cell in CELLS if cell not in alone and not (dtype == "float32" and cell in SIXTEEN_BITS))


def assert_equal_to_one_device(cell: str, strategy: str, dtype: str, together: tuple[str, ...] = ()) -> None:
    """float64 to 1e-9; float32: loss to 1e-6, variables to 2e-5 of max(largest entry, 1e-3). `together`: cells that are
    computed with it, if nobody has yet."""
    expected, found = (results(PROGRAM, name, dtype, together or (cell,)) for name in ("one_device", strategy))
    keys = [key for key in expected if key.startswith(f"{cell}|")]
    assert keys and keys == [key for key in found if key.startswith(f"{cell}|")]
    for key in keys:
        if key.endswith(OWN) or any(name in key for name in ZERO_GRADIENT) or "|mask_" in key:
            continue
        one, copies = expected[key], found[key]
        name = key.rpartition("|")[2]
        if name in EXACT:
            if name == "who":  # the oracle has one replica
                one, copies = ([text.rpartition("|")[0] for text in values] for values in (one, copies))
            assert list(one) == list(copies), (key, one, copies)
            continue
        if "|var/" in key:
            shape = strategy.partition(":")[2].split("x")
            expected_copies = 1 if strategy.startswith("parameter_server") else math.prod(map(int, shape))
            assert len(copies) == expected_copies, "one copy per replica"
            one = one[0]
            worst = np.abs(copies.astype(np.float64) - one).max() / max(np.abs(one).max(), 1e-3)
        else:
            apart = ~((copies == one) | (np.isnan(copies) & np.isnan(one)))  # a step may be not finite in both
            one, copies = one[apart], copies[apart]
            worst = (np.abs(copies - one) / np.maximum(np.abs(one), 1.0)).max(initial=0.0)
        tolerance = {"float64": 1e-9, "float32": 2e-5 if "|var/" in key else 1e-6}[dtype]
        tolerance = SIXTEEN_BITS.get(cell, tolerance)
        assert worst <= tolerance, f"{key}: differs by {worst:.3g} of its largest entry, {one}, {copies}"
