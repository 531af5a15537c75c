"""Stable names for the values of a model and its optimizer: the object path (attribute and index) and the slot name.

Keras' own variable paths are neither stable (a second build gives `sequential_1/...`) nor unique, so they appear in
messages only.
"""

from typing import Any

import keras


def model_keys(model: keras.Layer) -> dict[str, keras.Variable]:
    """`{"blocks/0/attention/query/kernel": variable, ...}`, every weight of the model once."""
    keys: dict[str, keras.Variable] = {}
    _walk(model, "", set(), keys)
    named = {id(variable) for variable in keys.values()}
    hidden = [variable for variable in model.weights if id(variable) not in named]  # in containers we do not look into
    return keys | {f"weights/{i}": variable for i, variable in enumerate(hidden)}


def optimizer_keys(optimizer: keras.optimizers.Optimizer, model: keras.Layer) -> dict[str, keras.Variable]:
    """`{"iterations": ..., "momentums/blocks/0/...": ...}`: slot lists follow the trainable variables."""
    name_of = {id(variable): key for key, variable in model_keys(model).items()}
    trainable = [name_of[id(variable)] for variable in model.trainable_variables]
    own = {id(variable) for variable in optimizer.variables}
    keys: dict[str, keras.Variable] = {}
    for attribute, value in sorted(vars(optimizer).items()):
        slot = attribute.strip("_")
        if isinstance(value, keras.optimizers.Optimizer):  # of a LossScaleOptimizer
            keys |= {f"{slot}/{name}": v for name, v in optimizer_keys(value, model).items()}
        elif id(value) in own:
            keys[slot] = value
        elif isinstance(value, list) and len(value) == len(trainable):
            keys |= {f"{slot}/{name}": v for name, v in zip(trainable, value, strict=True) if id(v) in own}
    keys = {key: v for key, v in keys.items() if not key.startswith(("variables/", "trainable_variables/"))}
    named = {id(variable) for variable in keys.values()}
    hidden = [variable for variable in optimizer.variables if id(variable) not in named]
    return keys | {f"variables/{i}": variable for i, variable in enumerate(hidden)}


def _walk(layer: keras.Layer, path: str, seen: set[int], keys: dict[str, keras.Variable]) -> None:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    children = _children(layer)
    inherited = {id(variable) for _, child in children for variable in child.weights}
    for variable in layer.weights:
        if id(variable) not in inherited and not any(variable is known for known in keys.values()):
            keys[_unique(f"{path}{variable.name}", keys)] = variable
    for name, child in children:
        _walk(child, f"{path}{name}/", seen, keys)


def _unique(key: str, keys: dict[str, Any]) -> str:
    count = sum(1 for known in keys if known == key or known.rpartition("#")[0] == key)
    return f"{key}#{count}" if count else key


def _children(layer: keras.Layer) -> list[tuple[str, keras.Layer]]:
    """Sublayers by attribute; a functional or sequential model has none of its own and lists its layers by index."""
    found: list[tuple[str, keras.Layer]] = []
    for attribute, value in sorted(vars(layer).items()):
        if attribute in _BOOKKEEPING or attribute.startswith("_self_"):  # TensorFlow's own tracking
            continue
        found += _layers_in(attribute, value)
    reached = {id(child) for _, child in found}
    if isinstance(layer, keras.Model):
        found += [(f"layers/{i}", child) for i, child in enumerate(layer.layers) if id(child) not in reached]
    return found


def _layers_in(name: str, value: Any) -> list[tuple[str, keras.Layer]]:
    if isinstance(value, keras.Layer):
        return [(name, value)]
    if isinstance(value, (list, tuple)):
        return [pair for i, item in enumerate(value) for pair in _layers_in(f"{name}/{i}", item)]
    if isinstance(value, dict):
        return [pair for key in sorted(value, key=str) for pair in _layers_in(f"{name}/{key}", value[key])]
    return []


# what Keras itself keeps in every layer and model; the same layers are reached by their own attribute or index
_BOOKKEEPING = {
    "_layers", "_metrics", "_tracker", "_functional", "_operations", "_operations_by_depth", "_nodes", "_inputs",
    "_outputs", "_inbound_nodes", "_outbound_nodes", "_loss_tracker", "_compile_metrics", "_compile_loss", "_loss",
    "optimizer", "_optimizer", "_seed_generators", "_trainable_variables", "_non_trainable_variables",
    "_nodes_by_depth", "_obj_reference_counts_dict", "_tracked",
}  # fmt: skip
