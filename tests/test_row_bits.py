"""The reference's bits: what a row gives does not depend on what else is in the batch, with the OpenBLAS that
NumPy's wheels bring and the instructions that products.py and `attention` follow. Elsewhere these laws hold up to
rounding, which the other tests check."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from minitinker.reference import on_one_core
from minitinker.reference.products import instructions
from op_checks import seeds

from minitinker import reference

OPENBLAS = instructions() != ""
ROUNDING = 0 if OPENBLAS else 1e-5  # what rows may differ by from the same ones among others
pytestmark = pytest.mark.skipif(not OPENBLAS, reason="BLAS is not OpenBLAS with AVX-512 or AVX2")


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def by_rows(rng, *shape):
    """A matrix or several whose transpose lies row by row, as weights do in sampling."""
    *more, d_out, d_in = shape
    return normal(rng, *more, d_in, d_out).swapaxes(-1, -2)


@given(
    tokens=st.sampled_from([1, 2, 5, 17, 33, 64, 200, 300]),
    d_in=st.sampled_from([8, 32, 33, 128, 256, 384, 450, 768, 1000, 1024, 2048]),
    parts=st.lists(st.sampled_from([2, 7, 16, 20, 64, 264, 384, 513, 1024]), min_size=1, max_size=3),
    rank=st.sampled_from([16, 32, 48, 304]),
    adapters=st.integers(1, 5),
    alone=st.booleans(),
    seed=seeds,
)
def test_a_row_of_lora_linear_has_its_bits_among_any_others(tokens, d_in, parts, rank, adapters, alone, seed):
    rng, d_out, linears = np.random.default_rng(seed), sum(parts), len(parts)
    x, w = normal(rng, tokens, d_in), by_rows(rng, d_out, d_in)
    scale = rng.standard_normal(adapters)  # not of the dtype of x
    a, b = by_rows(rng, adapters, linears * rank, d_in), by_rows(rng, adapters, d_out, rank)
    adapter = np.zeros(tokens, np.int64) if alone else rng.integers(-1, adapters, tokens)
    with on_one_core():
        y, _ = reference.lora_linear_forward(x, w, None, a, b, scale, adapter, True, parts)
        some = rng.permutation(tokens)[: rng.integers(1, tokens + 1)]
        order = rng.permutation(adapters)  # the adapters stand elsewhere
        fill = (0, 16 * rng.integers(0, 12))  # as beside an adapter of a higher rank
        of_each = a.reshape(adapters, linears, rank, d_in)
        a = np.pad(of_each, ((0, 0), (0, 0), fill, (0, 0))).reshape(adapters, -1, d_in)
        b = np.pad(b, ((0, 0), (0, 0), fill))
        a, b = (np.ascontiguousarray(m[order].swapaxes(-1, -2)).swapaxes(-1, -2) for m in (a, b))
        place = np.append(np.argsort(order), -1)  # that of -1 is -1
        inputs = None, a, b, scale[order], place[adapter[some]]
        for weight in (w, reference.lora_panels(w)):
            again, _ = reference.lora_linear_forward(x[some], weight, *inputs, True, parts)
            np.testing.assert_array_equal(again, y[some])
    on_all_cores, _ = reference.lora_linear_forward(x[some], w, *inputs, True, parts)
    np.testing.assert_array_equal(on_all_cores, y[some])


@given(
    lengths=st.lists(st.integers(1, 90) | st.integers(200, 600), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8, 16, 20, 32, 64, 128]),
    seed=seeds,
)
def test_a_query_has_its_bits_in_training_in_any_chunk_of_a_prompt_and_in_decoding(
    lengths, kv_heads, group, head_dim, seed
):
    rng, lengths = np.random.default_rng(seed), np.array(lengths)
    starts, tokens = np.cumsum(lengths) - lengths, lengths.sum()
    q, k, v = (normal(rng, tokens, heads, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads))
    plan = reference.attention_plan(starts, lengths, starts, lengths, exact=True)
    whole, _ = reference.attention_forward(q, k, v, plan, head_dim**-0.5)
    some = rng.permutation(len(lengths))[: rng.integers(1, len(lengths) + 1)]
    decoding = rng.integers(0, 2, len(some)).astype(bool)
    first = np.where(decoding, lengths[some] - 1, rng.integers(0, lengths[some]))
    rows = np.concatenate(
        [np.arange(starts[i] + n, starts[i] + lengths[i]) for i, n in zip(some, first, strict=True)]
    )
    queries = lengths[some] - first
    places = np.cumsum(queries) - queries, queries, starts[some], lengths[some]
    plan = reference.attention_plan(*places, exact=True)
    again, _ = reference.attention_forward(q[rows], k, v, plan, head_dim**-0.5)
    np.testing.assert_array_equal(again, whole[rows])


@given(
    tokens=st.integers(2, 70), d=st.sampled_from([4, 20, 32, 128, 1000]), heads=st.integers(1, 4), seed=seeds
)
def test_a_row_of_the_other_ops_has_its_bits_among_any_others(tokens, d, heads, seed):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, tokens, heads, d), normal(rng, d)
    some = rng.permutation(tokens)[: rng.integers(1, tokens + 1)]
    z, targets = 3 * x[:, 0], rng.integers(0, d, (tokens, 2))
    options = [
        rng.random(tokens),
        rng.choice([0, 0.5, 1], tokens),
        rng.choice([-1, 3], tokens),
        rng.choice([1, 0.7], tokens),
    ]
    for op, *given_inputs in (
        (lambda x: reference.rms_norm_forward(x, w, 1e-6)[0], x),
        (lambda z: reference.rms_norm_forward(z, w, 1e-6)[0], z),
        (lambda x, z: reference.swiglu_forward(x, z)[0], x[:, 0], z),
        (lambda z, targets: reference.logprob_forward(z, targets)[0], z, targets),
        (lambda *inputs: reference.sample(*inputs)[0], z, *options),
        (lambda *inputs: reference.sample(*inputs)[1], z, *options),
    ):
        np.testing.assert_array_equal(op(*(i[some] for i in given_inputs)), op(*given_inputs)[some])
