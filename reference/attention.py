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

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Index = NDArray[np.int64]

QUERY_BLOCK = 128  # queries at once: bounds P to (heads, 128, keys), and skips most of what the mask hides


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    q_starts: Index,
    q_lengths: Index,
    k_starts: Index,
    k_lengths: Index,
    scale: float,
) -> tuple[Array, Any]:
    """q: (tokens, heads, head_dim), k, v: (kv_tokens, kv_heads, head_dim) -> o: (tokens, heads, head_dim).

    q_starts, q_lengths, k_starts, k_lengths: (sequences,) int64, rows of q and of k and v; a sequence has at
    least as many keys as queries. Rows of q that belong to no sequence come out as zeros.
    """
    for i in np.flatnonzero(q_lengths > k_lengths):
        raise ValueError(
            f"a sequence has {q_lengths[i]} queries but {k_lengths[i]} keys; it needs as many keys at least"
        )
    o = np.zeros_like(q)
    lse = np.zeros(q.shape[:2], q.dtype)  # (tokens, heads): L
    single = q_lengths == 1
    if single.sum() > 1:
        rows = q_starts[single]
        o[rows], lse[rows] = _attend_singly(q[rows], k, v, k_starts[single], k_lengths[single], scale)
    else:
        single[:] = False
    for rows, keys in _blocks(q_starts[~single], q_lengths[~single], k_starts[~single], k_lengths[~single]):
        p = _scores(q[rows], k[keys], scale)  # (kv_heads, group * rows, keys)
        top = p.max(axis=-1, keepdims=True)
        p -= top
        np.exp(p, out=p)
        total = p.sum(axis=-1, keepdims=True)
        out = p @ v[keys].transpose(1, 0, 2)
        out /= total
        o[rows] = _ungrouped(out, o[rows].shape)
        top += np.log(total)
        lse[rows] = _ungrouped(top, (*lse[rows].shape, 1))[..., 0]
    return o, (q, k, v, o, lse, q_starts, q_lengths, k_starts, k_lengths, scale)


def attention_backward(do: Array, saved: Any) -> tuple[Array, Array, Array]:
    """do: (tokens, heads, head_dim) -> dq: like q, dk, dv: like k."""
    q, k, v, o, lse, q_starts, q_lengths, k_starts, k_lengths, scale = saved
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    do_o = np.einsum("thd,thd->th", do, o)
    kv_heads = k.shape[1]
    for rows, keys in _blocks(q_starts, q_lengths, k_starts, k_lengths):
        p = _scores(q[rows], k[keys], scale)  # (kv_heads, group * rows, keys)
        p -= _grouped(lse[rows][..., None], kv_heads)
        np.exp(p, out=p)
        do_block = _grouped(do[rows], kv_heads)  # (kv_heads, group * rows, head_dim)
        dv[keys] += (p.transpose(0, 2, 1) @ do_block).transpose(1, 0, 2)
        ds = do_block @ v[keys].transpose(1, 2, 0)
        ds -= _grouped(do_o[rows][..., None], kv_heads)
        ds *= p
        q_block = _grouped(q[rows], kv_heads) * q.dtype.type(scale)
        dk[keys] += (ds.transpose(0, 2, 1) @ q_block).transpose(1, 0, 2)
        dq_block = ds @ k[keys].transpose(1, 0, 2)
        dq_block *= q.dtype.type(scale)
        dq[rows] = _ungrouped(dq_block, q[rows].shape)
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


def _blocks(
    q_starts: Index, q_lengths: Index, k_starts: Index, k_lengths: Index
) -> Iterator[tuple[slice, slice]]:
    """(rows of q, rows of k and v that the last of them sees), block by block of each sequence."""
    sequences = zip(q_starts.tolist(), q_lengths.tolist(), k_starts.tolist(), k_lengths.tolist(), strict=True)
    for q_start, queries, k_start, keys in sequences:
        for first in range(0, queries, QUERY_BLOCK):
            end = min(first + QUERY_BLOCK, queries)
            yield slice(q_start + first, q_start + end), slice(k_start, k_start + keys - queries + end)


def _scores(q: Array, k: Array, scale: float) -> Array:
    """scale Q K^T + mask, where the last query sees the last key.

    q: (rows, heads, head_dim), k: (keys, kv_heads, head_dim) -> (kv_heads, group * rows, keys).
    """
    rows, keys, kv_heads = len(q), len(k), k.shape[1]
    scores: Array = (_grouped(q, kv_heads) * q.dtype.type(scale)) @ k.transpose(1, 2, 0)
    if rows > 1:  # all rows see the keys before the last `rows` ones: the mask is a triangle over those
        scores.reshape(kv_heads, -1, rows, keys)[..., keys - rows :] += _triangle(rows, q.dtype)
    return scores


@lru_cache
def _triangle(rows: int, dtype: np.dtype[Any]) -> Array:
    """0 where query i sees key j, -inf above the diagonal where it does not: (rows, rows)."""
    return np.triu(np.full((rows, rows), -np.inf, dtype), 1)


def _grouped(x: Array, kv_heads: int) -> Array:
    """(rows, heads, n) -> (kv_heads, group * rows, n): the heads that share a key head, under each other."""
    rows, heads, n = x.shape
    return x.reshape(rows, kv_heads, heads // kv_heads, n).transpose(1, 2, 0, 3).reshape(kv_heads, -1, n)


def _ungrouped(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_grouped`: (kv_heads, group * rows, n) -> (rows, heads, n) = shape."""
    rows, heads, n = shape
    kv_heads = len(x)
    return x.reshape(kv_heads, heads // kv_heads, rows, n).transpose(2, 0, 1, 3).reshape(shape)
