"""What holds of the Triton op beyond the laws of test_rope.py."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import backward, check_equals_reference, forward, in_each_dtype, on, seeds
from poisoned import poisoned
from test_rope import table, torch_rope

from minitinker import kernels, reference

few = settings(max_examples=20)
tokens = st.integers(0, 9)
heads = st.sampled_from([1, 2, 3, 7, 8, 17])
head_dims = st.sampled_from([2, 6, 20, 64, 80, 128, 256])


def draw(seed, tokens, heads, head_dim):
    """x, cos and sin, float32."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-np.pi, np.pi, (tokens, head_dim // 2))
    x = rng.standard_normal((tokens, heads, head_dim), np.float32)
    return x, *(part.astype(np.float32) for part in table(angles))


def answers(x, cos, sin, dtype="float32"):
    """y, and dx for dy = x."""
    y, saved = forward(kernels, "rope", x, cos, sin, dtype=dtype)
    return y, *backward(kernels, "rope", x, saved, dtype)


@in_each_dtype
@few
@given(tokens=tokens, heads=heads, head_dim=head_dims, size=st.sampled_from([1e-40, 1.0, 1e37]), seed=seeds)
def test_the_kernel_equals_the_reference(dtype, tokens, heads, head_dim, size, seed):
    x, cos, sin = draw(seed, tokens, heads, head_dim)
    check_equals_reference("rope", dtype, torch_rope, [x * np.float32(size), cos, sin], seed=seed)


@few
@given(positions=st.lists(st.integers(0, 10**6), max_size=20), head_dim=head_dims, seed=seeds)
def test_the_table_equals_the_reference_to_the_last_bits(positions, head_dim, seed):
    frequencies = np.random.default_rng(seed).uniform(1e-6, 1, head_dim // 2)
    inputs = np.array(positions, np.int64), frequencies
    actual = [kernels.to_numpy(x) for x in kernels.rope_table(*on(kernels, inputs))]
    for ours, theirs in zip(actual, reference.rope_table(*inputs), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=np.finfo(np.float32).eps)


@few
@given(positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=40), head_dim=head_dims)
def test_a_position_has_the_same_turn_in_any_table(positions, head_dim):
    frequencies = kernels.array(10_000.0 ** -np.linspace(0, 1, head_dim // 2))
    tables = kernels.rope_table(kernels.array(np.array(positions)), frequencies)
    alone = kernels.rope_table(kernels.array(np.array(positions[-1:])), frequencies)
    for together, apart in zip(tables, alone, strict=True):
        np.testing.assert_array_equal(kernels.to_numpy(together)[-1:], kernels.to_numpy(apart))


@in_each_dtype
@few
@given(tokens=st.integers(1, 9), heads=heads, head_dim=head_dims, seed=seeds)
def test_a_head_has_the_same_bits_alone_and_anywhere_in_a_batch(dtype, tokens, heads, head_dim, seed):
    x, cos, sin = draw(seed, tokens, heads, head_dim)
    together = answers(x, cos, sin, dtype)
    order = np.random.default_rng(seed).permutation(tokens)
    for part in (slice(0, 1), slice(tokens // 2, None), order):
        for head in (slice(None), slice(heads - 1, heads)):
            apart = answers(x[part][:, head], cos[part], sin[part], dtype)
            for one, whole in zip(apart, together, strict=True):
                np.testing.assert_array_equal(one, whole[part][:, head])


@in_each_dtype
@few
@given(tokens=st.integers(1, 5), heads=heads, head_dim=st.sampled_from([2, 6, 20]), seed=seeds)
def test_arrays_may_be_of_any_strides(dtype, tokens, heads, head_dim, seed):
    x, cos, sin = on(kernels, draw(seed, tokens, heads, head_dim), dtype, wide=(1, 2))
    expected = answers(*map(kernels.to_numpy, (x, cos, sin)), dtype)
    x, cos, sin = (array.mT.contiguous().mT for array in (x, cos, sin))
    y, saved = kernels.rope_forward(x, cos, sin)
    for actual, whole in zip((y, kernels.rope_backward(x, saved)), expected, strict=True):
        np.testing.assert_array_equal(kernels.to_numpy(actual), whole)


@in_each_dtype
@few
@given(tokens=st.integers(1, 9), heads=heads, head_dim=head_dims, seed=seeds)
def test_every_number_is_written(dtype, tokens, heads, head_dim, seed):
    inputs = draw(seed, tokens, heads, head_dim)
    table = on(kernels, [np.arange(tokens), np.ones(head_dim // 2)])
    expected = *answers(*inputs, dtype), *map(kernels.to_numpy, kernels.rope_table(*table))
    with poisoned():
        actual = *answers(*inputs, dtype), *map(kernels.to_numpy, kernels.rope_table(*table))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)
