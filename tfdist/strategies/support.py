"""Strategy x feature: the one table that drives the error text, the tests and docs/support.md."""

import keras
import tensorflow as tf

from tfdist.errors import UserError
from tfdist.patches.layers import all_layers
from tfdist.strategies.base import Strategy

YES = ""  # any other text is the reason why not

STRATEGIES = ("OneDevice", "Mirrored", "MultiWorkerMirrored", "ParameterServer", "TPU")
_LATER = "not there yet"
GENERATORS = "`fit`: PyDataset, generators"
MULTI_OPTIMIZER = "clipping or EMA inside of a MultiOptimizer"
_INSIDE = "a norm, and the averages, are of all variables; pass Trainer(clip_norm=...)"

SEVERAL_UPDATES = "`fit`: a `train_step` that computes again after an update (GANs)"
OCCURRENCES = "`fit`: tables under adaptive optimizers, where each look-up of a row counts by itself"
OF_FIT_NOT_ON_SERVERS = "`fit`: tfdist.fit.Checkpoint and SwapEMAWeights"
_ALIKE = "each worker would run it by itself; write a tf.data.Dataset, which all read alike"

# what parameter servers do not do, or not as the others; all else they do
_ON_SERVERS = {
    "train, with every Keras optimizer": (
        "Nadam and MultiOptimizer no; Adafactor, Muon and Lamb with partitioner='none' only; all others yes"
    ),
    "pipelines that end at different steps: all finish together": "there is one dataset, whose steps are dealt out",
    "activation recompute": "activations are kept: weights that came from a server cannot be found again",
    "mixed_float16 with dynamic loss scaling (equal within 16 bits)": "workers would scale each other's losses",
    "gradients reduced in bfloat16 (not equal to one device)": "each worker's gradients go to the servers as they are",
    "`fit`: the optimizer's own clipping, accumulation, averages, loss scale, decay, schedules": (
        "clipping, averages, decay and schedules yes; accumulation and loss scale no"
    ),
    SEVERAL_UPDATES: "servers update when a step has ended; compute all gradients first",
    OCCURRENCES: "the look-ups of a row in a batch count once, as their sum",
    OF_FIT_NOT_ON_SERVERS: "other workers' steps are on their way; use tfdist.Trainer, or save from on_epoch_end",
}

# feature -> strategy -> YES or the reason
TABLE: dict[str, dict[str, str]] = {
    feature: {
        "OneDevice": one_device,
        "Mirrored": mirrored,
        # one implementation: what holds for the replicas of one process holds for many
        "MultiWorkerMirrored": several[0] if several else mirrored,
        # with `max_staleness=0`, or `gradients_per_update`: otherwise the order of updates is nobody's
        "ParameterServer": _INSIDE if feature == MULTI_OPTIMIZER else _ON_SERVERS.get(feature, YES),
        "TPU": _LATER,
    }
    for feature, one_device, mirrored, *several in (
        ("train, with every Keras optimizer", YES, YES),
        ("token-weighted loss", YES, YES),
        ("dict inputs, several outputs with their own losses and weights", YES, YES),
        ("accumulation", YES, YES),
        ("clipping (norm, global norm, value)", YES, YES),
        ("uneven last batch, empty replica, step without weight", YES, YES),
        ("pipelines that end at different steps: all finish together", YES, YES),
        ("dropout of tfdist models, equal to one device", YES, YES),
        ("stock Keras random layers (differ between replicas, not equal to one device)", YES, YES),
        ("batch normalisation, synchronised (without XLA on several replicas)", YES, YES),
        ("L2 and add_loss (of the data: the mean over the replicas, by weight)", YES, YES),
        ("statistics of other layers (the mean over the replicas, by rows)", YES, YES),
        ("frozen layers, variables without gradient", YES, YES),
        ("sparse gradients of embeddings (reduced as dense ones)", YES, YES),
        ("recurrent and convolution layers", YES, YES),
        ("label smoothing, z-loss", YES, YES),
        ("activation recompute", YES, YES),
        ("XLA inside the replica", YES, YES),
        ("mixed_bfloat16 (equal within 16 bits)", YES, YES),
        ("mixed_float16 with dynamic loss scaling (equal within 16 bits)", YES, YES),
        ("steps that are not finite: skipped by all, named", YES, YES),
        ("EMA of the weights, swapped in for evaluation", YES, YES),
        ("exact evaluation and metrics", YES, YES),
        ("checkpoint and resume", YES, YES),
        ("gradients reduced in bfloat16 (not equal to one device)", "one device reduces nothing", YES),
        (MULTI_OPTIMIZER, _INSIDE, _INSIDE),
        ("Keras `fit`, `evaluate`, `predict`, with the numbers of stock Keras on one device", YES, YES),
        ("`fit`: the optimizer's own clipping, accumulation, averages, loss scale, decay, schedules", YES, YES),
        ("`fit`: masks, sample and class weights, every reduction of losses, uneven batches", YES, YES),
        (
            "`fit`: a `train_step` of one's own (losses: means or sums over rows; gradients: of the global batch)",
            YES,
            YES,
        ),
        (SEVERAL_UPDATES, YES, YES),
        ("`fit`: models without `call`, logs of any name (results of metrics are those of all replicas)", YES, YES),
        (OCCURRENCES, YES, YES),
        ("`fit`: XLA (not with masks, batch normalisation or a `train_step` of one's own on several replicas)", YES, YES),
        ("`fit`: callbacks; files and lines are the chief's, decisions everybody's", YES, YES),
        (OF_FIT_NOT_ON_SERVERS, YES, YES),
        (GENERATORS, YES, YES, _ALIKE),
    )
}


def refuse(feature: str, strategy: str) -> None:
    """Raises `UserError` with the table's reason, if it has one."""
    reason = TABLE[feature][strategy]
    if reason:
        able = [name for name in STRATEGIES if TABLE[feature][name] == YES]
        hint = f"; it works on {', '.join(able)}" if able else ""
        raise UserError(f"{feature} on {strategy}: {reason}{hint}")


def check(strategy: Strategy, optimizer: keras.optimizers.Optimizer, clip_norm: float) -> None:
    """Raises `UserError` for what the table refuses and for settings that contradict each other."""
    updating = getattr(optimizer, "inner_optimizer", optimizer)
    several = getattr(updating, "optimizers", [])
    for one in several:
        if one.clipnorm or one.global_clipnorm or one.clipvalue or one.use_ema:
            refuse(MULTI_OPTIMIZER, type(strategy).__name__)
    for one in (updating, *several):
        if one.gradient_accumulation_steps:
            raise UserError(
                f"optimizer: gradient_accumulation_steps={one.gradient_accumulation_steps} counts batches, tfdist "
                "splits each global batch; leave it out and pass Trainer(accumulate_steps=...)"
            )
    own_clip = updating.clipnorm or updating.global_clipnorm or updating.clipvalue
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
    sixteen_bits = any("16" in layer.compute_dtype for layer in all_layers(model))
    return not (on_cpu and sixteen_bits)


def markdown() -> str:
    """The table of docs/support.md; a test keeps the two equal."""
    shown = ("OneDevice", "Mirrored", "MultiWorkerMirrored", "ParameterServer")
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
