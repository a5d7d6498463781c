"""lora_linear in Triton: the reference's numbers, and bits of a row that depend on that row alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from op_checks import (
    WIDE,
    backward,
    check_close,
    check_equals_reference,
    forward,
    in_each_dtype,
    on,
    seeds,
)
from poisoned import poisoned
from test_lora_linear import OP, draw, draw_adapter, torch_lora

from minitinker import kernels

lengths = st.sampled_from([1, 7, 31, 33, 64, 65, 97])  # of d_in, d_out: odd, prime, a tile, just over a tile
ranks = st.sampled_from([1, 3, 16, 17, 32, 65, 128, 130])
rows = st.sampled_from([1, 2, 63, 65, 129, 140])
few_examples = settings(max_examples=4)


def mixed(seed, tokens=140, d_in=33, d_out=65, rank=5, adapters=3):
    """Inputs with an adapter for each row, and dy; more rows than a row tile for few of them has."""
    arrays = [x.astype(np.float32) for x in draw(seed, tokens, d_in, d_out, rank, True, adapters)]
    dy = np.random.default_rng(seed + 1).standard_normal((tokens, d_out), np.float32)
    return [*arrays, draw_adapter(seed, tokens, adapters)], dy


def answers(inputs, dy, dtype="float32"):
    """y, dx, da, db as NumPy arrays."""
    y, saved = forward(kernels, OP, *inputs, dtype=dtype)
    return y, *backward(kernels, OP, dy, saved, dtype)


def some_rows(inputs, dy, chosen, dtype="float32"):
    x, *weights, adapter = inputs
    return answers([x[chosen], *weights, adapter[chosen]], dy[chosen], dtype)


@in_each_dtype
@settings(max_examples=20)
@given(tokens=rows, d_in=lengths, d_out=lengths, rank=ranks, bias=st.booleans(), seed=seeds)
def test_it_equals_the_reference(dtype, tokens, d_in, d_out, rank, bias, seed):
    check_lora_equals_reference(dtype, draw(seed, tokens, d_in, d_out, rank, bias), None, seed)


@in_each_dtype
@few_examples
@given(tokens=rows, d_in=lengths, d_out=lengths, rank=ranks, adapters=st.integers(2, 4), seed=seeds)
def test_it_equals_the_reference_for_many_adapters(dtype, tokens, d_in, d_out, rank, adapters, seed):
    arrays = draw(seed, tokens, d_in, d_out, rank, True, adapters)
    check_lora_equals_reference(dtype, arrays, draw_adapter(seed, tokens, adapters), seed)


def check_lora_equals_reference(dtype, arrays, adapter, seed):
    check_equals_reference(
        OP, dtype, torch_lora(adapter), scaled_down(arrays), [adapter], differentiated=(0, 3, 4), seed=seed
    )


def scaled_down(arrays):
    """Weights of a layer: rows and columns of length about 1, so that every product is about 1."""
    x, w, bias, a, b, scale = arrays
    return [x, w / np.sqrt(w.shape[1]), bias, a / np.sqrt(a.shape[2]), b / np.sqrt(b.shape[2]), scale]


@in_each_dtype
@few_examples
@given(seed=seeds, chosen=st.lists(st.integers(0, 139), min_size=1, max_size=139))
def test_a_row_has_the_same_bits_at_any_place_of_any_batch(dtype, seed, chosen):
    inputs, dy = mixed(seed)
    y, dx, *_ = answers(inputs, dy, dtype)
    y_some, dx_some, *_ = some_rows(inputs, dy, np.array(chosen), dtype)
    assert_array_equal(y_some, y[chosen])
    assert_array_equal(dx_some, dx[chosen])


@in_each_dtype
@settings(max_examples=2)
@given(seed=seeds)
def test_a_row_among_many_adapters_has_the_bits_of_that_row_alone_with_its_own(dtype, seed):
    (x, w, bias, a, b, scale, adapter), dy = mixed(seed)
    y, dx, *_ = answers([x, w, bias, a, b, scale, adapter], dy, dtype)
    for row in range(0, 140, 7):
        i, alone = adapter[row], slice(row, row + 1)
        own = [a[i : i + 1], b[i : i + 1], scale[i : i + 1]] if i >= 0 else [None, None, None]
        y_alone, dx_alone, *_ = answers([x[alone], w, bias, *own, None], dy[alone], dtype)
        assert_array_equal(y_alone, y[alone])
        assert_array_equal(dx_alone, dx[alone])


@in_each_dtype
@few_examples
@given(rank=st.integers(1, 60), more=st.integers(1, 90), tokens=st.sampled_from([3, 140]), seed=seeds)
def test_a_rank_padded_with_zeros_changes_no_bit(dtype, rank, more, tokens, seed):
    (x, w, bias, a, b, scale, adapter), dy = mixed(seed, tokens=tokens, rank=rank)
    a_padded = np.concatenate([a, np.zeros((len(a), more, a.shape[2]), a.dtype)], axis=1)
    b_padded = np.concatenate([b, np.zeros((len(b), b.shape[1], more), b.dtype)], axis=2)
    y, dx, da, db = answers([x, w, bias, a, b, scale, adapter], dy, dtype)
    padded = answers([x, w, bias, a_padded, b_padded, scale, adapter], dy, dtype)
    for answer, other in zip(
        (y, dx, da, db), (*padded[:2], padded[2][:, :rank], padded[3][..., :rank]), strict=True
    ):
        assert_array_equal(other, answer)


@in_each_dtype
@few_examples
@given(seed=seeds)
def test_what_is_not_finite_in_one_adapter_or_its_rows_stays_out_of_all_others(dtype, seed):
    inputs, dy = mixed(seed)
    y, dx, da, db = answers(inputs, dy, dtype)
    x, _, _, a, b, _, adapter = inputs
    other = adapter != 1
    a[1, 0, 0] = b[1, 0, 0] = np.inf
    x[~other], dy[~other] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        y_broken, dx_broken, da_broken, db_broken = answers(inputs, dy, dtype)
    assert_array_equal(y_broken[other], y[other])
    assert_array_equal(dx_broken[other], dx[other])
    assert_array_equal(da_broken[[0, 2]], da[[0, 2]])
    assert_array_equal(db_broken[[0, 2]], db[[0, 2]])


@in_each_dtype
@few_examples
@given(seed=seeds, cut=st.integers(0, 140))
def test_the_gradients_of_two_batches_add_up(dtype, seed, cut):
    inputs, dy = mixed(seed)
    _, _, da, db = answers(inputs, dy, dtype)
    first, second = (some_rows(inputs, dy, part, dtype) for part in (slice(cut), slice(cut, None)))
    check_close(first[2] + second[2], da)
    check_close(first[3] + second[3], db)


@in_each_dtype
@pytest.mark.parametrize("adapters", [1, 3])
def test_gradients_over_many_chunks_of_tokens_are_those_of_the_reference(dtype, adapters):
    tokens = 2 * kernels.lora_linear._CHUNK + 5
    adapter = draw_adapter(0, tokens, adapters) if adapters > 1 else None
    check_lora_equals_reference(dtype, draw(adapters, tokens, 9, 7, 3, False, adapters), adapter, 0)


@in_each_dtype
@pytest.mark.parametrize("adapters", [1, 3])
def test_the_room_for_partial_sums_changes_no_bit_of_a_gradient(dtype, monkeypatch, adapters):
    inputs, dy = mixed(0, tokens=2 * kernels.lora_linear._CHUNK + 5, d_in=9, d_out=7, adapters=adapters)
    expected = answers(inputs, dy, dtype)
    monkeypatch.setattr(kernels.lora_linear, "_PARTIAL_BYTES", 0)
    for answer, other in zip(expected, answers(inputs, dy, dtype), strict=True):
        assert_array_equal(other, answer)


@in_each_dtype
@pytest.mark.parametrize("indexed", [False, True])
def test_every_element_of_an_output_is_written(dtype, indexed):
    inputs, dy = mixed(0)
    inputs[-1] = inputs[-1] if indexed else None
    expected = answers(inputs, dy, dtype)
    with poisoned():
        actual = answers(inputs, dy, dtype)
    for answer, other in zip(expected, actual, strict=True):
        assert np.isfinite(other).all()
        assert_array_equal(other, answer)


@in_each_dtype
@pytest.mark.parametrize("indexed", [False, True])
def test_no_rows_are_a_batch_too(dtype, indexed):
    inputs, dy = mixed(0, tokens=0)
    y, dx, da, db = answers([*inputs[:-1], inputs[-1] if indexed else None], dy, dtype)
    assert (y.shape, dx.shape) == ((0, 65), (0, 33))
    assert_array_equal(da, np.zeros_like(inputs[3]))
    assert_array_equal(db, np.zeros_like(inputs[4]))


@in_each_dtype
def test_arrays_that_are_not_contiguous_are_the_same_numbers(dtype):
    inputs, dy = mixed(0, tokens=20)
    spread = [spread_out(x) for x in on(kernels, inputs, dtype, WIDE["lora_linear_forward"])]
    y, saved = kernels.lora_linear_forward(*spread)
    gradients = kernels.lora_linear_backward(spread_out(kernels.array(dy, dtype)), saved)
    for answer, other in zip(answers(inputs, dy, dtype), (y, *gradients), strict=True):
        assert_array_equal(kernels.to_numpy(other), answer)


def spread_out(x):
    """The numbers of x, each with a hole behind it, in memory the last axis first."""
    wide = torch.zeros([2 * n for n in reversed(x.shape)], dtype=x.dtype, device=x.device)
    spread = wide[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.ndim)))
    spread.copy_(x)
    assert not spread.is_contiguous()
    return spread


@pytest.mark.parametrize("exponent", [-130, 100])
def test_rows_of_subnormal_and_of_huge_numbers_keep_them(exponent):
    (x, w, _, *adapters), dy = mixed(0, tokens=20)
    y, dx, *_ = answers([x, w, None, *adapters], dy)
    y_sized, *_ = answers([np.ldexp(x, exponent), w, None, *adapters], dy)
    _, dx_sized, *_ = answers([x, w, None, *adapters], np.ldexp(dy, exponent))
    for numbers, sized in ((y, y_sized), (dx, dx_sized)):
        expected = np.ldexp(numbers.astype(np.float64), exponent)
        rounding = 1e3 * 2.0**-149 if exponent < 0 else 0  # of numbers below 2^-126: each loses its last bits
        assert np.abs(sized - expected).max() <= rounding
