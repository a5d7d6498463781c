import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    backward,
    check_against_torch,
    check_central_differences,
    check_close,
    every_backend,
    forward,
    seeds,
)

pytestmark = every_backend

# (tokens, d) is the norm of a layer, (tokens, heads, head_dim) that of Qwen3's queries and keys
leading = st.one_of(st.tuples(st.integers(1, 6)), st.tuples(st.integers(1, 4), st.integers(1, 3)))
widths = st.integers(2, 40)  # the gradient of one number alone is a difference of equals
epsilons = st.sampled_from([1e-6, 1e-5, 0.1])


def draw(seed, leading, d):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*leading, d)), rng.standard_normal(d)


def torch_rms_norm(eps):
    def rms_norm(x, w):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w

    return rms_norm


@given(leading=leading, d=st.integers(1, 9), eps=epsilons, seed=seeds)
def test_the_backward_is_the_slope_of_the_forward(ops, leading, d, eps, seed):
    x, w = draw(seed, leading, d)
    x += np.sign(x)  # away from 0, where a row of one number bends faster than differences can follow
    check_central_differences(ops, "rms_norm", [x, w], [eps], seed=seed)


@given(leading=leading, d=widths, eps=epsilons, seed=seeds)
def test_output_and_gradient_are_those_of_torch(ops, leading, d, eps, seed):
    arrays = draw(seed, leading, d)
    check_against_torch(ops, "rms_norm", torch_rms_norm(eps), arrays, [eps], seed=seed)


@settings(max_examples=5)
@given(seed=seeds)
def test_float32_is_as_exact_as_torch(ops, seed):
    arrays = draw(seed, (64,), 96)
    check_against_torch(ops, "rms_norm", torch_rms_norm(1e-6), arrays, [1e-6], seed=seed, many=True)


@given(leading=leading, d=widths, seed=seeds)
def test_a_row_has_mean_square_one_before_the_weight(ops, leading, d, seed):
    x, w = draw(seed, leading, d)
    y, _ = forward(ops, "rms_norm", x, w, 0.0)
    check_close(((y / w) ** 2).mean(-1), np.ones(leading))


@given(rows=st.integers(2, 6), d=widths, seed=seeds)
def test_a_row_alone_equals_the_row_in_a_batch(ops, rows, d, seed):
    x, w = (array.astype(np.float32) for array in draw(seed, (rows,), d))
    y, saved = forward(ops, "rms_norm", x, w, 1e-6)
    (dx,) = backward(ops, "rms_norm", x + 1, saved)
    for row in range(rows):
        alone = slice(row, row + 1)
        y_alone, saved = forward(ops, "rms_norm", x[alone], w, 1e-6)
        check_close(y_alone, y[alone])
        check_close(backward(ops, "rms_norm", x[alone] + 1, saved)[0], dx[alone])


def test_a_row_of_zeros_stays_zero_and_passes_a_finite_gradient(ops):
    x, w = np.zeros((2, 4), np.float32), np.full(4, 2, np.float32)
    y, saved = forward(ops, "rms_norm", x, w, 1e-6)
    (dx,) = backward(ops, "rms_norm", np.ones_like(x), saved)
    assert (y == 0).all()
    check_close(dx, np.full((2, 4), 2 / np.sqrt(1e-6), np.float32))
