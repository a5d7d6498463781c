"""What holds of the Triton op beyond the laws of test_rms_norm.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import backward, check_close, check_equals_reference, forward, in_each_dtype, seeds
from poisoned import poisoned
from test_rms_norm import torch_rms_norm

from minitinker import kernels

few = settings(max_examples=20)
leading = st.one_of(st.tuples(st.integers(0, 5)), st.tuples(st.integers(0, 4), st.integers(1, 3)))
widths = st.sampled_from([1, 2, 37, 64, 127, 128, 129, 1024, 2049])  # of tiles of many rows, of two, of one


def draw(seed, shape):
    """x and w, float32."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape[-1], np.float32)


def answers(x, w, dy, dtype="float32"):
    """y and dx."""
    y, saved = forward(kernels, "rms_norm", x, w, 1e-6, dtype=dtype)
    return y, *backward(kernels, "rms_norm", dy, saved, dtype)


@in_each_dtype
@few
@given(leading=leading, d=widths, size=st.sampled_from([1e-40, 1e-20, 1.0, 1e17]), seed=seeds)
def test_the_kernel_equals_the_reference(dtype, leading, d, size, seed):
    x, w = draw(seed, (*leading, d))
    arrays = [x * np.float32(size), w]
    check_equals_reference("rms_norm", dtype, torch_rms_norm(1e-6), arrays, [1e-6], seed=seed)


@in_each_dtype
@few
@given(rows=st.integers(1, 40), d=widths, seed=seeds)
def test_a_row_has_the_same_bits_alone_and_anywhere_in_a_batch(dtype, rows, d, seed):
    (x, w), (dy, _) = draw(seed, (rows, d)), draw(seed + 1, (rows, d))
    together = answers(x, w, dy, dtype)
    order = np.random.default_rng(seed).permutation(rows)
    for part in (slice(0, 1), slice(rows // 2, rows // 2 + 1), slice(rows // 3, None), order):
        for apart, whole in zip(answers(x[part], w, dy[part], dtype), together, strict=True):
            np.testing.assert_array_equal(apart, whole[part])


@in_each_dtype
@few
@given(rows=st.integers(1, 5), heads=st.integers(1, 4), d=st.integers(1, 20), seed=seeds)
def test_arrays_may_be_of_any_strides(dtype, rows, heads, d, seed):
    x, w = draw(seed, (heads, d, rows))
    x, w = kernels.array(x, dtype).permute(2, 0, 1), kernels.array(np.repeat(w[:1], 2 * d), dtype)[::2]
    y, saved = kernels.rms_norm_forward(x, w, 1e-6)
    dx = kernels.rms_norm_backward(x, saved)
    for actual, expected in zip((y, dx), answers(*map(kernels.to_numpy, (x, w, x)), dtype), strict=True):
        np.testing.assert_array_equal(kernels.to_numpy(actual), expected)


@in_each_dtype
@few
@given(rows=st.integers(1, 40), d=widths, seed=seeds)
def test_every_number_is_written(dtype, rows, d, seed):
    x, w = draw(seed, (rows, d))
    expected = answers(x, w, x + 1, dtype)
    with poisoned():
        actual = answers(x, w, x + 1, dtype)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_a_row_holds_does_not_reach_the_next():
    x, w = draw(0, (3, 8))
    spoiled = x.copy()
    spoiled[1] = np.nan
    for actual, expected in zip(answers(spoiled, w, spoiled), answers(x, w, x), strict=True):
        np.testing.assert_array_equal(actual[[0, 2]], expected[[0, 2]])
        assert np.isnan(actual[1]).all()


def test_the_widest_row_is_exact_and_a_wider_one_refused():
    x, w = draw(0, (1, 16_384))
    check_close(
        forward(kernels, "rms_norm", x, w, 1e-6)[0], w * x / np.sqrt((x**2).mean() + np.float32(1e-6))
    )
    with pytest.raises(ValueError, match="rows of 16385 numbers; rms_norm takes at most 16384"):
        kernels.rms_norm_forward(torch.zeros(1, 16_385), torch.zeros(16_385), 1e-6)
