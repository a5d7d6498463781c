"""Causal grouped-query attention over packed sequences, in blocks of queries.

One op for training, prefill and decoding: a sequence has its queries at one place and its keys at another,
and its last query sees its last key. Query i of a sequence with n queries and m keys sees keys
0 .. m - n + i.

forward    P = softmax(scale Q K^T + mask)           O = P V
backward   dV = P^T dO
           dS = P * (dO V^T - rowsum(dO * O))        softmax's Jacobian; rowsum(dO * O) = rowsum(dP * P)
           dQ = scale dS K        dK = scale dS^T Q

P is not kept: the backward forms it again from L, the log of each row's sum of exponentials, as
FlashAttention does (Dao et al. 2022, arXiv:2205.14135). Grouped heads share their keys, so the rows of a
group stand side by side in one product. P lies transposed, keys first, since NumPy takes the maxima and sums of
many columns faster than those of many rows.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Index = NDArray[np.int64]

QUERY_BLOCK = 64  # queries at once: bounds P to (heads, 64, keys), and skips most of what the mask hides
SCORES = 1 << 18  # numbers of P at once, of several blocks where these are small: a megabyte stays in cache
ALIKE = 32  # blocks that differ by fewer queries or keys than this are done together, the smaller ones padded


@dataclass(frozen=True)
class Blocks:
    """Blocks of queries of any sequences, padded to one shape.

    queries: (blocks, rows), rows of q, padded with -1. keys: (blocks, keys), the rows of k and v that the last
    of these sees, padded with the last. sizes: queries and keys without padding. mask: (blocks or 1, last keys,
    1, rows), -inf where a query does not see a key and 0 where it does; all queries see the keys before.
    """

    queries: Index
    keys: Index
    sizes: list[tuple[int, int]]
    mask: Array


@dataclass(frozen=True)
class Plan:
    """Where the sequences are. singles: rows of q and (first, number) of keys of sequences with one query,
    as in decoding, where there are several; blocks: all others. shared: whether sequences share rows of k and v."""

    singles: tuple[Index, Index, Index]
    blocks: list[Blocks]
    shared: bool


def attention_plan(q_starts: Index, q_lengths: Index, k_starts: Index, k_lengths: Index) -> Plan:
    """Where each sequence has its queries and its keys, for `attention_forward` of any number of layers.

    All (sequences,) int64: rows of q, and of k and v. Raises ValueError where a sequence has more queries than
    keys.
    """
    for i in np.flatnonzero(q_lengths > k_lengths):
        raise ValueError(
            f"a sequence has {q_lengths[i]} queries but {k_lengths[i]} keys; it needs as many keys at least"
        )
    single = q_lengths == 1
    if single.sum() == 1:
        single[:] = False
    blocks = _blocks(q_starts[~single], q_lengths[~single], k_starts[~single], k_lengths[~single])
    some = q_lengths > 0
    order = np.argsort(k_starts[some])
    starts, ends = k_starts[some][order], (k_starts + k_lengths)[some][order]
    shared = bool((ends[:-1] > starts[1:]).any())
    return Plan((q_starts[single], k_starts[single], k_lengths[single]), blocks, shared)


def attention_forward(q: Array, k: Array, v: Array, plan: Plan, scale: float) -> tuple[Array, Any]:
    """q: (tokens, heads, head_dim), k, v: (kv_tokens, kv_heads, head_dim) -> o: (tokens, heads, head_dim).

    plan: from `attention_plan`. Rows of q that belong to no sequence come out as zeros. Sequences may share rows
    of k and v, but have no backward then.
    """
    tokens, heads, head_dim = q.shape
    o = np.zeros((tokens + 1, heads, head_dim), q.dtype)  # one row more, -1, for what padding computes
    lse = np.zeros((tokens + 1, heads, 1), q.dtype)  # L
    rows, k_starts, k_lengths = plan.singles
    if len(rows) > 0:
        o[rows], lse[rows] = _attend_singly(q[rows], k, v, k_starts, k_lengths, scale)
    for block in _fitting(plan.blocks, heads):
        p = _scores(q, k, block, scale)  # P^T: (blocks, kv_heads, keys, group * rows)
        top = p.max(axis=-2, keepdims=True)
        p -= top
        np.exp(p, out=p)
        total = p.sum(axis=-2, keepdims=True)
        out = p.swapaxes(-1, -2) @ v[block.keys].swapaxes(1, 2)
        out /= total.swapaxes(-1, -2)
        o[block.queries] = _ungrouped(out, heads)
        top += np.log(total)
        lse[block.queries] = _ungrouped(top.swapaxes(-1, -2), heads)
    lse[-1] = np.inf  # so that P of padding is 0 in the backward
    return o[:-1], (q, k, v, o[:-1], lse, plan, scale)


def attention_backward(do: Array, saved: Any) -> tuple[Array, Array, Array]:
    """do: (tokens, heads, head_dim) -> dq: like q, dk, dv: like k.

    Raises ValueError where sequences share rows of k and v: these have gradients of one sequence each.
    """
    q, k, v, o, lse, plan, scale = saved
    if plan.shared:
        raise ValueError("sequences share rows of k and v; there is a backward only where each has its own")
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    dq = np.zeros((tokens + 1, heads, head_dim), q.dtype)
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    do_o = np.einsum("thd,thd->th", do, o)[..., None]
    rows, k_starts, k_lengths = plan.singles
    for block in _fitting([*plan.blocks, *_blocks(rows, np.ones_like(rows), k_starts, k_lengths)], heads):
        p = _scores(q, k, block, scale)  # P^T: (blocks, kv_heads, keys, group * rows)
        p -= _grouped(lse[block.queries], kv_heads).swapaxes(-1, -2)
        np.exp(p, out=p)
        do_block = _grouped(do[block.queries], kv_heads)  # (blocks, kv_heads, group * rows, head_dim)
        dv_block = (p @ do_block).swapaxes(1, 2)
        ds = v[block.keys].swapaxes(1, 2) @ do_block.swapaxes(-1, -2)
        ds -= _grouped(do_o[block.queries], kv_heads).swapaxes(-1, -2)
        ds *= p
        ds *= q.dtype.type(scale)
        dk_block = (ds @ _grouped(q[block.queries], kv_heads)).swapaxes(1, 2)
        for i, (_, keys) in enumerate(block.sizes):  # one by one, since blocks of a sequence share keys
            first = block.keys[i, 0]
            dk[first : first + keys] += dk_block[i, :keys]
            dv[first : first + keys] += dv_block[i, :keys]
        dq[block.queries] = _ungrouped(ds.swapaxes(-1, -2) @ k[block.keys].swapaxes(1, 2), heads)
    return dq[:-1], dk, dv


def _attend_singly(
    q: Array, k: Array, v: Array, k_starts: Index, k_lengths: Index, scale: float
) -> tuple[Array, Array]:
    """The forward of sequences with one query each, as in decoding, all at once: keys gathered and padded.

    q: (sequences, heads, head_dim) -> o: like q, lse: (sequences, heads, 1).
    """
    sequences, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    place = np.arange(k_lengths.max())  # (longest,)
    hidden = place >= k_lengths[:, None]  # (sequences, longest)
    rows = k_starts[:, None] + np.where(hidden, 0, place)
    q = q.reshape(sequences, kv_heads, heads // kv_heads, head_dim) * q.dtype.type(scale)
    p: Array = q @ k[rows].transpose(0, 2, 3, 1)  # (sequences, kv_heads, group, longest)
    p += np.where(hidden, q.dtype.type(-np.inf), q.dtype.type(0))[:, None, None, :]
    top = p.max(axis=-1, keepdims=True)
    p -= top
    np.exp(p, out=p)
    total = p.sum(axis=-1, keepdims=True)
    out = p @ v[rows].transpose(0, 2, 1, 3)
    out /= total
    return out.reshape(sequences, heads, head_dim), (np.log(total) + top).reshape(sequences, heads, 1)


def _blocks(q_starts: Index, q_lengths: Index, k_starts: Index, k_lengths: Index) -> list[Blocks]:
    """The sequences' queries in blocks of QUERY_BLOCK, those of nearly one shape together."""
    alike: defaultdict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)
    sequences = zip(q_starts.tolist(), q_lengths.tolist(), k_starts.tolist(), k_lengths.tolist(), strict=True)
    for q_start, queries, k_start, keys in sequences:
        for first in range(0, queries, QUERY_BLOCK):
            rows = min(QUERY_BLOCK, queries - first)
            seen = keys - queries + first + rows
            alike[-(-rows // ALIKE), -(-seen // ALIKE)].append((q_start + first, rows, k_start, seen))
    return [_padded(*np.array(blocks).T[..., None]) for blocks in alike.values()]


def _padded(q_firsts: Index, rows: Index, k_firsts: Index, seen: Index) -> Blocks:
    """Blocks of some rows, beginning at q_firsts, that see some keys, beginning at k_firsts: all (blocks, 1)."""
    row, key = np.arange(rows.max()), np.arange(seen.max())
    queries = np.where(row < rows, q_firsts + row, -1)
    keys = k_firsts + np.minimum(key, seen - 1)
    sizes = list(zip(rows[:, 0].tolist(), seen[:, 0].tolist(), strict=True))
    if len(set(sizes)) == 1:
        rows, seen = rows[:1], seen[:1]
    last = seen - rows + np.minimum(row, rows - 1)  # (blocks, rows), the last key that each query sees
    hidden = key[last.min() + 1 :, None] > last[:, None, :]
    mask = np.where(hidden, np.float32(-np.inf), np.float32(0))
    return Blocks(queries, keys, sizes, mask[:, :, None])


def _fitting(blocks: list[Blocks], heads: int) -> Iterator[Blocks]:
    """As many blocks of one shape at once as SCORES allows."""
    for block in blocks:
        count = max(1, SCORES // (heads * block.queries.shape[1] * block.keys.shape[1]))
        for first in range(0, len(block.queries), count):
            part = slice(first, first + count)
            mask = block.mask if len(block.mask) == 1 else block.mask[part]
            yield Blocks(block.queries[part], block.keys[part], block.sizes[part], mask)


def _scores(q: Array, k: Array, block: Blocks, scale: float) -> Array:
    """scale K Q^T + mask of some blocks: (blocks, kv_heads, keys, group * rows).

    q: (tokens, heads, head_dim), k: (kv_tokens, kv_heads, head_dim).
    """
    q_block = _grouped(q[block.queries], k.shape[1]) * q.dtype.type(scale)
    scores: Array = k[block.keys].swapaxes(1, 2) @ q_block.swapaxes(-1, -2)
    blocks, kv_heads, keys, _ = scores.shape
    last_keys, _, rows = block.mask.shape[1:]
    grouped = scores.reshape(blocks, kv_heads, keys, -1, rows)
    grouped[:, :, keys - last_keys :] += block.mask[:, None]
    return scores


def _grouped(x: Array, kv_heads: int) -> Array:
    """(blocks, rows, heads, n) -> (blocks, kv_heads, group * rows, n): heads that share keys under each other."""
    blocks, rows, heads, n = x.shape
    grouped = x.reshape(blocks, rows, kv_heads, heads // kv_heads, n).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(blocks, kv_heads, -1, n)


def _ungrouped(x: Array, heads: int) -> Array:
    """The inverse of `_grouped`: (blocks, kv_heads, group * rows, n) -> (blocks, rows, heads, n)."""
    blocks, kv_heads, _, n = x.shape
    grouped = x.reshape(blocks, kv_heads, heads // kv_heads, -1, n).transpose(0, 3, 1, 2, 4)
    return grouped.reshape(blocks, -1, heads, n)
