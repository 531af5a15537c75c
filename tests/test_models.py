import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.config import ModelConfig
from tfdist.models import count, products
from tfdist.models.dropout import Dropout, SamplePosition, rows_of_stream, sample_position, stream_key, uniform_rows
from tfdist.models.transformer import TransformerLM, next_token_loss

LENGTH = 8


def config(**values) -> ModelConfig:
    return ModelConfig(**(dict(vocab_size=13, num_layers=2, num_heads=2, model_dim=8) | values))


VARIANTS = [
    dict(zip(("positions", "norm", "activation", "num_kv_heads", "use_bias", "tie_embeddings"), values, strict=True))
    for values in itertools.product(
        ("learned", "rotary"), ("layer", "rms"), ("gelu", "swiglu"), (0, 1), (True,), (True, False)
    )
][::3] + [{"use_bias": False, "mlp_dim": 12}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_count_without_tensorflow_is_that_of_the_built_model(variant):
    model = TransformerLM(config(**variant), LENGTH)
    assert model.count_params() == count.num_parameters(config(**variant), LENGTH)
    assert model(tf.zeros([3, LENGTH], tf.int32)).shape == (3, LENGTH, 13)


def test_flops_follow_the_formula():
    values = config(tie_embeddings=False)
    n = count.num_parameters(values, LENGTH) - LENGTH * 8 - 13 * 8  # no product: position table, input embedding
    assert count.flops_per_token(values, LENGTH) == 6 * n + 12 * 2 * 8 * LENGTH


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_token_sees_no_later_one(positions):
    model = TransformerLM(config(positions=positions, num_kv_heads=1), LENGTH)
    tokens = np.arange(LENGTH)[None] % 13
    changed = tokens.copy()
    changed[0, 5:] = 0
    a, b = model(tokens).numpy(), model(changed).numpy()
    np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-6)
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-4


@pytest.mark.parametrize("length", [1, 8, 70, 131])  # one block of queries, and several
def test_attention_is_the_textbook_formula(length):
    model = TransformerLM(config(num_layers=1, dtype="float64", num_kv_heads=1, num_heads=4), length)
    attention = model.blocks[0].attention
    x = np.random.default_rng(0).normal(size=(2, length, 8))
    weights = {name: getattr(attention, name).get_weights() for name in ("query", "key", "value", "output_projection")}
    q, k, v = (x @ weights[n][0] + weights[n][1] for n in ("query", "key", "value"))
    out = np.zeros_like(x)
    for head in range(4):
        scores = q[..., head * 2 : head * 2 + 2] @ k.transpose(0, 2, 1) / np.sqrt(2)
        scores[(slice(None), *np.triu_indices(length, 1))] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., head * 2 : head * 2 + 2] = p / p.sum(-1, keepdims=True) @ v
    expected = out @ weights["output_projection"][0] + weights["output_projection"][1]
    np.testing.assert_allclose(attention(x)[0].numpy(), expected, atol=1e-12)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="expected at most 8 tokens a row, found 9"):
        TransformerLM(config(), LENGTH)(tf.zeros([1, 9], tf.int32))


def test_saves_and_loads_as_keras(tmp_path):
    model = TransformerLM(config(dropout=0.1, tie_embeddings=False), LENGTH)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    tokens = np.arange(LENGTH)[None]
    np.testing.assert_array_equal(model(tokens), loaded(tokens))


def test_mixed_bfloat16_keeps_float32_weights_and_a_close_loss():
    keras.utils.set_random_seed(0)
    full = TransformerLM(config(), LENGTH)
    keras.utils.set_random_seed(0)
    mixed = TransformerLM(config(dtype="mixed_bfloat16"), LENGTH)
    tokens = np.arange(LENGTH)[None]
    assert mixed(tokens).dtype == tf.bfloat16 and {v.dtype for v in mixed.weights} == {"float32"}
    losses = [next_token_loss(tokens, model(tokens)) for model in (full, mixed)]
    assert losses[1].dtype == tf.float32
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


def test_recompute_gives_the_same_gradients_and_computes_again():
    keras.utils.set_random_seed(0)
    model = TransformerLM(config(dropout=0.3), LENGTH)
    tokens = tf.constant(np.arange(2 * LENGTH).reshape(2, -1) % 13)

    def gradients():
        @tf.function(jit_compile=True)
        def fn():
            with tf.GradientTape() as tape, sample_position(SamplePosition(0, tf.constant(3), tf.constant(0))):
                loss = tf.reduce_sum(next_token_loss(tokens, model(tokens, training=True)))
            grads = tape.gradient(loss, [v.value for v in model.trainable_variables])
            return [tf.convert_to_tensor(g) for g in grads]

        products = fn.experimental_get_compiler_ir()(stage="optimized_hlo").count(" dot(")
        return fn(), products

    kept, products_kept = gradients()
    model.config.recompute = True
    again, products_again = gradients()
    for a, b in zip(kept, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert products_again > products_kept, "XLA must not merge the second computation with the first"


# ---- dropout ----


def position(step=0, first_row=0, seed=0):
    return SamplePosition(seed, tf.constant(step), tf.constant(first_row))


@pytest.mark.parametrize("row_size", [1, 4, 7, 1030])
@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_masks_depend_on_the_global_row_alone(row_size, replicas, jit_compile):
    """With and without XLA, to the bit. Key, step and row are arguments: a constant is computed without XLA in any case."""

    @tf.function(jit_compile=jit_compile)
    def draw(key, step, first_row):
        return rows_of_stream(key, step, first_row, (8 // replicas, row_size))

    whole = uniform_rows(position(5, seed=3), "layer", (8, row_size)).numpy()
    key, rows = stream_key(3, "layer"), tf.range(0, 8, 8 // replicas)
    parts = np.concatenate([draw(key, tf.constant(5), first_row).numpy() for first_row in rows])
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(whole * 2.0**23 % 1, 0)
    assert whole.min() >= 0 and whole.max() < 1


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_a_model_drops_the_same_with_and_without_xla(replicas, jit_compile):
    keras.utils.set_random_seed(0)
    model = TransformerLM(config(dropout=0.3, dtype="float64"), LENGTH)
    tokens = tf.constant(np.arange(8 * LENGTH).reshape(8, -1) % 13)

    def loss(rows, step, first_row):
        with sample_position(SamplePosition(0, step, first_row)):
            return next_token_loss(rows, model(rows, training=True))

    compiled, size = tf.function(loss, jit_compile=jit_compile), 8 // replicas
    parts = [compiled(tokens[i : i + size], tf.constant(3), tf.constant(i)) for i in range(0, 8, size)]
    np.testing.assert_allclose(np.concatenate(parts), loss(tokens, 3, 0), rtol=1e-12)


def test_masks_differ_by_step_layer_seed_and_row():
    base = uniform_rows(position(), "a", (4, 50)).numpy()
    others = [
        uniform_rows(position(step=1), "a", (4, 50)).numpy(),
        uniform_rows(position(), "b", (4, 50)).numpy(),
        uniform_rows(position(seed=1), "a", (4, 50)).numpy(),
    ]
    assert all((base != other).mean() > 0.99 for other in others)
    assert len({row.tobytes() for row in base}) == 4


def test_dropout_keeps_the_mean_and_is_off_outside_training():
    layer, x = Dropout(0.25, "a"), tf.ones([64, 64])
    with sample_position(position()):
        dropped = layer(x, training=True).numpy()
    assert abs((dropped == 0).mean() - 0.25) < 0.03
    np.testing.assert_allclose(dropped[dropped > 0], 1 / 0.75)
    np.testing.assert_array_equal(layer(x, training=False), x)
    assert (layer(x, training=True).numpy() == 0).any(), "outside a position it falls back to Keras' own dropout"


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_document_in_a_packed_row_is_like_one_alone(positions, recompute):
    """Logits and gradients: nothing crosses a document's border, and positions begin anew."""
    config = ModelConfig(
        vocab_size=11, num_layers=2, num_heads=2, model_dim=8, positions=positions, dtype="float64", recompute=recompute
    )
    keras.utils.set_random_seed(0)
    model = TransformerLM(config, 96, document_start=10)
    rng = np.random.default_rng(0)
    documents = [np.concatenate([[10], rng.integers(0, 10, n)]) for n in (40, 3, 0, 49)]
    packed = np.concatenate(documents)[None]
    assert packed.shape == (1, 96)

    def loss(tokens, weights):
        with tf.GradientTape() as tape:
            logits = model(tokens, training=True)
            value = tf.reduce_sum(logits * weights)
        return logits, tape.gradient(value, [v.value for v in model.trainable_variables])

    weights = rng.normal(size=(1, 96, 11))
    together, gradients = loss(packed, weights)
    start, alone = 0, []
    for document in documents:
        end = start + len(document)
        logits, of_one = loss(document[None], weights[:, start:end])
        np.testing.assert_allclose(together[:, start:end], logits, atol=1e-12)
        alone.append([tf.convert_to_tensor(g) for g in of_one])
        start = end
    for whole, *parts in zip(gradients, *alone, strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(whole), sum(parts), atol=1e-10)
    joined = TransformerLM(config, 96)
    joined.set_weights(model.get_weights())
    assert np.abs(joined(packed) - together)[:, 41:].max() > 1e-4, "without it documents see each other"
    again = TransformerLM.from_config(model.get_config())
    assert again.document_start == 10


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("inner", "outer"), [(5, 3), (3, 5)])
def test_products_for_xla_are_products(inner, outer, transpose):
    """Values, gradients, and gradients of gradients: those of a plain product."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 7, inner)))
    kernel = tf.constant(rng.normal(size=(outer, inner) if transpose else (inner, outer)))

    def all_of_it(multiply):
        with tf.GradientTape() as outside:
            outside.watch([x, kernel])
            with tf.GradientTape() as tape:
                tape.watch([x, kernel])
                y = multiply(x, kernel)
                loss = tf.reduce_sum(tf.sin(y))
            first = tape.gradient(loss, [x, kernel])
            penalty = sum(tf.reduce_sum(tf.square(one)) for one in first)
        return [y, *first, *outside.gradient(penalty, [x, kernel])]

    @tf.function(jit_compile=True)
    def compiled():
        with products.compiled_for_cpu(True):
            return all_of_it(lambda x, kernel: products.product(x, kernel, transpose))

    for one, other in zip(compiled(), all_of_it(lambda x, k: tf.matmul(x, k, transpose_b=transpose)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("use_bias", [False, True])
def test_layers_together_give_what_each_gives(use_bias):
    layers = [
        keras.layers.Dense(units, use_bias=use_bias, dtype="float64", bias_initializer="normal") for units in (4, 2, 2)
    ]
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 3, 5)))
    alone = products.together(layers, x)

    @tf.function(jit_compile=True)
    def compiled():
        with products.compiled_for_cpu(True):
            return products.together(layers, x)

    for one, other in zip(compiled(), alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_dense_layer_keeps_its_activation():
    layer = products.Dense(4, "tanh", dtype="float64")
    x = tf.constant(np.random.default_rng(0).normal(size=(3, 5)))
    alone = layer(x)

    @tf.function(jit_compile=True)
    def compiled():
        with products.compiled_for_cpu(True):
            return layer(x)

    np.testing.assert_allclose(compiled(), alone, rtol=1e-12)


@pytest.mark.parametrize(("jit_compile", "is_used"), [("on", True), ("off", False)])
def test_a_compiled_step_uses_the_products_for_xla(monkeypatch, jit_compile, is_used):
    """Without XLA they would have no operation to be kept in place with."""
    used, multiply = [], products._multiply
    monkeypatch.setattr(products, "_multiply", lambda *args: used.append(1) or multiply(*args))
    strategy = tfdist.OneDevice()
    with strategy.scope():
        model, optimizer = TransformerLM(config(), LENGTH), keras.optimizers.SGD(0.1)
    trainer = tfdist.Trainer(strategy, model, optimizer, next_token_loss, jit_compile=jit_compile, writers=[])
    tokens = np.zeros((1, 2, LENGTH), "int32")
    trainer.train(lambda context: tf.data.Dataset.from_tensor_slices((tokens, tokens)), 1)
    assert bool(used) is is_used
