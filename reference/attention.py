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
group stand under each other in one product.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Index = NDArray[np.int64]

QUERY_BLOCK = 64  # queries at once: bounds P to (heads, 64, keys), and skips most of what the mask hides
SCORES = 1 << 18  # numbers of P at once, of several blocks where these are small: a megabyte stays in cache


@dataclass(frozen=True)
class Blocks:
    """Blocks of queries that have one shape, of any sequences.

    queries: (blocks, rows), rows of q. keys: (blocks, keys), the rows of k and v that the last of these sees.
    """

    queries: Index
    keys: Index


@dataclass(frozen=True)
class Plan:
    """Where the sequences are. singles: rows of q and (first, number) of keys of sequences with one query,
    as in decoding, where there are several; blocks: all others."""

    singles: tuple[Index, Index, Index]
    blocks: list[Blocks]


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
    return Plan((q_starts[single], k_starts[single], k_lengths[single]), blocks)


def attention_forward(q: Array, k: Array, v: Array, plan: Plan, scale: float) -> tuple[Array, Any]:
    """q: (tokens, heads, head_dim), k, v: (kv_tokens, kv_heads, head_dim) -> o: (tokens, heads, head_dim).

    plan: from `attention_plan`. Rows of q that belong to no sequence come out as zeros.
    """
    o = np.zeros_like(q)
    lse = np.zeros(q.shape[:2], q.dtype)  # (tokens, heads): L
    rows, k_starts, k_lengths = plan.singles
    if len(rows) > 0:
        o[rows], lse[rows] = _attend_singly(q[rows], k, v, k_starts, k_lengths, scale)
    for rows, keys in _fitting(plan.blocks, q.shape[1]):
        p = _scores(q[rows], k[keys], scale)  # (blocks, kv_heads, group * rows, keys)
        top = p.max(axis=-1, keepdims=True)
        p -= top
        np.exp(p, out=p)
        total = p.sum(axis=-1, keepdims=True)
        out = p @ v[keys].transpose(0, 2, 1, 3)
        out /= total
        o[rows] = _ungrouped(out, rows.shape[1])
        top += np.log(total)
        lse[rows] = _ungrouped(top, rows.shape[1])[..., 0]
    return o, (q, k, v, o, lse, plan, scale)


def attention_backward(do: Array, saved: Any) -> tuple[Array, Array, Array]:
    """do: (tokens, heads, head_dim) -> dq: like q, dk, dv: like k."""
    q, k, v, o, lse, plan, scale = saved
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    do_o = np.einsum("thd,thd->th", do, o)
    kv_heads = k.shape[1]
    rows, k_starts, k_lengths = plan.singles
    blocks = [*plan.blocks, *_blocks(rows, np.ones_like(rows), k_starts, k_lengths)]
    for rows, keys in _fitting(blocks, q.shape[1]):
        p = _scores(q[rows], k[keys], scale)  # (blocks, kv_heads, group * rows, keys)
        p -= _grouped(lse[rows][..., None], kv_heads)
        np.exp(p, out=p)
        do_block = _grouped(do[rows], kv_heads)  # (blocks, kv_heads, group * rows, head_dim)
        dv_block = (p.transpose(0, 1, 3, 2) @ do_block).transpose(0, 2, 1, 3)
        ds = do_block @ v[keys].transpose(0, 2, 3, 1)
        ds -= _grouped(do_o[rows][..., None], kv_heads)
        ds *= p
        q_block = _grouped(q[rows], kv_heads) * q.dtype.type(scale)
        dk_block = (ds.transpose(0, 1, 3, 2) @ q_block).transpose(0, 2, 1, 3)
        for i, first in enumerate(keys[:, 0]):  # one by one, since sequences may share keys
            dk[first : first + keys.shape[1]] += dk_block[i]
            dv[first : first + keys.shape[1]] += dv_block[i]
        dq_block = ds @ k[keys].transpose(0, 2, 1, 3)
        dq_block *= q.dtype.type(scale)
        dq[rows] = _ungrouped(dq_block, rows.shape[1])
    return dq, dk, dv


def _attend_singly(
    q: Array, k: Array, v: Array, k_starts: Index, k_lengths: Index, scale: float
) -> tuple[Array, Array]:
    """The forward of sequences with one query each, as in decoding, all at once: keys gathered and padded.

    q: (sequences, heads, head_dim) -> o: like q, lse: (sequences, heads).
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
    return out.reshape(sequences, heads, head_dim), (np.log(total) + top).reshape(sequences, heads)


def _blocks(q_starts: Index, q_lengths: Index, k_starts: Index, k_lengths: Index) -> list[Blocks]:
    """The sequences' queries in blocks of QUERY_BLOCK, those of one shape together."""
    firsts: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    sequences = zip(q_starts.tolist(), q_lengths.tolist(), k_starts.tolist(), k_lengths.tolist(), strict=True)
    for q_start, queries, k_start, keys in sequences:
        for first in range(0, queries, QUERY_BLOCK):
            end = min(first + QUERY_BLOCK, queries)
            firsts[end - first, keys - queries + end].append((q_start + first, k_start))
    blocks = []
    for (rows, seen), places in firsts.items():
        q_first, k_first = np.array(places).T[..., None]
        blocks.append(Blocks(q_first + np.arange(rows), k_first + np.arange(seen)))
    return blocks


def _fitting(blocks: list[Blocks], heads: int) -> Iterator[tuple[Index, Index]]:
    """(queries, keys) of as many blocks of one shape at once as SCORES allows."""
    for block in blocks:
        count = max(1, SCORES // (heads * block.queries.shape[1] * block.keys.shape[1]))
        for first in range(0, len(block.queries), count):
            yield block.queries[first : first + count], block.keys[first : first + count]


def _scores(q: Array, k: Array, scale: float) -> Array:
    """scale Q K^T + mask, where the last query sees the last key.

    q: (blocks, rows, heads, head_dim), k: (blocks, keys, kv_heads, head_dim)
    -> (blocks, kv_heads, group * rows, keys).
    """
    (blocks, rows), (keys, kv_heads) = q.shape[:2], k.shape[1:3]
    scores: Array = (_grouped(q, kv_heads) * q.dtype.type(scale)) @ k.transpose(0, 2, 3, 1)
    if rows > 1:  # all rows see the keys before the last `rows` ones: the mask is a triangle over those
        scores.reshape(blocks, kv_heads, -1, rows, keys)[..., keys - rows :] += _triangle(rows, q.dtype)
    return scores


@lru_cache
def _triangle(rows: int, dtype: np.dtype[Any]) -> Array:
    """0 where query i sees key j, -inf above the diagonal where it does not: (rows, rows)."""
    return np.triu(np.full((rows, rows), -np.inf, dtype), 1)


def _grouped(x: Array, kv_heads: int) -> Array:
    """(blocks, rows, heads, n) -> (blocks, kv_heads, group * rows, n): heads that share keys under each other."""
    blocks, rows, heads, n = x.shape
    grouped = x.reshape(blocks, rows, kv_heads, heads // kv_heads, n).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(blocks, kv_heads, -1, n)


def _ungrouped(x: Array, rows: int) -> Array:
    """The inverse of `_grouped`: (blocks, kv_heads, group * rows, n) -> (blocks, rows, heads, n)."""
    blocks, kv_heads, _, n = x.shape
    return x.reshape(blocks, kv_heads, -1, rows, n).transpose(0, 3, 1, 2, 4).reshape(blocks, rows, -1, n)
