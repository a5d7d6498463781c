import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import (
    TOLERANCE,
    backward,
    check_against_torch,
    check_central_differences,
    check_close,
    dtypes,
    every_backend,
    forward,
    largest,
    law,
    seeds,
)

pytestmark = every_backend

shapes = st.tuples(st.integers(1, 6), st.integers(2, 30), st.integers(1, 5))  # tokens, vocab, K: with repeats

offsets = st.sampled_from([0, 30, -1000])  # added to all logits: changes nothing, and costs no precision


def draw(seed, shape, spread=3.0):
    tokens, vocab, k = shape
    rng = np.random.default_rng(seed)
    return spread * rng.standard_normal((tokens, vocab)), rng.integers(0, vocab, (tokens, k))


def torch_logprob(targets):
    def logprob(logits):
        return torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(targets))

    return logprob


@law(15, shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 4)), seed=seeds)
def test_the_backward_is_the_slope_of_the_forward(ops, shape, seed):
    logits, targets = draw(seed, shape)
    check_central_differences(ops, "logprob", [logits], [targets], seed=seed)


@given(
    shape=shapes,
    spread=st.sampled_from([0.1, 3.0, 100.0]),
    offset=offsets,
    seed=seeds,
)
def test_output_and_gradient_are_those_of_torch(ops, shape, spread, offset, seed):
    logits, targets = draw(seed, shape, spread)
    check_against_torch(ops, "logprob", torch_logprob(targets), [logits + offset], [targets], seed=seed)


@law(2, k=st.sampled_from([1, 3]), offset=offsets, seed=seeds)
def test_float32_is_as_exact_as_torch(ops, k, offset, seed):
    logits, targets = draw(seed, (300, 64, k))
    expected = torch_logprob(targets)
    check_against_torch(ops, "logprob", expected, [logits + offset], [targets], seed=seed, many=True)


@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_the_probabilities_of_all_tokens_add_up_to_one(ops, shape, dtype, seed):
    logits = draw(seed, shape)[0].astype(dtype)
    everything = np.tile(np.arange(logits.shape[1]), (len(logits), 1))
    y, _ = forward(ops, "logprob", logits, everything)
    check_close(np.exp(y).sum(-1), np.ones(len(y), dtype))


@given(shape=shapes, seed=seeds)
def test_a_target_that_stands_twice_has_twice_the_gradient(ops, shape, seed):
    logits, targets = draw(seed, shape)
    dy = np.random.default_rng(seed).standard_normal(targets.shape)
    _, saved = forward(ops, "logprob", logits, np.hstack([targets, targets]))
    (twice,) = backward(ops, "logprob", np.hstack([dy, dy]), saved)
    _, saved = forward(ops, "logprob", logits, targets)
    (once,) = backward(ops, "logprob", dy, saved)
    assert largest(twice - 2 * once) <= TOLERANCE[np.dtype(np.float64)] * largest(dy)


@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_a_gradient_moves_no_mass_into_or_out_of_a_row(ops, shape, dtype, seed):
    logits, targets = draw(seed, shape)
    dy = np.random.default_rng(seed).standard_normal(targets.shape).astype(dtype)
    _, saved = forward(ops, "logprob", logits.astype(dtype), targets)
    (dlogits,) = backward(ops, "logprob", dy, saved)
    assert largest(dlogits.sum(-1)) <= TOLERANCE[dlogits.dtype] * np.abs(dy).sum()


@given(shape=shapes, seed=seeds)
def test_a_row_alone_equals_the_row_in_a_batch(ops, shape, seed):
    logits, targets = draw(seed, shape)
    y, _ = forward(ops, "logprob", logits, targets)
    for row in range(len(logits)):
        alone = slice(row, row + 1)
        check_close(forward(ops, "logprob", logits[alone], targets[alone])[0], y[alone])


def test_extreme_logits_give_finite_numbers_and_no_warning(ops):  # pytest turns a warning into an error
    logits = np.array([[1e4, -1e4, 0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]], np.float32)
    everything = np.tile(np.arange(3), (3, 1))
    y, saved = forward(ops, "logprob", logits, everything)
    (dlogits,) = backward(ops, "logprob", np.ones_like(y), saved)
    half, third = np.log(1 / 2), np.log(1 / 3)
    expected = np.array([[0, -2e4, -1e4], [half, half, half - 2e4], [third] * 3], np.float32)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=0)
    np.testing.assert_allclose(dlogits, [[-2, 1, 1], [-0.5, -0.5, 1], [0] * 3], rtol=0, atol=1e-6)
