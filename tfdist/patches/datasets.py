"""tf.data: which transformations a dataset is made of, and reading a range of a large file in pure TensorFlow ops."""

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2


def upstream(dataset: tf.data.Dataset, later: tuple[str, ...] = ()) -> list[tuple[tf.data.Dataset, tuple[str, ...]]]:
    """A dataset and all that it reads from, each with the names of the transformations that it goes through afterwards. What
    happens inside the functions of `flat_map` and `interleave` is not seen."""
    found = [(dataset, later)]
    for before in dataset._inputs():
        found += upstream(before, (*later, type(dataset).__name__))
    return found


def shuffles_without_seed(dataset: tf.data.Dataset) -> bool:
    """Of one found by `upstream`: whether it is a shuffle that neither `seed` nor `tf.random.set_seed` fixes."""
    seeds = [tf.get_static_value(seed) for seed in (getattr(dataset, "_seed", 1), getattr(dataset, "_seed2", 1))]
    return "Shuffle" in type(dataset).__name__ and not any(seeds)


def calls_python(dataset: tf.data.Dataset) -> bool:
    """Of one found by `upstream`: whether its functions, or functions inside of these, run Python.

    What: `Dataset._functions`, `FuncGraph._functions`. Why: the public ways to a dataset's graph copy what it holds.
    Versions: TensorFlow 2.19-2.21.
    """
    graphs = [function.function.graph for function in dataset._functions()]
    while graphs:
        graph = graphs.pop()
        if any("PyFunc" in operation.type for operation in graph.get_operations()):
            return True
        graphs += [function.graph for function in graph._functions.values()]
    return False


def mapped_file(path: str, dtype: tf.DType, size: int) -> tf.Tensor:
    """A file as a tensor [size], mapped and not read: taking a slice reads that slice. For graphs.

    What: `ImmutableConst` with an empty `_scoped_allocator`, an attribute that constant folding leaves alone.
    Why: folded, the whole file is copied, twice (20 GB of memory for one of 10 GB). `FixedLengthRecordDataset` reads a file
    from its beginning to get to a place in it, `ReadFile` all of it.
    A file that is cut short while it is mapped ends the process (SIGBUS).
    Upstream: none reported; FindConstantFoldableNodes in tensorflow/core/common_runtime/constant_folding.cc.
    Versions: TensorFlow 2.19-2.21; tests/test_data.py measures the memory.
    """
    mapped = tf.raw_ops.ImmutableConst(dtype=dtype, shape=[size], memory_region_name=path)
    nothing = attr_value_pb2.AttrValue(list=attr_value_pb2.AttrValue.ListValue(i=[]))
    mapped.op._set_attr("_scoped_allocator", nothing)
    return mapped
