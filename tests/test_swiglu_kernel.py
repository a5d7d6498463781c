"""What holds of the Triton op beyond the laws of test_swiglu.py."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import backward, check_equals_reference, forward, in_each_dtype, on, seeds
from poisoned import poisoned
from test_swiglu import torch_swiglu

from minitinker import kernels

few = settings(max_examples=20)
rows = st.integers(0, 9)
widths = st.sampled_from([1, 7, 127, 341, 342, 1024, 1025])  # below, at and over the tile of 1024


def draw(seed, rows, d_ffn):
    """gate, up and dy, float32."""
    return np.random.default_rng(seed).standard_normal((3, rows, d_ffn), np.float32)


def answers(gate, up, dy, dtype="float32"):
    """y, dgate and dup."""
    y, saved = forward(kernels, "swiglu", gate, up, dtype=dtype)
    return y, *backward(kernels, "swiglu", dy, saved, dtype)


@in_each_dtype
@few
@given(rows=rows, d_ffn=widths, size=st.sampled_from([1e-40, 1.0, 100.0, 1e15]), seed=seeds)
def test_the_kernel_equals_the_reference(dtype, rows, d_ffn, size, seed):
    gate, up, _ = draw(seed, rows, d_ffn) * np.float32(size)
    check_equals_reference("swiglu", dtype, torch_swiglu, [gate, up], differentiated=(0, 1), seed=seed)


@in_each_dtype
@few
@given(rows=st.integers(1, 9), d_ffn=widths, seed=seeds)
def test_a_row_has_the_same_bits_alone_and_anywhere_in_a_batch(dtype, rows, d_ffn, seed):
    inputs = draw(seed, rows, d_ffn)
    together = answers(*inputs, dtype)
    order = np.random.default_rng(seed).permutation(rows)
    for part in (slice(0, 1), slice(rows // 2, None), order):
        for apart, whole in zip(answers(*inputs[:, part], dtype), together, strict=True):
            np.testing.assert_array_equal(apart, whole[part])


@in_each_dtype
@few
@given(rows=st.integers(1, 9), d_ffn=st.integers(1, 20), seed=seeds)
def test_arrays_may_be_of_any_strides(dtype, rows, d_ffn, seed):
    inputs = draw(seed, rows, d_ffn)
    gate, up, dy = (array.mT.contiguous().mT for array in on(kernels, inputs, dtype))
    y, saved = kernels.swiglu_forward(gate, up)
    actual = y, *kernels.swiglu_backward(dy, saved)
    for one, other in zip(actual, answers(*inputs, dtype), strict=True):
        np.testing.assert_array_equal(kernels.to_numpy(one), other)


@in_each_dtype
@few
@given(rows=st.integers(1, 9), d_ffn=widths, seed=seeds)
def test_every_number_is_written(dtype, rows, d_ffn, seed):
    inputs = draw(seed, rows, d_ffn)
    expected = answers(*inputs, dtype)
    with poisoned():
        actual = answers(*inputs, dtype)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_nan_stays_where_it_is():
    gate, up, dy = draw(0, 1, 5)
    gate[0, 1], up[0, 3] = np.nan, np.nan
    y, dgate, dup = answers(gate, up, dy)
    np.testing.assert_array_equal(np.isnan(y)[0], [False, True, False, True, False])
    np.testing.assert_array_equal(np.isnan(dgate)[0], [False, True, False, True, False])
    np.testing.assert_array_equal(np.isnan(dup)[0], [False, True, False, False, False])


def test_nothing_but_the_inputs_is_kept_for_the_backward():
    gate, up, _ = on(kernels, draw(0, 3, 5))
    _, saved = kernels.swiglu_forward(gate, up)
    assert saved[0] is gate
    assert saved[1] is up
    assert len(saved) == 2
