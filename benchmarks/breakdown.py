"""Where the time of a training step goes: a table by parts of the model, from XLA's own profile of each operation.

    python benchmarks/breakdown.py [--config=FILE.py] [--config.model.num_layers=8] [--steps=8]

The step of `Trainer` on one device, random tokens. The times of operations are summed; what the profile has outside of them
(waiting, the input, Python) is the last row, negative where operations ran side by side. Parts are known by the names of
layers, so a model with other names has one row "other".
"""

import collections
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

FOLDER = tempfile.TemporaryDirectory(prefix="tfdist-breakdown-")  # what XLA compiles, and the profile
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={FOLDER.name} --xla_dump_hlo_as_text"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# the first that is found in the name that TensorFlow gives an operation
PARTS = {
    r"attention(_\d+)?/.*product": "attention, projections",
    r"norm(_\d+)?/": "norms",
    r"attention(_\d+)?/": "attention, scores and mixing",
    r"mlp(_\d+)?/.*product": "mlp, products",
    r"mlp(_\d+)?/": "mlp, activation",
    r"lm(_\d+)?/(head(_\d+)?/)?product": "head",
    r"embedding": "embeddings",
    r"SoftmaxCrossEntropy|softmax_cross_entropy": "cross-entropy",
    r"block_\d+": "residual stream",
    r"^AddN": "residual stream, backward",
    r"reduce-window": "row sums of norms and softmax",
}
HOLDS_OTHERS = re.compile(r" (while|call|conditional|async-start|async-done)\(")


def main(_) -> None:
    import tensorflow as tf

    trainer, iterator = prepared(flags.FLAGS.config)
    steps, profile = flags.FLAGS.steps, Path(FOLDER.name) / "profile"
    trainer.train_steps(iterator, steps)
    tf.profiler.experimental.start(str(profile))
    started_s = time.perf_counter()
    trainer.train_steps(iterator, steps)
    whole_ms = (time.perf_counter() - started_s) * 1000 / steps
    tf.profiler.experimental.stop()

    names, parts = operation_names(), collections.Counter()
    for module, operation, ms in operations(profile):
        if (module, operation) in names:
            parts[part_of(names[module, operation])] += ms / steps
    parts["outside of operations"] = whole_ms - sum(parts.values())
    print(f"| part of a step of {whole_ms:.1f} ms | ms | share |\n|---|---|---|")
    for part, ms in sorted(parts.items(), key=lambda pair: -pair[1]):
        print(f"| {part} | {ms:.1f} | {ms / whole_ms:.1%} |")


def prepared(config):
    """A trainer of the config's model, which is compiled, and an iterator of random tokens."""
    import numpy as np
    import tensorflow as tf

    import tfdist
    from tfdist.models.transformer import TransformerLM, training_loss
    from tfdist.optim.adamw import adamw

    strategy, length = tfdist.OneDevice(), config.data.sequence_length
    with strategy.scope():
        model = TransformerLM(config.model, length)
        optimizer = adamw(config.optimizer, config.train.num_steps, model)
    trainer = tfdist.Trainer(
        strategy, model, optimizer, training_loss(config.train.label_smoothing, config.train.z_loss),
        clip_norm=config.train.clip_norm, accumulate_steps=config.train.accumulate_steps, steps_per_loop=flags.FLAGS.steps,
        jit_compile=config.train.jit_compile, writers=[],
    )  # fmt: skip
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, (64, length + 1)).astype("int32")
    data = tf.data.Dataset.from_tensor_slices((rows[:, :-1], rows[:, 1:])).repeat()
    batches = data.batch(config.train.global_batch_size, drop_remainder=True).prefetch(2)
    return trainer, strategy.distribute(lambda context: batches)


def operations(profile: Path) -> Iterator[tuple[str, str, float]]:
    """Module, name, and milliseconds of each operation of XLA that ran."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    for path in profile.rglob("*.xplane.pb"):
        space = xplane_pb2.XSpace()
        space.ParseFromString(path.read_bytes())
        for plane in space.planes:
            for event in (event for line in plane.lines for event in line.events):
                stats = {plane.stat_metadata[stat.metadata_id].name: stat for stat in event.stats}
                if "hlo_op" in stats:
                    module, name = (_text(plane, stats[key]) for key in ("hlo_module", "hlo_op"))
                    yield module, name, event.duration_ps / 1e9


def _text(plane, stat) -> str:
    return stat.str_value or plane.stat_metadata[stat.ref_value].name


def operation_names() -> dict[tuple[str, str], str]:
    """By module and operation of XLA: TensorFlow's name. Without those that hold others, whose time is in theirs too."""
    names = {}
    for path in Path(FOLDER.name).glob("*after_optimizations.txt"):
        module, *lines = path.read_text().splitlines()
        module = module.split()[1].rstrip(",")
        for line in lines:
            if (found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)) and not HOLDS_OTHERS.search(line):
                name = re.search(r'op_name="([^"]*)"', line)
                names[module, found[1]] = name[1] if name else found[1]
        if not any("lm" in name for (of, _), name in names.items() if of == module):
            names |= {key: "update" for key in names if key[0] == module}
    return names


def part_of(name: str) -> str:
    if name == "update":
        return "update"
    part = next((part for pattern, part in PARTS.items() if re.search(pattern, name)), "other")
    return f"{part}, backward" if name.startswith("gradient_tape") else part


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 8, "steps that are measured", lower_bound=1)
    default = Path(__file__).parent.parent / "tfdist" / "configs" / "lm_tiny.py"
    config_flags.DEFINE_config_file("config", str(default), "a config file")
    app.run(main)
