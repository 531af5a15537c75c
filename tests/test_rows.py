"""What a graph is read to say of a number holds: parts of a batch give parts of it. Random expressions, and chosen ones."""

import random

import numpy as np
import pytest
import tensorflow as tf

from tfdist.fit.rows import Of, Rows

ROWS, CUT = 7, 3
RNG = np.random.default_rng(0)
X, Y = RNG.uniform(0.5, 2.0, (ROWS, 4)), RNG.uniform(0.5, 2.0, (ROWS, 4))
TABLE = RNG.uniform(0.5, 2.0, (4, 5))

UNARY = [
    tf.square, tf.sqrt, tf.math.log1p, tf.nn.softmax, tf.identity, tf.negative, tf.stop_gradient,
    tf.zeros_like, tf.ones_like,
    lambda t: 2.0 * t, lambda t: t + 1.0, lambda t: 1.0 / t, lambda t: t / 3.0, lambda t: t[..., :2], lambda t: t[:1],
    lambda t: tf.reduce_sum(t), lambda t: tf.reduce_mean(t), lambda t: tf.reduce_max(t), lambda t: tf.nn.l2_loss(t),
    lambda t: tf.reduce_sum(t, axis=0), lambda t: tf.reduce_mean(t, axis=0), lambda t: tf.reduce_sum(t, axis=-1),
    lambda t: tf.reduce_max(t, axis=-1), lambda t: tf.reduce_mean(t, axis=-1, keepdims=True), lambda t: tf.norm(t),
    lambda t: tf.transpose(t), lambda t: tf.reshape(t, [-1]), lambda t: t[..., None], lambda t: t[None], tf.squeeze,
    lambda t: tf.cast(tf.shape(t)[0], t.dtype), lambda t: tf.cast(tf.size(t), t.dtype),
    lambda t: tf.where(t > 1.0, t, 0.0 * t),
    lambda t: t @ TABLE, lambda t: tf.matmul(t, t, transpose_a=True), lambda t: tf.matmul(t, t, transpose_b=True),
    lambda t: tf.stack([t, t]), lambda t: tf.concat([t, t], 0), lambda t: tf.concat([t, t], -1),
    lambda t: tf.boolean_mask(t, t > 1.0),
    lambda t: tf.one_hot(tf.cast(t, tf.int32), 3, dtype=t.dtype), lambda t: tf.gather(TABLE, tf.cast(t, tf.int32)),
    lambda t: tf.unstack(t, axis=-1)[0], lambda t: tf.einsum("ij,ij->", t, t), lambda t: tf.einsum("ij,kj->ik", t, t),
    lambda t: tf.maximum(t, 1.0), lambda t: tf.cumsum(t, axis=0), lambda t: tf.cumsum(t, axis=-1),
    lambda t: tf.argmax(t, 0) * 1.0,
]  # fmt: skip
BINARY = [tf.add, tf.subtract, tf.multiply, tf.divide, tf.math.divide_no_nan, tf.maximum, lambda a, b: tf.stack([a, b])]


def expression(seed: int):
    """A function of two batches, made of random ops."""
    choice = random.Random(seed)
    plan = [(choice.random(), choice.randrange(1 << 30), choice.randrange(1 << 30)) for _ in range(choice.randint(1, 6))]

    def compute(x, y):
        known = [x, y]
        for kind, one, other in plan:
            a, b = known[one % len(known)], known[other % len(known)]
            try:
                known.append(UNARY[other % len(UNARY)](a) if kind < 0.6 else BINARY[one % len(BINARY)](a, b))
            except (ValueError, TypeError, NotImplementedError, tf.errors.InvalidArgumentError):  # of shapes that do not fit
                continue
            known[-1] = tf.cast(known[-1], tf.float64)
        return known[-1]

    return compute


def read_and_run(compute, strict: bool) -> tuple[Of, np.ndarray, np.ndarray, np.ndarray]:
    """What it is said to be, and its values on the first rows, on the others, and on all."""
    kinds = []

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float64)] * 2, autograph=False)
    def step(x, y):
        result = compute(x, y)
        kinds.append(Rows([x, y], {}, strict).of(result))
        return result

    parts = [(X[:CUT], Y[:CUT]), (X[CUT:], Y[CUT:]), (X, Y)]
    values = [step(*part).numpy() for part in parts]
    return kinds[-1], *values


def assert_adds_up(of: Of, first, second, whole, what) -> None:
    share = CUT / ROWS
    if of is Of.MEAN:
        np.testing.assert_allclose(share * first + (1 - share) * second, whole, rtol=1e-9, err_msg=what)
    elif of in (Of.SUM, Of.COUNT):
        np.testing.assert_allclose(first + second, whole, rtol=1e-9, err_msg=what)
    elif of is Of.INVERSE:
        np.testing.assert_allclose(1 / (1 / first + 1 / second), whole, rtol=1e-9, err_msg=what)
    elif of is Of.NOTHING:
        np.testing.assert_allclose(first, whole, rtol=1e-9, err_msg=what)
        np.testing.assert_allclose(second, whole, rtol=1e-9, err_msg=what)
    elif of in (Of.ROWS, Of.PART, Of.SOME, Of.ASIDE):  # as a tape does, a reduction of all of it
        factor = [share, 1 - share] if of is Of.PART else [1, 1]
        np.testing.assert_allclose(factor[0] * first.sum() + factor[1] * second.sum(), whole.sum(), rtol=1e-9, err_msg=what)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("block", range(3))
def test_what_is_said_of_random_expressions_holds(block, strict):
    said = {}
    for seed in range(block * 100, block * 100 + 100):
        try:
            of, first, second, whole = read_and_run(expression(seed), strict)
        except (tf.errors.InvalidArgumentError, ValueError):  # where the number of rows decides whether shapes fit
            continue
        if np.isfinite(whole).all():
            assert_adds_up(of, first, second, whole, f"seed {seed}: {of}")
            said[of] = said.get(of, 0) + 1
    assert {Of.ROWS, Of.MEAN, Of.SUM, Of.MIXED} <= said.keys() and said.get(Of.UNKNOWN, 0) < 40, said


@pytest.mark.parametrize(
    ("of", "compute"),
    [
        (Of.MEAN, lambda x, y: tf.reduce_mean(tf.square(x - y))),
        (Of.MEAN, lambda x, y: tf.reduce_sum(x * y) / tf.cast(tf.shape(x)[0], x.dtype)),
        (Of.MEAN, lambda x, y: tf.reduce_sum(x / tf.cast(tf.shape(y)[0], x.dtype))),
        (Of.MEAN, lambda x, y: 0.3 * tf.reduce_mean(x) - tf.reduce_mean(tf.reduce_sum(y, -1)) + 1.0),
        (Of.MEAN, lambda x, y: tf.nn.compute_average_loss(x[:, 0], global_batch_size=tf.shape(x)[0])),
        (Of.SUM, lambda x, y: tf.reduce_sum(tf.transpose(x))),
        (Of.SUM, lambda x, y: tf.reduce_sum(tf.boolean_mask(x, y > 1.0))),
        (Of.SUM, lambda x, y: tf.reduce_sum([x[:, 0], y[:, 0]])),
        (Of.ROWS, lambda x, y: tf.nn.softmax_cross_entropy_with_logits(y, x @ TABLE[:, :4])),
        (Of.ROWS, lambda x, y: tf.map_fn(tf.reduce_sum, x)),
        (Of.MIXED, lambda x, y: tf.sqrt(tf.reduce_mean(x))),
        (Of.MIXED, lambda x, y: tf.reduce_sum(x * y) / tf.reduce_sum(y)),
        (Of.MIXED, lambda x, y: x - tf.reduce_mean(x, axis=0)),
        (Of.MIXED, lambda x, y: tf.reduce_mean(x) * tf.reduce_mean(y)),
        (Of.MIXED, lambda x, y: x[:, 0] - y[:, :1]),
        (Of.UNKNOWN, lambda x, y: tf.linalg.det(tf.matmul(x, x, transpose_a=True))),
    ],
)  # fmt: skip
def test_what_is_said_of_chosen_expressions(of, compute):
    said, *values = read_and_run(compute, strict=False)
    assert said is of
    assert_adds_up(of, *values, str(of))
