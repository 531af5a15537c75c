"""How fast the hardware could go, and so how well it is used (MFU: model FLOPs utilisation, arXiv:2204.02311)."""

import dataclasses
import time
from collections.abc import Mapping

import tensorflow as tf

# Dense peak in FLOP/s per device, without sparsity: the vendors' data sheets (NVIDIA A100 80GB, H100/H200 SXM, L4,
# V100, T4, RTX 4090), by part of the device name. bfloat16 stands for mixed_bfloat16 and mixed_float16 (on V100 and
# T4, which have no bfloat16 units, float16); float32 is TF32 where the device uses it by default.
_PEAK_FLOPS = {
    "H200": {"float32": 494.5e12, "bfloat16": 989e12},
    "H100": {"float32": 494.5e12, "bfloat16": 989e12},
    "A100": {"float32": 156e12, "bfloat16": 312e12},
    "L4": {"float32": 60e12, "bfloat16": 121e12},
    "V100": {"float32": 15.7e12, "bfloat16": 125e12},
    "T4": {"float32": 8.1e12, "bfloat16": 65e12},
    "RTX 4090": {"float32": 82.6e12, "bfloat16": 165e12},
}
_SIZE = 2048  # of the measured product
_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Peak:
    flops_per_s: float  # of all devices together
    source: str


NO_PEAK = Peak(0.0, "not known: the chief does not compute")


def peak_flops(num_replicas: int, dtype: str) -> Peak:
    """The rate that MFU is measured against: a table for known GPUs, else a matrix product measured now.

    Logical CPU devices share one CPU, so their number does not count.
    """
    kind = "bfloat16" if "16" in dtype else ("float64" if dtype == "float64" else "float32")
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "unknown GPU")
        for part, peaks in _PEAK_FLOPS.items():
            if part in name.replace("GeForce ", "") and kind in peaks:
                return Peak(num_replicas * peaks[kind], f"{num_replicas} x {name}, {kind}: data sheet")
        rate = num_replicas * measured_flops(kind)
        return Peak(rate, f"{num_replicas} x {name}: a measured {_SIZE}^3 {kind} matrix product")
    return Peak(measured_flops(kind), f"this CPU: a measured {_SIZE}^3 {kind} matrix product")


def measured_flops(dtype: str) -> float:
    """FLOP/s of a square matrix product on the default device: the best of a few rounds."""
    a = tf.cast(tf.random.stateless_normal([_SIZE, _SIZE], [0, 0]), dtype)
    product = tf.function(lambda a: tf.matmul(a, a)[0, 0])
    float(product(a))
    best_s = float("inf")
    for _ in range(_ROUNDS):
        started_s = time.perf_counter()
        float(product(a))
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * _SIZE**3 / best_s


def formula(flops_per_token: float, peak: Peak) -> str:
    """The line that is printed once."""
    if not peak.flops_per_s:
        return f"no MFU: {flops_per_token:,.0f} FLOPs per token (6N + 12*L*d*T), the peak is {peak.source}"
    return (
        f"MFU = tokens/s x {flops_per_token:,.0f} FLOPs per token (6N + 12*L*d*T) / {peak.flops_per_s / 1e9:,.0f} "
        f"GFLOP/s ({peak.source})"
    )


def memory(bytes_per_replica: Mapping[str, int]) -> str:
    """The line that is printed once; activations come on top."""
    return "each replica holds " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in bytes_per_replica.items())
