"""model/packing.py: where the tokens of each sequence lie, and how sequences are split into micro-batches."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minitinker.model.packing import filled, micro_batches, pack, pack_for_cache

FIXED = settings(derandomize=True, deadline=None, max_examples=100)
lengths_of_sequences = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def sequences(lengths):
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]


@FIXED
@given(lengths_of_sequences)
def test_packed_sequences_lie_end_to_end_and_count_their_own_positions(lengths):
    batch = pack(sequences(lengths))
    np.testing.assert_array_equal(batch.tokens, np.arange(sum(lengths)))
    for i, tokens in enumerate(sequences(lengths)):
        rows = slice(batch.q_starts[i], batch.q_starts[i] + batch.q_lengths[i])
        np.testing.assert_array_equal(batch.tokens[rows], tokens)
        np.testing.assert_array_equal(batch.positions[rows], np.arange(len(tokens)))


@FIXED
@given(lengths_of_sequences)
def test_in_training_queries_and_keys_are_the_same_rows(lengths):
    batch = pack(sequences(lengths))
    np.testing.assert_array_equal(batch.k_starts, batch.q_starts)
    np.testing.assert_array_equal(batch.k_lengths, batch.q_lengths)
    assert batch.cache_rows is None


@FIXED
@given(lengths_of_sequences, st.data())
def test_with_a_cache_new_keys_go_right_behind_the_old_ones(lengths, data):
    n = len(lengths)
    done = np.array(data.draw(st.lists(st.integers(0, 40), min_size=n, max_size=n)))
    regions = 100 * np.array(data.draw(st.permutations(range(n))))
    batch = pack_for_cache(sequences(lengths), done, regions)
    np.testing.assert_array_equal(batch.tokens, np.arange(sum(lengths)))
    for i, length in enumerate(lengths):
        rows = slice(batch.q_starts[i], batch.q_starts[i] + batch.q_lengths[i])
        np.testing.assert_array_equal(batch.tokens[rows], sequences(lengths)[i])
        np.testing.assert_array_equal(batch.positions[rows], done[i] + np.arange(length))
        np.testing.assert_array_equal(batch.cache_rows[rows], regions[i] + batch.positions[rows])
        assert batch.k_starts[i] == regions[i]
        assert batch.k_lengths[i] == done[i] + length


@FIXED
@given(lengths_of_sequences, st.integers(1, 20))
def test_micro_batches_hold_every_sequence_once_and_in_order(lengths, parts):
    batches = micro_batches(lengths, parts)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    assert all(batches)
    assert len(batches) <= parts


@FIXED
@given(lengths_of_sequences, st.integers(1, 20))
def test_no_micro_batch_exceeds_its_share_by_more_than_the_longest_sequence(lengths, parts):
    for batch in micro_batches(lengths, parts):
        assert sum(lengths[i] for i in batch) <= sum(lengths) / parts + max(lengths)


@FIXED
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6))
def test_sequences_of_one_length_are_split_evenly_where_they_can_be(length, each, parts):
    assert [len(batch) for batch in micro_batches([length] * each * parts, parts)] == [each] * parts


def test_a_cut_falls_where_the_running_sum_is_nearest_to_an_equal_share():
    assert micro_batches([5, 1, 1, 5], 2) == [range(2), range(2, 4)]
    assert micro_batches([3, 3, 1, 3], 2) == [range(2), range(2, 4)]  # 6 is nearer to 5 than 3
    assert micro_batches([9, 1, 1, 1], 2) == [range(1), range(1, 4)]
    assert micro_batches([2, 20, 2], 3) == [range(1), range(1, 2), range(2, 3)]


def test_no_sequences_make_no_micro_batch():
    assert micro_batches([], 3) == []


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), most=st.integers(1, 60))
def test_filled_groups_hold_as_many_sequences_as_they_can_and_only_one_alone_is_too_long(lengths, most):
    groups = filled(lengths, most)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        tokens = sum(lengths[i] for i in group)
        assert tokens <= most or len(group) == 1
        assert after is None or tokens + lengths[after.start] > most
