"""What holds of the attention kernels only: their bits, and what the memory around the arrays may hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import COMPILED, check_close, in_each_dtype, seeds
from poisoned import poisoned
from test_attention import draw, draw_layout, packed

from minitinker import kernels, reference

TILE = 16  # keys of a tile in float32
LONG = 150 if COMPILED else 40  # more keys than some tiles of the forward have together

few = settings(max_examples=8)  # a program takes the interpreter milliseconds
groups = st.sampled_from([1, 2, 3, 4, 8])
head_dims = st.sampled_from([1, 8, 16, 20, 64, 128])
sequences = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=3)


def plan_of(*places):
    return kernels.attention_plan(*(np.array(x, np.int64) for x in places))


def attend(q, k, v, plan, dtype="float32"):
    """The output for NumPy arrays q, k, v, as a NumPy array, and what the backward needs."""
    o, saved = kernels.attention_forward(*(kernels.array(x, dtype) for x in (q, k, v)), plan, 0.3)
    return kernels.to_numpy(o), saved


def forward_and_backward(q, k, v, plan, dtype="float32"):
    """o, dq, dk, dv where do is the cosine of q."""
    o, saved = attend(q, k, v, plan, dtype)
    gradients = kernels.attention_backward(kernels.array(np.cos(q), dtype), saved)
    return [o, *map(kernels.to_numpy, gradients)]


def check_against_reference(layout, arrays, scale):
    """As check_equals_reference, for an op whose plan is the backend's own."""
    answers = []
    for ops in (kernels, reference):
        o, saved = ops.attention_forward(*map(ops.array, arrays), layout.plan(ops), scale)
        gradients = ops.attention_backward(ops.array(np.cos(arrays[0])), saved)
        answers.append([ops.to_numpy(x) for x in (o, *gradients)])
    for ours, theirs in zip(*answers, strict=True):
        check_close(ours, theirs)


@settings(max_examples=12)
@given(kv_heads=st.integers(1, 2), group=groups, head_dim=head_dims, sequences=sequences, seed=seeds)
def test_heads_of_any_number_and_width_are_those_of_the_reference(kv_heads, group, head_dim, sequences, seed):
    layout = draw_layout(seed, sequences)
    arrays = draw(seed, layout, (kv_heads, group), head_dim, np.float32)
    check_against_reference(layout, arrays, head_dim**-0.5)


@pytest.mark.parametrize("keys", [TILE - 1, TILE, TILE + 1, 2 * TILE + 1, 131])
@pytest.mark.parametrize(("group", "queries"), [(1, 65), (3, 22), (5, 12), (64, 2)])
def test_lengths_around_a_tile_are_those_of_the_reference(keys, group, queries):
    queries = min(keys, queries)
    layout = draw_layout(keys, [(queries, keys - queries), (1, keys - 1), (0, keys)])
    check_against_reference(layout, draw(keys, layout, (1, group), 5, np.float32), 0.5)


@in_each_dtype
@few
@given(
    lengths=st.lists(st.integers(1, LONG), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=groups,
    head_dim=head_dims,
    seed=seeds,
)
def test_decoding_and_prefill_in_chunks_give_the_bits_of_training(
    dtype, lengths, kv_heads, group, head_dim, seed
):
    """Against a cache in which every number that isn't a sequence's is NaN."""
    rng = np.random.default_rng(seed)
    training = packed(lengths)
    q, k, v = draw(seed, training, (kv_heads, group), head_dim, np.float32)
    expected, _ = attend(q, k, v, training.plan(kernels), dtype)

    cached = draw_layout(
        seed, [(n, 3) for n in lengths]
    )  # where sequences are in the cache, with room between
    cache_k, cache_v = np.full((2, cached.kv_tokens, *k.shape[1:]), np.nan, np.float32)
    done = np.zeros_like(training.q_lengths)
    while (done < training.q_lengths).any():
        fed = np.minimum(rng.choice([0, 1, 1, 1, 5, TILE + 1, LONG], len(lengths)), training.q_lengths - done)
        rows = [
            start + np.arange(first, first + n)
            for start, first, n in zip(training.q_starts, done, fed, strict=True)
        ]
        for own, start, first in zip(rows, cached.k_starts, done, strict=True):
            into = start + first + np.arange(len(own))
            cache_k[into], cache_v[into] = k[own], v[own]
        done += fed
        places = [np.cumsum(fed) - fed, fed, cached.k_starts, done]
        o, _ = attend(q[np.concatenate(rows)], cache_k, cache_v, plan_of(*places), dtype)
        np.testing.assert_array_equal(o, expected[np.concatenate(rows)])


@in_each_dtype
@few
@given(sequences=sequences, group=groups, seed=seeds)
def test_a_sequence_has_the_same_bits_alone_and_anywhere_in_a_batch(dtype, sequences, group, seed):
    layout = draw_layout(seed, sequences)
    q, k, v = draw(seed, layout, (2, group), 8, np.float32)
    o, dq, dk, dv = forward_and_backward(q, k, v, layout.plan(kernels), dtype)
    for (rows, keys), (queries, before) in zip(layout.sequences(), sequences, strict=True):
        plan = plan_of([0], [queries], [0], [queries + before])
        alone = forward_and_backward(q[rows], k[keys], v[keys], plan, dtype)
        for ours_alone, ours in zip(alone, (o[rows], dq[rows], dk[keys], dv[keys]), strict=True):
            np.testing.assert_array_equal(ours_alone, ours)


@in_each_dtype
@few
@given(sequences=sequences, seed=seeds)
def test_what_stands_in_rows_of_no_sequence_changes_nothing(dtype, sequences, seed):
    layout = draw_layout(seed, sequences)
    q, k, v = draw(seed, layout, (1, 3), 8, np.float32)
    expected = forward_and_backward(q, k, v, layout.plan(kernels), dtype)
    no_query, no_key = np.ones(layout.tokens, bool), np.ones(layout.kv_tokens, bool)
    for (rows, keys), (queries, _) in zip(layout.sequences(), sequences, strict=True):
        no_query[rows], no_key[keys] = False, queries == 0
    q[no_query] = k[no_key] = v[no_key] = np.nan
    answers = forward_and_backward(q, k, v, layout.plan(kernels), dtype)
    for ours, theirs in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@in_each_dtype
@few
@given(sequences=sequences, in_order=st.booleans(), head_dim=st.sampled_from([5, 16]), seed=seeds)
def test_every_number_of_an_answer_is_written(dtype, sequences, in_order, head_dim, seed):
    layout = packed([n for n, _ in sequences]) if in_order else draw_layout(seed, sequences)
    arrays = draw(seed, layout, (2, 3), head_dim, np.float32)
    expected = forward_and_backward(*arrays, layout.plan(kernels), dtype)
    with poisoned():
        answers = forward_and_backward(*arrays, layout.plan(kernels), dtype)
    for ours, theirs in zip(answers, expected, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)


@in_each_dtype
def test_arrays_that_are_not_contiguous_give_the_same_bits(dtype):
    layout = packed([5, 20])
    arrays = draw(0, layout, (2, 3), 8, np.float32)
    arrays.append(np.cos(arrays[0]))
    answers = []
    for turned in (False, True):
        q, k, v, do = (
            kernels.array(x.swapaxes(0, 1), dtype).transpose(0, 1) if turned else kernels.array(x, dtype)
            for x in arrays
        )
        assert q.is_contiguous() != turned
        o, saved = kernels.attention_forward(q, k, v, layout.plan(kernels), 0.3)
        answers.append([kernels.to_numpy(x) for x in (o, *kernels.attention_backward(do, saved))])
    for ours, theirs in zip(*answers, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_huge_scores_choose_the_largest():
    layout = packed([40])
    q, k, v = draw(0, layout, (1, 2), 8, np.float32)
    q, k, v = 1e15 * q, 1e15 * k, 1e30 * v
    expected, _ = reference.attention_forward(q, k, v, layout.plan(reference), 0.3)
    o, _ = attend(q, k, v, layout.plan(kernels))
    check_close(o / np.float32(1e30), expected / np.float32(1e30))


def test_subnormal_values_are_kept():
    layout = packed([40])
    _, k, v = draw(0, layout, (1, 1), 8, np.float32)
    v = 1e-40 * (1 + np.abs(v))
    o, _ = attend(np.zeros_like(k), k, v, layout.plan(kernels))
    means = np.cumsum(v, axis=0, dtype=np.float64) / np.arange(1, 41)[:, None, None]
    np.testing.assert_allclose(o, means, rtol=1e-3)


def test_more_heads_of_a_group_than_a_tile_has_rows_are_refused():
    layout = packed([2])
    q, k, v = draw(0, layout, (1, 65), 2, np.float32)
    with pytest.raises(ValueError, match="65 heads share their keys; at most 64 can"):
        attend(q, k, v, layout.plan(kernels))


def test_a_plan_goes_to_the_device_once_for_all_layers(monkeypatch):
    sent = []
    monkeypatch.setattr(kernels.attention, "array", lambda x, **to: sent.append(x) or kernels.array(x, **to))
    layout = packed([5, 3])
    arrays, plan = draw(0, layout, (1, 2), 8, np.float32), layout.plan(kernels)
    arrays = [kernels.array(x) for x in arrays]
    layers = [kernels.attention_forward(*arrays, plan, 0.3) for _ in range(3)]
    assert len(sent) == 1
    for o, saved in layers:
        kernels.attention_backward(o, saved)
    assert len(sent) == 2  # tiles of queries, tiles of keys
