from dataclasses import dataclass

import numpy as np
import pytest
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
    law,
    seeds,
)

from minitinker import reference

pytestmark = every_backend

OP = "attention"


@dataclass(frozen=True)
class Layout:
    """Where each sequence has its queries among `tokens` rows and its keys among `kv_tokens` rows."""

    tokens: int
    kv_tokens: int
    q_starts: np.ndarray
    q_lengths: np.ndarray
    k_starts: np.ndarray
    k_lengths: np.ndarray

    @property
    def places(self):
        return [self.q_starts, self.q_lengths, self.k_starts, self.k_lengths]

    def plan(self, ops):
        return ops.attention_plan(*self.places)

    def sequences(self):
        """(rows of q, rows of k and v) of each sequence."""
        for q_start, queries, k_start, keys in zip(*self.places, strict=True):
            yield slice(q_start, q_start + queries), slice(k_start, k_start + keys)


def packed(lengths):
    """Sequences one after the other, with their queries where their keys are: training."""
    lengths = np.array(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    return Layout(lengths.sum(), lengths.sum(), starts, lengths, starts, lengths)


def scattered(rng, queries, keys):
    """Sequences in any order, with rows between them that belong to none; keys elsewhere than queries."""
    places, sizes = [], []
    for lengths in (np.array(queries, np.int64), np.array(keys, np.int64)):
        gaps = rng.integers(0, 3, len(lengths))
        order = rng.permutation(len(lengths))
        starts = np.empty_like(lengths)
        starts[order] = np.cumsum((lengths + gaps)[order]) - lengths[order]
        places += [starts, lengths]
        sizes.append(int((lengths + gaps).sum()) + 1)
    return Layout(*sizes, *places)


# (queries, keys before the first query) of each sequence; both may be none
sequences = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=4)
few_sequences = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=3)
heads = st.tuples(st.integers(1, 3), st.integers(1, 3))  # kv_heads, heads of each
head_dims = st.integers(1, 8)
training = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def draw_layout(seed, sequences):
    queries, keys = [n for n, _ in sequences], [n + before for n, before in sequences]
    return scattered(np.random.default_rng(seed), queries, keys)


def draw(seed, layout, heads, head_dim, dtype=np.float64):
    """q, k, v."""
    rng = np.random.default_rng(seed)
    kv_heads, group = heads
    q = rng.standard_normal((layout.tokens, kv_heads * group, head_dim))
    k, v = rng.standard_normal((2, layout.kv_tokens, kv_heads, head_dim))
    return [x.astype(dtype) for x in (q, k, v)]


def torch_attention(layout, scale):
    """torch's scaled_dot_product_attention of each sequence."""

    def attention(q, k, v):
        o = torch.zeros_like(q)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        for rows, keys in layout.sequences():
            queries = rows.stop - rows.start
            before = keys.stop - keys.start - queries
            sees = torch.ones(queries, queries + before, dtype=torch.bool).tril(before)
            own = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            answer = torch.nn.functional.scaled_dot_product_attention(*own, attn_mask=sees, scale=scale)
            o = torch.cat([o[: rows.start], answer[0].transpose(0, 1), o[rows.stop :]])
        return o

    return attention


def check_layout_against_torch(ops, layout, heads, head_dim, scale, seed, many=False):
    arrays, constants = draw(seed, layout, heads, head_dim), [layout.plan(ops), scale]
    expected, differentiated = torch_attention(layout, scale), (0, 1, 2)
    check_against_torch(ops, OP, expected, arrays, constants, differentiated, seed=seed, many=many)


@law(2, sequences=few_sequences, heads=heads, head_dim=st.integers(1, 3), seed=seeds)
def test_the_backward_is_the_slope_of_the_forward(ops, sequences, heads, head_dim, seed):
    layout = draw_layout(seed, sequences)
    constants = [layout.plan(ops), 0.7]
    arrays = draw(seed, layout, heads, head_dim)
    check_central_differences(ops, OP, arrays, constants, differentiated=(0, 1, 2), seed=seed)


@law(
    6,
    sequences=sequences,
    heads=heads,
    head_dim=head_dims,
    scale=st.sampled_from([0.1, 0.5, 3.0]),
    seed=seeds,
)
def test_output_and_gradients_are_those_of_torch(ops, sequences, heads, head_dim, scale, seed):
    layout = draw_layout(seed, sequences)
    check_layout_against_torch(ops, layout, heads, head_dim, scale, seed)


@pytest.mark.parametrize(
    ("queries", "before"), [(127, 0), (128, 0), (129, 0), (300, 0), (1, 299), (129, 1), (128, 130), (257, 43)]
)
def test_long_sequences_are_those_of_torch(ops, queries, before):
    layout = draw_layout(queries, [(5, 2), (queries, before), (3, 0)])
    check_layout_against_torch(ops, layout, (1, 2), 4, 0.5, seed=0)


@pytest.mark.parametrize("scores", [1, 3000, 1 << 20])
@pytest.mark.parametrize("heads", [(1, 2), (2, 1)])
def test_unequal_sequences_done_together_are_those_of_torch(ops, scores, heads, monkeypatch):
    monkeypatch.setattr(reference.attention, "SCORES", scores)  # a memory bound: how many at once
    unequal = [(n, n % 5) for n in (5, 9, 31, 17, 8, 26, 1, 33, 40)]
    layout = draw_layout(scores, [*unequal, (1, 8), (1, 12), (1, 10)])
    check_layout_against_torch(ops, layout, heads, 4, 0.5, seed=0)


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("scores", [1, 300, 1 << 20])
def test_one_query_of_each_of_many_sequences_is_that_of_a_plan_for_any(ops, scores, group, monkeypatch):
    monkeypatch.setattr(reference.attention, "SCORES", scores)
    layout = draw_layout(0, [(1, n) for n in (5, 9, 31, 17, 8, 8, 26, 0, 33, 40, 31)])
    q, k, v = draw(0, layout, (2, group), 4)
    in_order = np.argsort(layout.q_starts)
    starts, lengths = layout.k_starts[in_order], layout.k_lengths[in_order]
    q = q[layout.q_starts[in_order]]
    places = np.arange(len(q)), np.ones_like(starts), starts, lengths
    expected, _ = forward(ops, OP, q, k, v, ops.attention_plan(*places), 0.3)
    o, saved = forward(ops, OP, q, k, v, ops.decoding_plan(ops.array(starts), ops.array(lengths)), 0.3)
    check_close(o, expected)
    with pytest.raises(ValueError, match="a plan for decoding has no backward"):
        backward(ops, OP, o, saved)


@settings(max_examples=5)
@given(seed=seeds)
def test_float32_is_as_exact_as_torch(ops, seed):
    layout = draw_layout(seed, [(40, 0), (9, 20), (64, 64), (1, 30)])
    check_layout_against_torch(ops, layout, (2, 2), 16, 0.25, seed, many=True)


@law(6, lengths=training, heads=heads, which=st.integers(0, 4), seed=seeds)
def test_packed_sequences_do_not_see_each_other(ops, lengths, heads, which, seed):
    layout = packed(lengths)
    rows = list(layout.sequences())[which % len(lengths)][0]
    arrays = draw(seed, layout, heads, 4)
    others = draw(seed + 1, layout, heads, 4)
    for array, other in zip(arrays, others, strict=True):
        other[rows] = array[rows]
    answers = []
    for inputs in (arrays, others):
        o, saved = forward(ops, OP, *inputs, layout.plan(ops), 0.5)
        answers.append([o, *backward(ops, OP, inputs[0], saved)])
    for answer, answer_among_others in zip(*answers, strict=True):
        np.testing.assert_array_equal(answer[rows], answer_among_others[rows])


@law(6, sequences=sequences, heads=heads, seed=seeds)
def test_a_sequence_alone_equals_the_sequence_in_a_batch(ops, sequences, heads, seed):
    layout = draw_layout(seed, sequences)
    q, k, v = draw(seed, layout, heads, 4)
    do = np.cos(q)
    o, saved = forward(ops, OP, q, k, v, layout.plan(ops), 0.5)
    dq, dk, dv = backward(ops, OP, do, saved)
    start = np.zeros(1, np.int64)
    for (rows, keys), (queries, before) in zip(layout.sequences(), sequences, strict=True):
        places = [start, np.array([queries]), start, np.array([queries + before])]
        o_alone, saved = forward(ops, OP, q[rows], k[keys], v[keys], ops.attention_plan(*places), 0.5)
        alone = (o_alone, *backward(ops, OP, do[rows], saved))
        for ours, ours_alone in zip((o[rows], dq[rows], dk[keys], dv[keys]), alone, strict=True):
            check_close(ours_alone, ours)


@law(6, sequences=sequences, heads=heads, seed=seeds)
def test_rows_of_no_sequence_come_out_as_zeros_and_get_no_gradient(ops, sequences, heads, seed):
    layout = draw_layout(seed, sequences)
    q, k, v = draw(seed, layout, heads, 4)
    o, saved = forward(ops, OP, q, k, v, layout.plan(ops), 0.5)
    dq, dk, dv = backward(ops, OP, np.cos(q), saved)
    no_query, no_key = np.ones(layout.tokens, bool), np.ones(layout.kv_tokens, bool)
    for (rows, keys), (queries, _) in zip(layout.sequences(), sequences, strict=True):
        no_query[rows] = False
        no_key[keys] = queries == 0
    assert no_query.any()
    assert no_key.any()
    for array, rows in [(o, no_query), (dq, no_query), (dk, no_key), (dv, no_key)]:
        assert not array[rows].any()


@law(6, sequences=sequences, heads=heads, bad=st.sampled_from([np.nan, np.inf]), seed=seeds)
def test_what_is_not_finite_stays_in_its_sequence(ops, sequences, heads, bad, seed):
    layout = draw_layout(seed, [*sequences, (2, 1)])
    q, k, v = draw(seed, layout, heads, 4)
    do = np.cos(q)
    o, saved = forward(ops, OP, q, k, v, layout.plan(ops), 0.5)
    expected = (o, *backward(ops, OP, do, saved))
    own_rows, own_keys = np.zeros(layout.tokens, bool), np.zeros(layout.kv_tokens, bool)
    for rows, keys in list(layout.sequences())[:-1]:
        own_rows[rows] = own_keys[keys] = True
    q[~own_rows] = do[~own_rows] = bad  # the last sequence's, and those of none
    k[~own_keys] = v[~own_keys] = bad
    with np.errstate(invalid="ignore"):
        o, saved = forward(ops, OP, q, k, v, layout.plan(ops), 0.5)
        found = (o, *backward(ops, OP, do, saved))
    for ours, alone, own in zip(found, expected, (own_rows, own_rows, own_keys, own_keys), strict=True):
        check_close(ours[own], alone[own])


@law(6, length=st.integers(2, 12), cut=st.integers(1, 11), heads=heads, seed=seeds)
def test_a_future_token_never_changes_an_earlier_output(ops, length, cut, heads, seed):
    cut = min(cut, length - 1)
    layout = packed([length])
    arrays, changed = draw(seed, layout, heads, 4), draw(seed + 1, layout, heads, 4)
    for array, other in zip(arrays, changed, strict=True):
        other *= 1e12  # no finite number that stands for minus infinity can hide these
        other[:cut] = array[:cut]
    o, saved = forward(ops, OP, *arrays, layout.plan(ops), 0.5)
    o_changed, _ = forward(ops, OP, *changed, layout.plan(ops), 0.5)
    np.testing.assert_array_equal(o[:cut], o_changed[:cut])
    do = np.ones_like(o)
    do[cut:] = 0  # and an earlier output sends no gradient to a later token
    for gradient in backward(ops, OP, do, saved):
        assert not gradient[cut:].any()


@law(
    6,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    late=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    heads=heads,
    exact=st.booleans(),
    seed=seeds,
)
def test_decoding_one_query_at_a_time_against_a_cache_equals_prefill(ops, lengths, late, heads, exact, seed):
    whole = packed(lengths)
    q, k, v = draw(seed, whole, heads, 4)
    expected, _ = forward(ops, OP, q, k, v, whole.plan(ops), 0.5)
    cache_k, cache_v = np.full((2, *k.shape), np.nan)
    for step in range(20):
        t = step - np.array(late[: len(lengths)])  # where each sequence is: some begin later than others
        alive = (t >= 0) & (t < whole.q_lengths)
        starts, seen = whole.k_starts[alive], t[alive] + 1
        rows = starts + t[alive]
        cache_k[rows], cache_v[rows] = k[rows], v[rows]
        places = [np.arange(len(rows)), np.ones(len(rows), np.int64), starts, seen]
        decoding = ops.decoding_plan(ops.array(starts), ops.array(seen), exact)
        for plan in (ops.attention_plan(*places, exact), decoding):
            o, _ = forward(ops, OP, q[rows], cache_k, cache_v, plan, 0.5)
            check_close(o, expected[rows])


@law(6, sequences=sequences, heads=heads, seed=seeds)
def test_grouped_heads_equal_key_heads_repeated(ops, sequences, heads, seed):
    layout = draw_layout(seed, sequences)
    q, k, v = draw(seed, layout, heads, 4)
    kv_heads, group = heads
    repeated = [np.repeat(x, group, axis=1) for x in (k, v)]
    o, saved = forward(ops, OP, q, k, v, layout.plan(ops), 0.5)
    o_repeated, saved_repeated = forward(ops, OP, q, *repeated, layout.plan(ops), 0.5)
    check_close(o, o_repeated)
    dq, dk, dv = backward(ops, OP, np.cos(q), saved)
    dq_repeated, *dkv_repeated = backward(ops, OP, np.cos(q), saved_repeated)
    check_close(dq, dq_repeated)
    for ours, theirs in zip((dk, dv), dkv_repeated, strict=True):
        check_close(ours, theirs.reshape(-1, kv_heads, group, 4).sum(axis=2))


@law(6, count=st.integers(1, 5), heads=heads, seed=seeds)
def test_a_sequence_of_one_token_says_its_value(ops, count, heads, seed):
    layout = packed([1] * count)
    q, k, v = draw(seed, layout, heads, 4)
    o, saved = forward(ops, OP, q, k, v, layout.plan(ops), 0.5)
    np.testing.assert_array_equal(o, np.repeat(v, heads[1], axis=1))
    dq, dk, _ = backward(ops, OP, np.ones_like(o), saved)
    assert np.abs(dq).max() < 1e-14
    assert np.abs(dk).max() < 1e-14


def test_extreme_scores_give_finite_numbers_and_no_warning(ops):  # pytest turns a warning into an error
    layout = packed([4, 3])
    q, k, v = draw(0, layout, (1, 2), 4, np.float32)
    o, saved = forward(ops, OP, 1e3 * q, 1e3 * k, v, layout.plan(ops), 0.5)
    for array in (o, *backward(ops, OP, np.ones_like(o), saved)):
        assert np.isfinite(array).all()
    assert np.abs(o).max() <= np.abs(v).max()


def test_no_sequence_at_all_is_no_error(ops):
    layout = packed([])
    q, k, v = draw(0, layout, (1, 2), 4)
    o, saved = forward(ops, OP, q, k, v, layout.plan(ops), 0.5)
    assert o.shape == (0, 2, 4)
    assert [x.shape for x in backward(ops, OP, o, saved)] == [(0, 2, 4), (0, 1, 4), (0, 1, 4)]


@pytest.mark.parametrize(
    ("queries", "keys"), [([3], [2]), ([1], [0]), ([2, 3], [2, 2]), ([1, 1, 1], [4, 0, 2]), ([1, 1], [0, 0])]
)
def test_more_queries_than_keys_are_refused(ops, queries, keys):
    layout = scattered(np.random.default_rng(0), queries, keys)
    few = next(f"{n} queries but {m} keys" for n, m in zip(queries, keys, strict=True) if n > m)
    with pytest.raises(ValueError, match=few):
        layout.plan(ops)


@pytest.mark.parametrize("lengths", [[20, 20], [1, 1], [3, 20]])
def test_sequences_may_share_keys_but_have_no_backward_then(ops, lengths):
    apart = packed(lengths)
    q, k, v = draw(0, apart, (1, 2), 8)
    k, v = (x[-lengths[1] :] for x in (k, v))
    both_k, both_v = (np.concatenate([x[: lengths[0]], x]) for x in (k, v))
    expected, _ = forward(ops, OP, q, both_k, both_v, apart.plan(ops), 0.3)
    plan = ops.attention_plan(apart.q_starts, apart.q_lengths, np.zeros(2, np.int64), apart.k_lengths)
    o, saved = forward(ops, OP, q, k, v, plan, 0.3)
    check_close(o, expected)
    with pytest.raises(ValueError, match="share rows of k and v"):
        backward(ops, OP, o, saved)


def test_a_sequence_without_queries_may_share_the_keys_of_another(ops):
    layout = packed([4])
    arrays = draw(0, layout, (1, 2), 8)
    answers = []
    for places in ([[0], [4], [0], [4]], [[0, 0], [4, 0], [0, 1], [4, 2]]):
        plan = ops.attention_plan(*(np.array(x, np.int64) for x in places))
        o, saved = forward(ops, OP, *arrays, plan, 0.3)
        answers.append([o, *backward(ops, OP, o, saved)])
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, other)
