import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist.config import ModelConfig
from tfdist.errors import UserError
from tfdist.infer.generate import Sampling, generate, generate_text, truncate
from tfdist.models.transformer import TransformerLM

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=[{}, {"positions": "rotary", "num_kv_heads": 1}], ids=["learned", "rotary"])
def model(request):
    keras.utils.set_random_seed(0)
    model = TransformerLM(ModelConfig(vocab_size=17, num_layers=2, num_heads=2, model_dim=16, **request.param), 24)
    for variable in model.trainable_variables:  # larger weights, so that the likeliest token changes on the way
        variable.assign(variable * 8)
    return model


def test_cached_greedy_tokens_are_those_without_a_cache(model):
    tokens = [3, 1, 4]
    found = generate(model, tokens, 12, GREEDY)
    for _ in range(12):
        tokens.append(int(tf.argmax(model(tf.constant([tokens]))[0, -1])))
    assert found == tokens[3:]
    assert len(set(found)) > 1


def test_the_seed_decides(model):
    draws = [generate(model, [1], 16, Sampling(temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_top_k_of_one_is_greedy(model):
    assert generate(model, [2], 10, Sampling(top_k=1)) == generate(model, [2], 10, GREEDY)


LOGITS = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, 1.0, 4), (2, 1.0, 2), (9, 1.0, 4), (0, 0.4, 1), (0, 0.6, 2), (0, 0.9, 3), (3, 0.6, 2), (1, 0.01, 1)],
)
def test_truncation_keeps_the_likeliest(top_k, top_p, kept):
    found = truncate(tf.constant(LOGITS), top_k, top_p).numpy()
    np.testing.assert_array_equal(np.isfinite(found), np.arange(4) < kept)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_bad_sampling_is_refused(bad):
    with pytest.raises(UserError, match="expected"):
        Sampling(**bad)


def test_text_is_bytes_and_what_does_not_fit_is_refused():
    model = TransformerLM(ModelConfig(vocab_size=300, num_layers=1, num_heads=1, model_dim=8), 16)
    text = generate_text(model, "a long prompt that is cut at the left", 8, Sampling(temperature=1.0))
    assert text.startswith("a long prompt that is cut at the left")
    with pytest.raises(UserError, match="expected less than the model's context of 16, found 16"):
        generate_text(model, "a", 16, GREEDY)
    with pytest.raises(UserError, match="expected a prompt"):
        generate(model, [], 4, GREEDY)
