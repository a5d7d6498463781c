"""What holds of the Triton op beyond the laws of test_sample.py."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import TOLERANCE, in_each_dtype, in_float64_too, on, rounded, seeds
from poisoned import poisoned

from minitinker import kernels, reference

few = settings(max_examples=15)
vocabs = st.sampled_from([1, 7, 129, 1023, 1025, 2048, 2049, 4099])  # tiles: 1024 in float64, 2048 in float32
temperatures = st.sampled_from([0.0, 1e-300, 1e-6, 0.3, 1.0, 1.7, 1e3])
limits = st.sampled_from([-1, 0, 1, 2, 5, 50, 1000, 5000])
masses = st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0])
grains = st.sampled_from([0.0, 1e-3, 0.125, 2.0])  # logits are multiples of it: of bfloat16's, many are equal
rows_of_settings = st.lists(st.tuples(temperatures, limits, masses, grains), min_size=1, max_size=3)
tails = st.integers(0, 2)

LAST_UNIFORM = math.nextafter(1, 0)


def sample(ops, *inputs, dtype=None):
    """Tokens and logprobs. dtype: that of the logits; None: as they are."""
    return [ops.to_numpy(x) for x in ops.sample(*on(ops, inputs, dtype, wide=(1, 2, 4)))]


def draw(seed, settings, vocab, dtype="float32"):
    """logits, uniforms, temperature, top_k, top_p."""
    rng = np.random.default_rng(seed)
    temperature, top_k, top_p, grain = (np.array(x) for x in zip(*settings, strict=True))
    logits = 4 * rng.standard_normal((len(settings), vocab))
    step = np.where(grain == 0, 1, grain)[:, None]
    logits = np.where(grain[:, None] == 0, logits, step * np.round(logits / step))
    return [rounded(logits, dtype), rng.random(len(settings)), temperature, top_k, top_p]


def one_row(logits, uniform, temperature=1.0, top_k=-1, top_p=1.0):
    row = np.array([logits], np.float32)
    return [row, *(np.array([x]) for x in (uniform, temperature, top_k, top_p))]


@in_float64_too
@few
@given(settings=rows_of_settings, vocab=vocabs, seed=seeds)
def test_the_kernel_draws_the_token_of_the_reference(dtype, settings, vocab, seed):
    inputs = draw(seed, settings, vocab, dtype)
    tokens, logprobs = sample(kernels, *inputs, dtype=dtype)
    expected, expected_logprobs = reference.sample(*inputs)
    np.testing.assert_array_equal(tokens, expected)
    assert (tokens.dtype, logprobs.dtype) == (np.int64, inputs[0].dtype)
    tolerance = TOLERANCE[logprobs.dtype]
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("uniform", np.linspace(0, 1, 12, endpoint=False))
@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (-1, 0.6), (4, 0.9)])
def test_logits_whose_distance_from_the_largest_rounds_to_the_same_are_equals(uniform, top_k, top_p):
    logits = [1e-4, 16.0, 15.0, 1.001e-4, 16.0, 15.0 + 2e-6, 2e-4]
    inputs = one_row(logits, uniform, 1e2, top_k, top_p)
    np.testing.assert_array_equal(sample(kernels, *inputs)[0], reference.sample(*inputs)[0])


@pytest.mark.parametrize("token", [0, 1023, 1024, 2047, 2048, 3071, 3072, 4095])
def test_equal_logits_share_the_uniforms_evenly_across_tiles(token):
    for uniform in (token / 4096, math.nextafter((token + 1) / 4096, 0)):
        assert sample(kernels, *one_row(np.zeros(4096), uniform))[0] == [token]


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_logits_a_last_bit_apart_are_no_equals(top_k):
    logits = [0.0, *(-np.float32(1) - np.arange(5, dtype=np.float32) * np.finfo(np.float32).eps)]
    assert sample(kernels, *one_row(logits, LAST_UNIFORM, top_k=top_k))[0] == [top_k - 1]


@in_float64_too
@few
@given(settings=rows_of_settings, vocab=vocabs, seed=seeds)
def test_at_temperatures_1_and_0_the_logprob_has_the_bits_of_a_forward_pass(dtype, settings, vocab, seed):
    inputs = draw(seed, settings, vocab, dtype)
    inputs[2] = np.where(inputs[2] > 0.5, 1.0, 0.0)
    tokens, logprobs = sample(kernels, *inputs, dtype=dtype)
    y, _ = kernels.logprob_forward(kernels.array(inputs[0], dtype), kernels.array(tokens[:, None]))
    np.testing.assert_array_equal(logprobs, kernels.to_numpy(y)[:, 0])


@in_float64_too
@few
@given(settings=rows_of_settings, vocab=vocabs, before=tails, after=tails, seed=seeds)
def test_a_row_has_the_same_bits_alone_and_anywhere_in_any_batch(dtype, settings, vocab, before, after, seed):
    inputs = draw(seed, settings[:1], vocab, dtype)
    others = draw(seed + 1, (settings * 4)[: before + after + 1], vocab, dtype)
    batch = [np.concatenate([o[:before], x, o[before + 1 :]]) for x, o in zip(inputs, others, strict=True)]
    answers = sample(kernels, *inputs, dtype=dtype), sample(kernels, *batch, dtype=dtype)
    for alone, among_others in zip(*answers, strict=True):
        np.testing.assert_array_equal(among_others[before], alone[0])


@in_each_dtype
@few
@given(settings=rows_of_settings, vocab=vocabs, seed=seeds)
def test_every_token_and_logprob_is_written(dtype, settings, vocab, seed):
    inputs = draw(seed, settings, vocab)
    expected = sample(kernels, *inputs, dtype=dtype)
    with poisoned():
        answers = sample(kernels, *inputs, dtype=dtype)
    assert not np.isnan(answers[1]).any()
    for actual, wanted in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


@in_each_dtype
@few
@given(settings=rows_of_settings, vocab=st.integers(1, 40), seed=seeds)
def test_inputs_may_be_strided_and_settings_of_other_dtypes(dtype, settings, vocab, seed):
    inputs = draw(seed, settings, vocab)
    inputs[1:] = [x.astype(np.float32).astype(x.dtype) for x in inputs[1:]]
    wide = [np.repeat(x, 2, -1) for x in inputs]
    strided = [x[..., ::2] for x in on(kernels, wide, dtype, wide=(1, 2, 4))]
    narrow = [strided[0], strided[1].float(), strided[2].float(), strided[3].int(), strided[4].float()]
    expected = sample(kernels, *inputs, dtype=dtype)
    for given_ in (strided, narrow):
        for actual, wanted in zip(kernels.sample(*given_), expected, strict=True):
            np.testing.assert_array_equal(kernels.to_numpy(actual), wanted)


def test_settings_of_whole_numbers_are_taken():
    inputs = one_row([1.0, 3.0, 2.0], 0.5, temperature=0, top_p=1)
    assert sample(kernels, *inputs)[0] == [1]


def test_no_rows_draw_nothing():
    tokens, logprobs = sample(kernels, *(x[:0] for x in one_row([1.0, 2.0], 0.5)))
    assert (tokens.shape, logprobs.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("temperature", "scale"),
    [(1e-6, 1.0), (1e-6, 1e38), (1e-60, 1e-45), (1e-310, 1e-45), (5e-324, 1.0), (5e-324, 1e38)],
)
def test_the_lowest_temperatures_draw_the_largest_without_a_warning(temperature, scale):
    logits = np.array([-1.0, 1.0, 0.0, 1.0], np.float32) * np.float32(scale)
    for uniform, token in [(0.0, 1), (0.49, 1), (0.5, 3), (LAST_UNIFORM, 3)]:
        tokens, logprobs = sample(kernels, *one_row(logits, uniform, temperature))
        assert tokens == [token]
        assert logprobs == [np.float32(math.log(0.5))]


@pytest.mark.parametrize("place", [0, 1, 2060])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.0, -1, 1.0), (1.0, -1, 1.0), (0.7, 3, 0.5), (2.0, -1, 0.9)]
)
def test_a_row_with_nan_has_a_token_in_range_and_nan_for_its_logprob(place, temperature, top_k, top_p):
    settings = [(temperature, top_k, top_p, 0.0)] * 3
    inputs = draw(0, settings, 2061)
    expected = sample(kernels, *inputs)
    inputs[0][1, place] = np.nan
    tokens, logprobs = sample(kernels, *inputs)
    assert 0 <= tokens[1] < 2061
    assert np.isnan(logprobs[1])
    for actual, wanted in zip((tokens, logprobs), expected, strict=True):
        np.testing.assert_array_equal(actual[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("setting", [(0.0, -1, 1.0), (1.0, 2, 0.5), (0.5, -1, 0.5)])
def test_a_row_of_nothing_but_nan_has_a_token_in_range_too(setting):
    tokens, logprobs = sample(kernels, *one_row([np.nan] * 5, 0.9, *setting))
    assert 0 <= tokens[0] < 5
    assert np.isnan(logprobs[0])
