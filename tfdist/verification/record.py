"""One strategy's runs, recorded step by step. A process of its own:

    python -m tfdist.verification.record SPEC.json mirrored:2 FOLDER

`multi_worker:2x1` (workers x devices) is one worker of a cluster. Writes FOLDER/EXPERIMENT.WORKER.npz, one file for each
experiment: a run without some features, to see whether a difference goes with one of them.
"""

import json
import numbers
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfdist.cluster.link import supervisor
from tfdist.errors import Failure, UserError
from tfdist.models.dropout import Dropout
from tfdist.patches.layers import ComponentVariables, all_layers
from tfdist.strategies.base import InputContext, Strategy
from tfdist.strategies.sync import Mirrored, MultiWorkerMirrored, OneDevice
from tfdist.train import step
from tfdist.train.loss import output_weights
from tfdist.train.trainer import Trainer
from tfdist.verification import subject as subject_module
from tfdist.verification.subject import Subject, load

MOST_VALUES = 4096  # of a tensor in a recording; a larger one is recorded as the means of this many parts of it
FEATURES = ("clipping", "dropout", "accumulation", "weights", "batch normalisation", "EMA")


def main(spec_file: str, strategy_name: str, folder: str) -> None:
    subject_module.inside_verification = True
    spec = json.loads(Path(spec_file).read_text())
    sys.path[:] = list(dict.fromkeys([*spec["sys_path"], *sys.path]))
    logging.set_verbosity(logging.ERROR)
    tf.get_logger().setLevel("ERROR")
    strategy = make_strategy(strategy_name)
    if spec["dtype"] != "own":
        keras.config.set_dtype_policy(spec["dtype"])
        keras.config.set_floatx("float64" if spec["dtype"] == "float64" else "float32")
    if len(spec["experiments"]) > 1:  # only to find a cause: half of the time of such short runs is this
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    for number, without in enumerate(spec["experiments"]):
        recording = record(strategy, subject_of(spec), spec, without)
        with open(Path(folder) / f"{number}.{strategy.worker}.npz", "wb") as file:
            np.savez(file, **recording)


def make_strategy(name: str) -> Strategy:
    kind, _, shape = name.partition(":")
    if kind == "multi_worker":
        return MultiWorkerMirrored(num_devices=int(shape.partition("x")[2]))
    return OneDevice() if kind == "one_device" else Mirrored(int(shape))


def subject_of(spec: dict) -> Subject:
    if "subject" in spec:
        return load(spec["subject"])(spec["argument"])
    given = {
        what: {key: load(one, what) for key, one in name.items()} if isinstance(name, dict) else load(name, what)
        for what, name in spec["functions"].items()
    }
    return Subject(given["model_fn"], given.get("optimizer_fn"), given.get("loss"), given.get("dataset_fn"), spec["options"])


def record(strategy: Strategy, subject: Subject, spec: dict, without: list[str]) -> dict[str, np.ndarray]:
    """Trains `spec["num_steps"]` steps and returns what each of them left behind."""
    supervisor().phase("build")
    num_steps, seed = spec["num_steps"], subject.options.get("seed", 0)
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        model = subject.model_fn()
        optimizer = subject.optimizer_fn(model) if subject.optimizer_fn else keras.optimizers.AdamW(1e-3)
    options = dict(subject.options) | {"steps_per_loop": 1, "writers": []}
    in_use = features(model, optimizer, options)
    own_randomness = switch_off(model, optimizer, options, without)
    micro_batches = options.get("accumulate_steps", 1)
    loss = subject.loss or default_loss(model)
    dataset_fn = subject.dataset_fn or random_data(model, micro_batches)
    if spec["dtype"] != "own":
        dataset_fn = in_floatx(dataset_fn)
    if "weights" in without:
        dataset_fn = with_even_weights(dataset_fn, spec["num_replicas"] * micro_batches)
    trainer = Trainer(strategy, model, optimizer, loss, **options)

    rows = row_hashes(dataset_fn(InputContext(strategy.worker, strategy.num_workers, strategy.num_replicas)), num_steps)
    recording: dict[str, np.ndarray] = {f"rows/{i}": hashes for i, hashes in enumerate(rows)}
    recording["in_use"] = np.array(in_use)
    recording["own_randomness"] = np.array(own_randomness)
    recording["dtypes"] = np.array(sorted({layer.compute_dtype for layer in all_layers(model)}))
    if strategy.num_replicas == 1 and not without:
        iterator = strategy.distribute(dataset_fn, accumulate_steps=micro_batches)
        recording["noise"] = np.array(only_noise(strategy, trainer, loss, iterator, seed))
    recorder = Recorder()
    recorder.take(trainer, {})
    trainer.train(dataset_fn, num_steps, [recorder])
    for name in recorder.steps[0]:
        recording[f"value/{name}"] = np.stack([values[name] for values in recorder.steps])
    for name in recorder.outputs[-1]:
        recording[f"output/{name}"] = np.array([outputs.get(name, 0.0) for outputs in recorder.outputs])
    evaluated = trainer.evaluate(lambda context: dataset_fn(context).take(2))
    recording["output/evaluation"] = np.array([0.0] * trainer.step + [evaluated.loss])
    return recording


class Recorder:
    """Every value of the state on every replica of this process, and what the step says of itself, after each step."""

    def __init__(self):
        self.steps: list[dict[str, np.ndarray]] = []  # [step]: name -> [local replicas, at most MOST_VALUES]
        self.outputs: list[dict[str, float]] = []

    def next_due(self, step):
        return None

    def maybe(self, trainer, turn):
        if turn.step > turn.first_step:
            self.take(trainer, {name: float(values[0]) for name, values in turn.outputs.items()})

    def take(self, trainer, outputs):
        local = trainer.strategy.tf_strategy.experimental_local_results
        values = trainer.state.values()
        values |= {f"seed/{i}": variable for i, variable in enumerate(trainer.state.layer_seeds)}
        self.steps.append({
            name: np.stack([digest(copy.numpy()) for copy in local(variable.value)]) for name, variable in values.items()
        })  # fmt: skip
        self.outputs.append({name: outputs[name] for name in ("loss", "grad_norm", "tokens", "skipped") if name in outputs})


def digest(values: np.ndarray) -> np.ndarray:
    """At most MOST_VALUES numbers to which every entry contributes: all of them, or the means of parts."""
    flat = values.astype(np.float64).reshape(-1)
    if flat.size <= MOST_VALUES:
        return flat
    bounds = np.linspace(0, flat.size, MOST_VALUES, endpoint=False).astype(np.int64)
    return np.add.reduceat(flat, bounds) / np.diff([*bounds, flat.size])


# ---- what is in use, and how to do without ----


def features(model, optimizer, options: dict) -> list[str]:
    updating = getattr(optimizer, "inner_optimizer", optimizer)
    layers = all_layers(model)
    found = {
        "clipping": options.get("clip_norm") or updating.clipnorm or updating.global_clipnorm or updating.clipvalue,
        "dropout": any(isinstance(layer, Dropout) and layer.rate for layer in layers),
        "accumulation": options.get("accumulate_steps", 1) > 1,
        "weights": True,
        "batch normalisation": any(isinstance(x, keras.layers.BatchNormalization) and x.trainable for x in layers),
        "EMA": updating.use_ema,
    }
    return [name for name in FEATURES if found[name]]


def switch_off(model, optimizer, options: dict, without: Iterable[str]) -> list[str]:
    """Takes the features out, and the randomness of stock Keras layers, which differs between replicas by design. Returns
    the names of the layers with such randomness."""
    updating = getattr(optimizer, "inner_optimizer", optimizer)
    random_layers, layers = [], all_layers(model)
    unused = {id(layer.fallback) for layer in layers if isinstance(layer, Dropout)}  # only outside of a Trainer
    for layer in (layer for layer in layers if id(layer) not in unused):
        if isinstance(layer, Dropout):
            layer.rate = 0.0 if "dropout" in without else layer.rate
        elif isinstance(layer, keras.layers.BatchNormalization) and "batch normalisation" in without:
            layer.trainable = False
        elif any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values()):
            rates = [name for name in _RANDOM if isinstance(vars(layer).get(name), numbers.Real)]
            if not rates or not type(layer).__module__.startswith("keras."):
                raise UserError(
                    f"{layer.name} ({type(layer).__name__}): expected no random numbers that cannot be switched off, they "
                    "differ between replicas by design; verify the model without it"
                )
            if any(vars(layer)[name] for name in rates):
                random_layers.append(layer.name)
            for name in rates:
                setattr(layer, name, 0.0)
    if "clipping" in without:
        options["clip_norm"] = 0.0
        updating.clipnorm = updating.global_clipnorm = updating.clipvalue = None
    if "accumulation" in without:
        options["accumulate_steps"] = 1
    if "EMA" in without:
        updating.use_ema = False
    return random_layers


_RANDOM = ("rate", "stddev", "dropout", "recurrent_dropout")  # of Dropout and its kin, noise, attention, recurrent cells


def in_floatx(dataset_fn):
    """Numbers of the data in the type of the model, so that a loss may subtract them."""

    def cast(*element):
        return tf.nest.map_structure(
            lambda t: tf.cast(t, keras.config.floatx()) if tf.convert_to_tensor(t).dtype.is_floating else t, element
        )

    return lambda context: dataset_fn(context).map(cast)


def with_even_weights(dataset_fn, shares: int):
    """Every element counts 1, and batches are cut so that they split evenly into that many shares of all pipelines, where
    they have the rows."""

    def even(*element):
        element = element[:2]
        rows = tf.shape(tf.nest.flatten(element)[0])[0]
        cut = rows - rows % mine
        return tf.nest.map_structure(lambda t: t[: tf.where(cut > 0, cut, rows)], element)

    def dataset(context):
        nonlocal mine
        mine = max(1, shares // context.pipelines)
        return dataset_fn(context).map(even)

    mine = 1
    return dataset


# ---- data ----


def row_hashes(dataset: tf.data.Dataset, num_steps: int) -> list[np.ndarray]:
    """[step]: a number for each row of this worker, whatever its place in the batch."""
    return [
        np.array([zlib.crc32(b"".join(a[i].tobytes() for a in arrays)) for i in range(len(arrays[0]))], np.int64)
        for element in dataset.take(num_steps)
        for arrays in [[t.numpy() for t in tf.nest.flatten(element)]]
    ]


def squared_difference(y, predicted):
    return tf.square(predicted - tf.cast(y, predicted.dtype))


def default_loss(model):
    """For one output, or a dict of them."""
    outputs = None if isinstance(model, keras.Sequential) else getattr(model, "output", None)
    return {name: squared_difference for name in outputs} if isinstance(outputs, dict) else squared_difference


def random_data(model, micro_batches: int):
    """Batches of 16 and 13 rows in the shapes of the model's inputs and outputs, with weights. Whole-number inputs are 0 or
    1. Raises `UserError` for a model that does not know its inputs."""
    if not getattr(model, "inputs", None):
        raise UserError("dataset_fn: expected one for a model without symbolic inputs, found none")

    sequential = isinstance(model, keras.Sequential)  # knows lists only
    parts = (model.inputs[0], model.outputs[0]) if sequential else (model.input, model.output)

    def dataset_fn(context):
        rng = np.random.default_rng(0)

        def numbers(rows, tensor):
            shape = (rows, *(size or 8 for size in tensor.shape[1:]))
            whole = not tf.as_dtype(tensor.dtype).is_floating
            return rng.integers(0, 2, shape).astype(tensor.dtype) if whole else rng.normal(size=shape)

        def batch(rows):
            x, y = (tf.nest.map_structure(lambda t: numbers(rows, t), part) for part in parts)
            mine = context.rows(16, micro_batches)
            mine = mine[mine < rows]
            return tf.nest.map_structure(lambda a: a[mine], (x, y, rng.choice([0.5, 1.0, 2.0], rows)))

        batches = [batch(rows) for rows in (16, 13, 16)]
        spec = tf.nest.map_structure(lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), batches[0])
        data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)
        return data.repeat().skip(context.start_step)

    return dataset_fn


# ---- gradients that are nothing but rounding ----


def only_noise(strategy: Strategy, trainer: Trainer, loss, iterator, seed: int) -> list[str]:
    """Variables whose true gradient is zero: their first gradient is as small as the rounding of the others, but not 0.

    Adam scales such noise up to the size of the learning rate, so that it cannot agree between two correct runs.
    """
    state = trainer.state
    components = ComponentVariables(strategy.tf_strategy, state.variables, 0)

    def probe(batch, stop, replica):
        with components:
            totals = output_weights(loss, batch.weight)
            gradients, _ = step.accumulate(state, loss, batch, totals, seed, step.Replica(0, 0, 1))
        sizes = [tf.zeros([]) if g is None else tf.reduce_max(tf.abs(g)) for g in gradients]
        names = {str(i): tf.cast(size, tf.float64) for i, size in enumerate(sizes)}
        return names | {"valid": batch.valid, "stop": stop}

    before = [variable.numpy() for variable in state.model.variables]
    outputs, _ = strategy.make_steps(probe)(iterator, 1)
    for variable, value in zip(state.model.variables, before, strict=True):
        variable.assign(value)
    sizes = [float(outputs[str(i)][0]) for i in range(len(state.trainable))]
    precision = "float64" if all(v.dtype == "float64" for v in state.trainable) else "float32"
    smallest = 100 * np.finfo(precision).eps * max(sizes)
    name_of = {id(variable): key for key, variable in state.values().items()}
    return [
        name_of[id(variable)].partition("/")[2]
        for variable, size in zip(state.trainable, sizes, strict=True)
        if 0 < size < smallest
    ]


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Failure as error:
        print(f"tfdist: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
