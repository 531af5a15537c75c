"""Graphs of TensorFlow functions: what made a tensor, across functions."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import tensorflow as tf


class Node(NamedTuple):
    """A tensor of a graph, and the calls of functions that lead into that graph, the innermost last."""

    tensor: tf.Tensor
    calls: tuple[tf.Operation, ...] = ()

    @property
    def op(self) -> tf.Operation | None:
        """None: an eager tensor, such as a constant or the handle of a variable, which has no op."""
        return None if hasattr(self.tensor, "numpy") else self.tensor.op

    def inputs(self) -> list["Node"]:
        """What the op takes, past calls of functions: see `source`."""
        return [source(Node(tensor, self.calls)) for tensor in self.op.inputs]


def behind(node: Node, inputs: Callable[[Node], Iterable[Node]] = Node.inputs) -> Iterator[Node]:
    """A node and what it is made of, each once; `inputs` says how to go on from one that an op makes."""
    seen, rest = set(), [source(node)]
    while rest:
        node = rest.pop()
        key = id(node.tensor), node.calls
        if key not in seen:
            seen.add(key)
            yield node
            rest += inputs(node) if node.op is not None else ()


def reads(tensor: tf.Tensor, ids: set[int]) -> bool:
    """Whether a tensor is made of one of others, which may be handles of variables; given by their `id`."""
    return bool(ids) and any(id(node.tensor) in ids for node in behind(Node(tensor)))


_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def source(node: Node) -> Node:
    """The node outside of a function that this one captures or is given, or the one inside that a call returns; else itself.

    What: `FuncGraph.captures`, `Graph._get_function`, `AtomicFunction.graph`.
    Why: no public way leads from a call to the function's body. Versions: TensorFlow 2.19-2.21.
    """
    while True:
        tensor, calls = node
        op = node.op
        if op is not None and op.type in _CALLS:
            node = Node(_body(op).outputs[tensor.value_index], (*calls, op))
        elif op is not None and op.type == "Placeholder" and calls:
            place = [id(one) for one in _body(calls[-1]).inputs].index(id(tensor))
            node = Node(calls[-1].inputs[place], calls[:-1])
        elif op is not None and op.type == "Placeholder":
            outer = [given for given, taken in getattr(op.graph, "captures", ()) if taken is tensor]
            if not outer:
                return node
            node = Node(outer[0])
        else:
            return node


def _body(call: tf.Operation):
    return call.graph._get_function(call.get_attr("f").name).graph


def is_stateful(op: tf.Operation) -> bool:
    """Whether an op may give another value with the same inputs. What: `Operation._is_stateful`. Versions: as above."""
    return op._is_stateful
