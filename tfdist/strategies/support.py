"""Strategy x feature: the one table that drives the error text, the tests and the README."""

import keras
import tensorflow as tf

from tfdist import patches
from tfdist.errors import UserError
from tfdist.strategies.base import Strategy

YES = ""  # any other text is the reason why not

STRATEGIES = ("OneDevice", "Mirrored", "MultiWorkerMirrored", "ParameterServer", "TPU")
_LATER = "not there yet"
_BATCH_NORM = (
    "its statistics are neither synchronised over replicas nor masked for padding rows yet; freeze it (trainable=False)"
)

# feature -> strategy -> YES or the reason
TABLE: dict[str, dict[str, str]] = {
    feature: {
        "OneDevice": one_device,
        "Mirrored": mirrored,
        "MultiWorkerMirrored": mirrored,  # one implementation: what holds for the replicas of one process holds for many
        "ParameterServer": _LATER,
        "TPU": _LATER,
    }
    for feature, one_device, mirrored in (
        ("train", YES, YES),
        ("token-weighted loss", YES, YES),
        ("accumulation", YES, YES),
        ("clipping (norm, global norm, value)", YES, YES),
        ("uneven last batch", YES, YES),
        ("dropout of tfdist models, equal to one device", YES, YES),
        ("stock Keras random layers", YES, YES),  # different on each replica: not equal to one device
        ("L2 and add_loss", YES, YES),
        ("XLA inside the replica", YES, YES),
        ("checkpoint and resume", YES, YES),
        ("exact evaluation", YES, YES),
        ("mixed_bfloat16", YES, YES),
        ("EMA of the optimizer", YES, YES),
        ("gradients reduced in bfloat16 (not equal to one device)", "one device reduces nothing", YES),
        ("batch normalisation", _BATCH_NORM, _BATCH_NORM),
        ("loss scaling (mixed_float16)", "dynamic loss scaling is " + _LATER, "dynamic loss scaling is " + _LATER),
    )
}


def refuse(feature: str, strategy: str) -> None:
    """Raises `UserError` with the table's reason, if it has one."""
    reason = TABLE[feature][strategy]
    if reason:
        able = [name for name in STRATEGIES if TABLE[feature][name] == YES]
        hint = f"; it works on {', '.join(able)}" if able else ""
        raise UserError(f"{feature} on {strategy}: {reason}{hint}")


def check(strategy: Strategy, model: keras.Model, optimizer: keras.optimizers.Optimizer, clip_norm: float) -> None:
    """Raises `UserError` for what the table refuses and for settings that contradict each other."""
    name = type(strategy).__name__
    if any(_is_batch_norm(layer) and layer.trainable for layer in patches.all_layers(model)):
        refuse("batch normalisation", name)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor:
        refuse("loss scaling (mixed_float16)", name)
    if optimizer.use_ema and not optimizer.ema_overwrite_frequency:
        raise UserError(
            "optimizer: use_ema without ema_overwrite_frequency would have no effect here; give it a frequency, or leave "
            "use_ema out"
        )
    if optimizer.gradient_accumulation_steps:
        raise UserError(
            f"optimizer: gradient_accumulation_steps={optimizer.gradient_accumulation_steps} counts batches, tfdist "
            "splits each global batch; leave it out and pass Trainer(accumulate_steps=...)"
        )
    own_clip = optimizer.clipnorm or optimizer.global_clipnorm or optimizer.clipvalue
    if clip_norm and own_clip:
        raise UserError(
            f"clipping: expected one setting, found clip_norm={clip_norm} and the optimizer's own ({own_clip}); "
            "leave one out"
        )
    if clip_norm < 0:
        raise UserError(f"clip_norm: expected 0 (off) or more, found {clip_norm}")


def jit_compile(setting: str, model: keras.Model) -> bool:
    """Resolves auto: XLA, except in 16 bits on a CPU, where TensorFlow's own matrix products are faster."""
    if setting not in ("auto", "on", "off"):
        raise UserError(f"jit_compile: expected auto, on or off, found {setting!r}")
    if setting != "auto":
        return setting == "on"
    on_cpu = not tf.config.list_physical_devices("GPU")
    sixteen_bits = any("16" in layer.compute_dtype for layer in patches.all_layers(model))
    return not (on_cpu and sixteen_bits)


def _is_batch_norm(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def markdown() -> str:
    """The table of the README; a test keeps the two equal."""
    shown = ("OneDevice", "Mirrored", "MultiWorkerMirrored")
    notes: list[str] = []

    def cell(reason: str) -> str:
        if reason == YES:
            return "yes"
        if reason not in notes:
            notes.append(reason)
        return f"refused [{notes.index(reason) + 1}]"

    rows = [f"| {feature} | {' | '.join(cell(row[name]) for name in shown)} |" for feature, row in TABLE.items()]
    head = [f"| | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
    others = ", ".join(name for name in STRATEGIES if name not in shown)
    return "\n".join([*head, *rows, "", *(f"[{i}] {note}  " for i, note in enumerate(notes, 1)), f"{others}: {_LATER}."])
