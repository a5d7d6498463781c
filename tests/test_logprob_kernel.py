"""What holds of the Triton op beyond the laws of test_logprob.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import backward, check_equals_reference, forward, in_each_dtype, in_float64_too, on, seeds
from poisoned import poisoned
from test_logprob import torch_logprob

from minitinker import kernels

few = settings(max_examples=20)
vocabs = st.sampled_from([1, 2, 31, 127, 4095, 4096, 4097, 8209])  # around the tile of 4096
shapes = st.tuples(st.integers(1, 3), vocabs, st.integers(1, 5))  # tokens, vocab, K
tails = st.integers(0, 3)


def draw(seed, shape):
    tokens, vocab, k = shape
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((tokens, vocab), np.float32)
    return logits, rng.integers(0, vocab, (tokens, k)), rng.standard_normal((tokens, k), np.float32)


def both(logits, targets, dy, dtype="float32"):
    """y and dlogits."""
    y, saved = forward(kernels, "logprob", logits, targets, dtype=dtype)
    return y, *backward(kernels, "logprob", dy, saved, dtype)


@in_each_dtype
@few
@given(shape=shapes, seed=seeds)
def test_the_kernel_equals_the_reference(dtype, shape, seed):
    logits, targets, _ = draw(seed, shape)
    check_equals_reference("logprob", dtype, torch_logprob(targets), [logits], [targets], seed=seed)


@in_each_dtype
@few
@given(
    vocab=vocabs,
    scale=st.sampled_from([1e-45, 1e-38, 1e4, 1e30, 1e38]),
    order=st.sampled_from([1, -1]),
    seed=seeds,
)
def test_large_and_subnormal_logits_in_any_order_equal_the_reference(dtype, vocab, scale, order, seed):
    logits = np.sort(np.random.default_rng(seed).uniform(-1, 1, (2, vocab)) * scale)[:, ::order]
    targets = np.array([[0, vocab // 2, vocab - 1]] * 2)
    check_equals_reference("logprob", dtype, torch_logprob(targets), [logits], [targets], seed=seed)


@in_float64_too
@few
@given(shape=shapes, before=tails, after=tails, seed=seeds)
def test_a_row_has_the_same_bits_alone_and_anywhere_in_any_batch(dtype, shape, before, after, seed):
    inputs = draw(seed, (1, *shape[1:]))
    others = draw(seed + 1, (before + after, *shape[1:]))
    batch = [np.concatenate([o[:before], x, o[before:]]) for x, o in zip(inputs, others, strict=True)]
    for alone, among_others in zip(both(*inputs, dtype), both(*batch, dtype), strict=True):
        np.testing.assert_array_equal(among_others[before], alone[0])


@in_float64_too
@few
@given(shape=shapes, seed=seeds)
def test_every_number_of_the_outputs_is_written(dtype, shape, seed):
    inputs = draw(seed, shape)
    expected = both(*inputs, dtype)
    with poisoned():
        answers = both(*inputs, dtype)
    for actual, wanted in zip(answers, expected, strict=True):
        assert not np.isnan(actual).any()
        np.testing.assert_array_equal(actual, wanted)


@in_each_dtype
@few
@given(tokens=st.integers(1, 5), vocab=st.integers(1, 40), k=st.integers(1, 4), seed=seeds)
def test_inputs_may_be_strided(dtype, tokens, vocab, k, seed):
    wide = draw(seed, (tokens, 2 * vocab, 2 * k))
    logits, targets, dy = (np.ascontiguousarray(x[:, ::2]) for x in wide)
    targets //= 2
    strided = [x[:, ::2] for x in on(kernels, [wide[0], wide[1] // 2, wide[2]], dtype, wide=(2,))]
    y, saved = kernels.logprob_forward(*strided[:2])
    dlogits = kernels.logprob_backward(strided[2], saved)
    expected = both(logits, targets, dy, dtype)
    for actual, wanted in zip((y, dlogits), expected, strict=True):
        np.testing.assert_array_equal(kernels.to_numpy(actual), wanted)


@pytest.mark.parametrize(("tokens", "k"), [(0, 1), (0, 3), (2, 0)])
def test_no_rows_and_no_targets_give_no_logprobs(tokens, k):
    y, dlogits = both(*draw(0, (tokens, 7, k)))
    assert y.shape == (tokens, k)
    np.testing.assert_array_equal(dlogits, np.zeros((tokens, 7)))


def test_a_tile_of_tokens_that_cannot_come_takes_nothing_from_the_others():
    logits = np.full((1, 4100), -np.inf, np.float32)
    logits[0, 4097:] = [2, 1, 0]
    y, dlogits = both(logits, np.array([[4097, 4098, 0]]), np.array([[1, 0, 0]], np.float32))
    p = np.exp(np.array([2.0, 1, 0])) / np.exp(np.array([2.0, 1, 0])).sum()
    np.testing.assert_allclose(y[0, :2], np.log(p[:2]), rtol=1e-6)
    assert y[0, 2] == -np.inf
    np.testing.assert_allclose(dlogits[0, 4097:], [1 - p[0], -p[1], -p[2]], rtol=1e-5)
    assert not dlogits[0, :4097].any()


def test_nan_stays_in_its_row():
    logits, targets, dy = draw(0, (3, 9, 2))
    expected = both(logits, targets, dy)
    logits[1, 4] = np.nan
    for actual, wanted in zip(both(logits, targets, dy), expected, strict=True):
        assert np.isnan(actual[1]).all()
        np.testing.assert_array_equal(actual[[0, 2]], wanted[[0, 2]])
