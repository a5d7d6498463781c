import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    backward,
    check_against_torch,
    check_central_differences,
    every_backend,
    forward,
    seeds,
)

pytestmark = every_backend

shapes = st.tuples(st.integers(1, 8), st.integers(1, 20))
spreads = st.sampled_from([0.1, 1.0, 10.0])


def torch_swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


def draw(seed, shape, spread):
    rng = np.random.default_rng(seed)
    return spread * rng.standard_normal(shape), spread * rng.standard_normal(shape)


@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 6)), spread=spreads, seed=seeds)
def test_the_backward_is_the_slope_of_the_forward(ops, shape, spread, seed):
    check_central_differences(ops, "swiglu", draw(seed, shape, spread), differentiated=(0, 1), seed=seed)


@given(shape=shapes, spread=spreads, seed=seeds)
def test_output_and_gradients_are_those_of_torch(ops, shape, spread, seed):
    arrays = draw(seed, shape, spread)
    check_against_torch(ops, "swiglu", torch_swiglu, arrays, differentiated=(0, 1), seed=seed)


@settings(max_examples=5)
@given(spread=spreads, seed=seeds)
def test_float32_is_as_exact_as_torch(ops, spread, seed):
    arrays = draw(seed, (64, 96), spread)
    check_against_torch(ops, "swiglu", torch_swiglu, arrays, differentiated=(0, 1), seed=seed, many=True)


def test_extreme_gates_give_finite_numbers_and_no_warning(ops):  # pytest turns a warning into an error
    extremes = [-1e4, -1e3, -104, -88, -20, 0, 20, 88, 104, 1e3, 1e4]
    gate, up = (x.astype(np.float32) for x in np.meshgrid(extremes, extremes))
    y, saved = forward(ops, "swiglu", gate, up)
    gradients = backward(ops, "swiglu", np.ones_like(y), saved)
    gate64, up64 = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (gate, up))
    exact = torch_swiglu(gate64, up64)
    expected = [exact, *torch.autograd.grad(exact.sum(), [gate64, up64])]
    for ours, theirs in zip([y, *gradients], expected, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6, atol=1e-37)


def test_a_closed_gate_lets_nothing_through(ops):
    up = np.array([[1.0, -3.0]], np.float32)
    y, saved = forward(ops, "swiglu", np.zeros_like(up), up)
    dgate, dup = backward(ops, "swiglu", np.ones_like(up), saved)
    np.testing.assert_array_equal(y, np.zeros_like(up))
    np.testing.assert_array_equal(dgate, up / 2)
    np.testing.assert_array_equal(dup, np.zeros_like(up))
