"""Sequences laid end to end in one array, never padded; and how many of them go through the model at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """Tokens of several sequences, and where the queries and the keys of each one lie.

    tokens, positions: (tokens,) int64, a position counting from its sequence's beginning.
    q_starts, q_lengths: (sequences,) int64, rows of `tokens`.
    k_starts, k_lengths: (sequences,) int64, rows of the keys: of `tokens` itself in training, of a cache in
    sampling. The last query of a sequence sees its last key.
    cache_rows: (tokens,) int64, where each token's key and value go in the cache; None without a cache.
    wanted: (sequences,) int64, of how many last tokens of each the final states are wanted; None: of all.
    """

    tokens: Index
    positions: Index
    q_starts: Index
    q_lengths: Index
    k_starts: Index
    k_lengths: Index
    cache_rows: Index | None = None
    wanted: Index | None = None


def pack(sequences: Sequence[Index]) -> Packed:
    """Whole sequences, each attending to itself: queries and keys are the same rows."""
    lengths = np.array([len(tokens) for tokens in sequences], np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = np.concatenate(sequences)
    return Packed(tokens, _count_up(np.zeros_like(lengths), lengths), starts, lengths, starts, lengths)


def pack_for_cache(
    sequences: Sequence[Index], done: Index, regions: Index, wanted: Index | None = None
) -> Packed:
    """The next tokens of sequences that have `done` tokens in a cache already.

    done: (sequences,) tokens of each that the cache holds, regions: (sequences,) the cache row where each
    begins. The new keys and values go behind the old ones. wanted: as in Packed.
    """
    lengths = np.array([len(tokens) for tokens in sequences], np.int64)
    starts = np.cumsum(lengths) - lengths
    return Packed(
        tokens=np.concatenate(sequences),
        positions=_count_up(done, lengths),
        q_starts=starts,
        q_lengths=lengths,
        k_starts=regions,
        k_lengths=done + lengths,
        cache_rows=_count_up(regions + done, lengths),
        wanted=wanted,
    )


def last_rows(batch: Packed, last: Index) -> Index:
    """The rows of so many last tokens of each sequence: (sum of last,)."""
    return _count_up(batch.q_starts + batch.q_lengths - last, last)


def micro_batches(lengths: Sequence[int], parts: int) -> list[range]:
    """Consecutive sequences, as indices, in at most `parts` groups of about equally many tokens.

    A cut falls where the running sum is nearest to an equal share, so no group exceeds its share by more than
    the longest sequence; groups without a sequence are left out.
    """
    sums = np.cumsum([0, *lengths])
    shares = sums[-1] * np.arange(parts + 1) / parts
    cuts = [int(np.abs(sums - share).argmin()) for share in shares]
    return [range(first, end) for first, end in pairwise(cuts) if end > first]


def filled(lengths: Sequence[int], most: int) -> list[range]:
    """Consecutive sequences, as indices, in groups of at most `most` tokens; a longer sequence is alone."""
    groups, first, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and tokens + length > most:
            groups.append(range(first, i))
            first, tokens = i, 0
        tokens += length
    return [*groups, range(first, len(lengths))]


def _count_up(starts: Index, lengths: Index) -> Index:
    """start, start + 1, ... for each sequence, end to end: (sum of lengths,)."""
    if (lengths == 1).all():
        return starts
    ends = np.cumsum(lengths)
    rows: Index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
    return rows
