"""losses.py: formulas against torch autograd, and what is refused, with the datum and the key named."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import (
    CONFIGS,
    CONTEXT,
    FIXED,
    VOCAB,
    check_against_autograd,
    evaluated,
    numbers,
    seeds,
    shapes,
)
from tiny_models import make_batch

from minitinker.errors import BadRequestError
from minitinker.losses import LOSSES, check_data, find_loss
from minitinker.types import Datum, ImageChunk, ModelInput, TensorData


@pytest.mark.parametrize("name", LOSSES)
@FIXED
@given(shape=shapes, seed=seeds)
def test_value_and_derivative_are_those_of_torch(name, shape, seed):
    config = find_loss(name, CONFIGS.get(name))[1]
    check_against_autograd(name, *numbers(name, shape, seed), config)


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
@FIXED
@given(low=st.floats(0, 1.5), width=st.floats(0, 3), apart=st.sampled_from([0.1, 1.0, 3.0]), seed=seeds)
def test_thresholds_clip_where_those_of_torch_do(name, low, width, apart, seed):
    config = find_loss(name, {"clip_low_threshold": low, "clip_high_threshold": low + width})[1]
    check_against_autograd(name, *numbers(name, (30, 1), seed, apart), config)


@pytest.mark.parametrize("name", ["ppo", "cispo"])
@pytest.mark.parametrize("thresholds", [(1.0, 1.2), (0.8, 1.0), (1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
def test_a_ratio_on_a_threshold_counts_as_not_clipped(name, thresholds, advantage):
    config = dict(zip(("clip_low_threshold", "clip_high_threshold"), thresholds, strict=True))
    lp = np.array([[-1.0], [-2.5]])  # r is exactly 1
    inputs = {"logprobs": lp.copy(), "advantages": np.full_like(lp, advantage)}
    check_against_autograd(name, lp, inputs, config)
    assert (evaluated(name, lp, inputs, config)[1] == -advantage).all()


def test_ppo_stops_pushing_once_the_ratio_has_gone_far_enough():
    config = find_loss("ppo", None)[1]
    lp = np.log(np.array([[1.3], [1.3], [0.7], [0.7]]))
    inputs = {"logprobs": np.zeros_like(lp), "advantages": np.array([[1.0], [-1.0], [1.0], [-1.0]])}
    loss, dlp, _ = evaluated("ppo", lp, inputs, config)
    np.testing.assert_allclose(loss[:, 0], [-1.2, 1.3, -0.7, 0.8])
    np.testing.assert_allclose(dlp[:, 0], [0, 1.3, -0.7, 0])


def test_defaults_are_those_of_the_api():
    found = {name: find_loss(name, CONFIGS.get(name))[1] for name in LOSSES}
    assert found == {
        "cross_entropy": {},
        "importance_sampling": {},
        "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
        "dro": {"beta": 0.3},
        "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    }


def test_a_given_config_key_replaces_one_default_and_leaves_the_other():
    config = find_loss("ppo", {"clip_high_threshold": np.float32(1.5)})[1]
    assert config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.5}


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("crossentropy", None, ["'crossentropy'", *LOSSES]),
        ("dro", None, ["dro", "'beta'"]),
        ("dro", {"beta": None}, ["dro", "'beta'"]),
        ("dro", {"beta": -0.1}, ["'beta'", "-0.1"]),
        ("dro", {"beta": 0.1, "clip_low_threshold": 0}, ["dro", "'clip_low_threshold'", "beta"]),
        ("cross_entropy", {"beta": 0.1}, ["cross_entropy", "'beta'", "none"]),
        ("ppo", {"clip": 0.1}, ["ppo", "'clip'", "clip_low_threshold", "clip_high_threshold"]),
        ("ppo", {"clip_low_threshold": "0.8"}, ["'clip_low_threshold'", "'0.8'"]),
        ("ppo", {"clip_low_threshold": True}, ["'clip_low_threshold'", "True"]),
        ("ppo", {"clip_low_threshold": float("nan")}, ["'clip_low_threshold'", "nan"]),
        ("cispo", {"clip_high_threshold": float("inf")}, ["'clip_high_threshold'", "inf"]),
        ("cispo", {"clip_low_threshold": 2, "clip_high_threshold": 1}, ["2.0", "1.0"]),
    ],
)
def test_an_unknown_loss_or_config_is_refused_by_name(name, config, said):
    with pytest.raises(BadRequestError) as caught:
        find_loss(name, config)
    for words in said:
        assert words in str(caught.value)


@FIXED
@given(lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=4), k=st.none() | st.integers(1, 3))
def test_checked_data_hold_what_was_given(lengths, k):
    data = make_batch(lengths, k=k, vocab=VOCAB)
    for datum, example in zip(data, check_data(data, "cross_entropy", {}, VOCAB, CONTEXT), strict=True):
        assert example.tokens.tolist() == datum.model_input.to_ints()
        targets, weights = (datum.loss_fn_inputs[key].to_numpy() for key in ("target_tokens", "weights"))
        assert example.shape == targets.shape
        np.testing.assert_array_equal(example.targets, targets.reshape(len(targets), -1))
        np.testing.assert_array_equal(example.inputs["weights"], weights.reshape(len(targets), -1))
        assert example.inputs["weights"].dtype == np.float64


@pytest.mark.parametrize("k", [None, 2])
def test_absent_weights_are_ones(k):
    (datum,) = make_batch([5], k=k, vocab=VOCAB)
    bare = Datum(datum.model_input, {"target_tokens": datum.loss_fn_inputs["target_tokens"]})
    (example,) = check_data([bare], "cross_entropy", {}, VOCAB, CONTEXT)
    np.testing.assert_array_equal(example.inputs["weights"], np.ones((5, k or 1)))


def test_whole_numbers_serve_as_weights():
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [3, 4], "weights": np.array([0, 1])})
    (example,) = check_data([datum], "cross_entropy", {}, VOCAB, CONTEXT)
    assert example.inputs["weights"].tolist() == [[0], [1]]


GOOD = {
    "cross_entropy": {"target_tokens": [1, 2, 3], "weights": [1.0, 0.0, -1.0]},
    "ppo": {"target_tokens": [1, 2, 3], "logprobs": [-1.0, -2.0, -3.0], "advantages": [1.0, 0.0, -1.0]},
}
NAN, INF = float("nan"), float("inf")
BAD = [  # loss, what replaces which input (None: it is left out), what the message says
    ("cross_entropy", {"target_tokens": None}, ["'target_tokens'", "weights"]),
    ("cross_entropy", {"advantages": [1.0, 1.0, 1.0]}, ["cross_entropy", "'advantages'", "target_tokens"]),
    ("cross_entropy", {"mask": [1.0, 1.0, 1.0]}, ["cross_entropy", "'mask'"]),
    ("cross_entropy", {"target_tokens": [1, 2]}, ["'target_tokens'", "(2,)", "(3,) or (3, K)"]),
    ("cross_entropy", {"weights": [1.0]}, ["'weights'", "(1,)", "(3,)"]),
    ("cross_entropy", {"weights": [[1.0], [1.0], [1.0]]}, ["'weights'", "(3, 1)", "(3,)"]),
    ("cross_entropy", {"target_tokens": [[1, 2], [2, 1], [3, 0]]}, ["'weights'", "(3,)", "(3, 2)"]),
    ("cross_entropy", {"target_tokens": TensorData([], "int64", [3, 0])}, ["'target_tokens'", "(3, 0)"]),
    ("cross_entropy", {"target_tokens": [[[1]], [[2]], [[3]]]}, ["'target_tokens'", "(3, 1, 1)"]),
    ("cross_entropy", {"target_tokens": np.float32([1, 2, 3])}, ["'target_tokens'", "float32", "int64"]),
    ("cross_entropy", {"target_tokens": TensorData(np.int64(1), "int64")}, ["'target_tokens'", "()"]),
    ("cross_entropy", {"target_tokens": [1, VOCAB, 3]}, ["'target_tokens'", "11", "0 to 10"]),
    ("cross_entropy", {"target_tokens": [1, -1, 3]}, ["'target_tokens'", "-1", "0 to 10"]),
    ("cross_entropy", {"weights": [1.0, NAN, 1.0]}, ["'weights'", "nan", "finite"]),
    ("cross_entropy", {"weights": [1.0, 1.0, -INF]}, ["'weights'", "-inf", "finite"]),
    ("ppo", {"logprobs": None}, ["ppo", "'logprobs'", "advantages"]),
    ("ppo", {"advantages": None}, ["ppo", "'advantages'", "logprobs"]),
    ("ppo", {"weights": [1.0, 1.0, 1.0]}, ["ppo", "'weights'", "advantages"]),
    ("ppo", {"logprobs": [0.0, -INF, 0.0]}, ["'logprobs'", "-inf", "finite"]),
    ("ppo", {"advantages": [0.0]}, ["'advantages'", "(1,)", "(3,)"]),
    ("ppo", {"target_tokens": [[1], [2], [3]]}, ["'target_tokens'", "(3, 1)", "(3,)"]),
]


@pytest.mark.parametrize(("name", "change", "said"), BAD)
def test_a_bad_input_is_refused_with_its_datum_and_its_key(name, change, said):
    inputs = {key: value for key, value in (GOOD[name] | change).items() if value is not None}
    good, bad = (Datum(ModelInput.from_ints([4, 5, 6]), x) for x in (GOOD[name], inputs))
    config = find_loss(name, None)[1]
    check_data([good], name, config, VOCAB, CONTEXT)
    with pytest.raises(BadRequestError) as caught:
        check_data([good, bad], name, config, VOCAB, CONTEXT)
    for words in ("data[1]", *said):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], ["0 tokens", "1 to 8"]),
        ([1] * (CONTEXT + 1), ["9 tokens", "1 to 8"]),
        ([1, VOCAB, 1], ["11", "0 to 10"]),
        ([1, -1, 1], ["-1", "0 to 10"]),
        ([1, 2**70, 1], [str(2**70), "0 to 10"]),
    ],
)
def test_a_bad_model_input_is_refused_with_its_datum(tokens, said):
    bad = Datum(ModelInput.from_ints(tokens), {"target_tokens": [1] * len(tokens)})
    with pytest.raises(BadRequestError) as caught:
        check_data([*make_batch([2], vocab=VOCAB), bad], "cross_entropy", {}, VOCAB, CONTEXT)
    for words in ("data[1].model_input", *said):
        assert words in str(caught.value)


@pytest.mark.parametrize("data", [[], (), None, "ab", {}, make_batch([2])[0]])
def test_no_data_is_a_value_error(data):
    with pytest.raises(ValueError, match="at least one Datum"):
        check_data(data, "cross_entropy", {}, VOCAB, CONTEXT)


def test_what_is_no_datum_is_refused_with_its_place():
    with pytest.raises(BadRequestError, match=r"data\[1\] is a dict; it must be a Datum"):
        check_data([*make_batch([2], vocab=VOCAB), {}], "cross_entropy", {}, VOCAB, CONTEXT)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_a_token_without_advantage_costs_nothing_however_unlikely_it_was_to_be_drawn(name):
    inputs = {"logprobs": np.array([[-1e4], [-2.0]]), "advantages": np.array([[0.0], [1.0]])}
    terms, dlp, _ = evaluated(name, np.array([[-1.0], [-2.0]]), inputs, find_loss(name, None)[1])
    assert terms[0] == dlp[0] == 0
    assert np.isfinite([terms, dlp]).all()
    assert dlp[1] == -1


# Inputs in other layouts


@pytest.mark.parametrize("k", [3, 5])
def test_sparse_targets_and_weights_are_the_dense_ones(k):
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((6, k)) < 0.2, rng.standard_normal((6, k)), 0).astype(np.float32)
    targets = np.where(weights != 0, rng.integers(1, VOCAB, (6, k)), 0)
    text = ModelInput.from_ints([1] * 6)
    dense = Datum(text, {"target_tokens": targets, "weights": weights})
    sparse = Datum(
        text,
        {
            "target_tokens": TensorData.from_torch_sparse(torch.from_numpy(targets)),
            "weights": TensorData.from_torch_sparse(torch.from_numpy(weights)),
        },
    )
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    one, other = check_data([dense, sparse], "cross_entropy", {}, VOCAB, CONTEXT)
    np.testing.assert_array_equal(one.targets, other.targets)
    np.testing.assert_array_equal(one.inputs["weights"], other.inputs["weights"])


def test_an_image_is_refused_with_its_datum_and_its_place():
    image = ImageChunk(data=b"", format="png", expected_tokens=2)
    bad = Datum(ModelInput.from_ints([1]).append(image), {"target_tokens": [1, 2, 3]})
    with pytest.raises(BadRequestError, match=r"data\[0\]\.model_input\.chunks\[1\] is of type ImageChunk"):
        check_data([bad], "cross_entropy", {}, VOCAB, CONTEXT)


def test_the_chunks_of_a_text_are_read_one_after_the_other():
    text = ModelInput.from_ints([1, 2]).append_int(3).append_int(4)
    (example,) = check_data(
        [Datum(text, {"target_tokens": [2, 3, 4, 5]})], "cross_entropy", {}, VOCAB, CONTEXT
    )
    assert example.tokens.tolist() == [1, 2, 3, 4]
