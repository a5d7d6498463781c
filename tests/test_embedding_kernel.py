"""What holds of the Triton op beyond the laws of test_embedding.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import in_each_dtype, in_float64_too, rounded, seeds
from poisoned import poisoned

from minitinker import kernels, reference

widths = st.sampled_from([1, 3, 127, 1023, 1024, 1025, 2053])  # around the tile of 1024


def draw(seed, tokens, d, dtype, vocab=11):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab, tokens), rounded(rng.standard_normal((vocab, d)), dtype)


@in_float64_too
@settings(max_examples=12)
@given(tokens=st.integers(0, 4), d=widths, seed=seeds)
def test_the_kernel_gives_the_bits_of_the_reference(dtype, tokens, d, seed):
    ids, w = draw(seed, tokens, d, dtype)
    with poisoned():
        x = kernels.embedding(kernels.array(ids), kernels.array(w, dtype))
    np.testing.assert_array_equal(kernels.to_numpy(x), reference.embedding(ids, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_pattern_of_bits_goes_through_as_it_is(dtype):
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    limits = torch.iinfo(bits)
    patterns = torch.randint(limits.min, limits.max, (9, 515), dtype=bits).to(kernels.zeros((1,)).device)
    ids = kernels.array(np.array([8, 0, 3]))
    x = kernels.embedding(ids, patterns.view(dtype))
    assert x.dtype == dtype
    assert torch.equal(x.view(bits), patterns[ids])


@in_each_dtype
@settings(max_examples=10)
@given(seed=seeds)
def test_tokens_and_table_may_be_strided(dtype, seed):
    ids, w = draw(seed, 6, 10, dtype)
    x = kernels.embedding(kernels.array(ids)[::2], kernels.array(w, dtype)[:, 1::2])
    np.testing.assert_array_equal(kernels.to_numpy(x), w[ids[::2], 1::2])
    x = kernels.embedding(kernels.array(ids), kernels.array(w.T.copy(), dtype).T)
    np.testing.assert_array_equal(kernels.to_numpy(x), w[ids])
