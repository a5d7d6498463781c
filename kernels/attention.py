"""Causal grouped-query attention over packed sequences, in tiles of queries and of keys.

One op for training, prefill and decoding: a sequence has its queries at one place and its keys at another,
and its last query sees its last key. Query i of a sequence with n queries and m keys sees keys
0 .. m - n + i.

forward    P = softmax(scale Q K^T + mask)           O = P V
backward   dV = P^T dO
           dS = P * (dO V^T - delta)                 softmax's Jacobian; delta = rowsum(dO * O) = rowsum(dP * P)
           dQ = scale dS K        dK = scale dS^T Q

P is not kept: the backward forms it again from L, the log of each row's sum of exponentials, as
FlashAttention does (Dao et al. 2022, arXiv:2205.14135). Nor does the forward ever hold a row of P: it goes over
tiles of keys, and where one raises the row's maximum, what was summed so far is scaled down (Milakov and
Gimelshein 2018, arXiv:1805.02867). Grouped heads share their keys, so the rows of a group stand in one tile.
Exponentials and L are to base 2, which is what the chip computes: 2^(log2(e) s) = e^s.

Bits: a query goes over the same tiles of keys, from key 0 of its sequence on, whoever shares its own tile. A
tile of keys that it sees nothing of changes nothing: the maximum stays, 2^0 = 1 scales the sums, 0 is added.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from .array import array, by_tokens, next_power_of_2, sum_dtype

Index = NDArray[np.int64]

ROWS = 64  # (query, head) pairs of a tile: what one tensor core instruction takes; fewer would be another one
FORWARD, BACKWARD_Q, BACKWARD_KV = range(3)
# (keys of a tile, warps, stages) of each kernel. They order sums, so nothing but the dtype and head_dim may choose
# them. bfloat16, for an H100: two programs of FORWARD and of BACKWARD_Q fit the shared memory of a core, so that
# one's exponentials run beside the other's products; BACKWARD_KV holds two sums, and twice the keys halve what it
# reads of q and do. float32 and float64 don't go to tensor cores like these: more keys would not fit the registers.
TILES = {
    torch.bfloat16: ((64, 4, 3), (64, 4, 2), (128, 8, 2)),
    torch.float32: ((16, 8, 2), (16, 8, 2), (16, 8, 2)),
    torch.float64: ((16, 8, 1), (16, 8, 1), (16, 8, 1)),
}
WIDE_TILES = TILES | {torch.bfloat16: ((64, 8, 2), (32, 8, 2), (64, 8, 2))}  # head_dim > 128
LOG2E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class Plan:
    """Where the sequences with queries are: (sequences,) int64 each; and tables of tiles that were made of it.
    decoding: of one query for each sequence the table itself, (sequences, 4), whatever the size of the tiles."""

    q_starts: Index
    q_lengths: Index
    k_starts: Index
    k_lengths: Index
    tables: dict[Any, torch.Tensor] = field(default_factory=dict)
    decoding: torch.Tensor | None = None

    def table(self, cut: Callable[["Plan", int], Index], size: int, x: torch.Tensor) -> torch.Tensor:
        """cut(self, size) on the device of x: made by the first layer that asks, there for all others."""
        if self.decoding is not None:
            if cut is not _query_tiles:
                raise ValueError("a plan for decoding has no backward")
            return self.decoding
        key = cut, size, x.device
        if key not in self.tables:
            self.tables[key] = array(cut(self, size), device=str(x.device))
        return self.tables[key]


def attention_plan(
    q_starts: Index, q_lengths: Index, k_starts: Index, k_lengths: Index, exact: bool = False
) -> Plan:
    """Where each sequence has its queries and its keys, for `attention_forward` of any number of layers.

    All (sequences,) int64: rows of q, and of k and v. exact: whether a query shall have its bits among any others,
    which here it always has. Raises ValueError where a sequence has more queries than keys.
    """
    for i in np.flatnonzero(q_lengths > k_lengths):
        raise ValueError(
            f"a sequence has {q_lengths[i]} queries but {k_lengths[i]} keys; it needs as many keys at least"
        )
    some = q_lengths > 0
    return Plan(q_starts[some], q_lengths[some], k_starts[some], k_lengths[some])


def decoding_plan(k_starts: torch.Tensor, k_lengths: torch.Tensor, exact: bool = False) -> Plan:
    """The plan where sequence i has one query, row i of q. k_starts, k_lengths: (sequences,), on the GPU, where they
    stay; exact: as above. It has no backward."""
    tiles = torch.empty((len(k_starts), 4), dtype=torch.int64, device=k_starts.device)
    tiles[:, 0] = torch.arange(len(k_starts), device=k_starts.device)
    tiles[:, 1], tiles[:, 2], tiles[:, 3] = 1, k_starts, k_lengths
    nowhere, ones = np.zeros(0, np.int64), np.ones(len(k_starts), np.int64)
    return Plan(nowhere, ones, nowhere, nowhere, decoding=tiles)


# A tile is a run of queries and a run of keys of one sequence, the last query seeing the last key, as
# (row of the first query, queries, row of the first key, keys that the first query sees).


def _query_tiles(plan: Plan, size: int) -> Index:
    """(tiles, 4): each up to `size` queries of a sequence, and all the keys that they see."""
    sequence, first = _pieces(plan.q_lengths, size)
    queries = np.minimum(size, plan.q_lengths[sequence] - first)
    seen = (plan.k_lengths - plan.q_lengths)[sequence] + first + 1
    tiles = np.stack([plan.q_starts[sequence] + first, queries, plan.k_starts[sequence], seen], axis=1)
    return tiles[np.argsort(-seen, kind="stable")]  # the longest first: none is left to run alone at the end


def _key_tiles(plan: Plan, size: int) -> Index:
    """(tiles, 4): each `size` keys of a sequence, with the keys behind them, and all the queries that see them.

    Raises ValueError where sequences share keys: their gradients, each of one program, would not add up.
    """
    order = np.argsort(plan.k_starts)
    starts, ends = plan.k_starts[order], (plan.k_starts + plan.k_lengths)[order]
    if (ends[:-1] > starts[1:]).any():
        raise ValueError("sequences share rows of k and v; there is a backward only where each has its own")
    sequence, first_key = _pieces(plan.k_lengths, size)
    before = (plan.k_lengths - plan.q_lengths)[sequence]
    first = np.maximum(0, first_key - before)
    queries = plan.q_lengths[sequence] - first
    seen = before + first + 1 - first_key
    tiles = np.stack(
        [plan.q_starts[sequence] + first, queries, plan.k_starts[sequence] + first_key, seen], axis=1
    )
    return tiles[np.argsort(-queries, kind="stable")]


def _pieces(lengths: Index, size: int) -> tuple[Index, Index]:
    """Each of the lengths in pieces of `size`: the index of its length and where it begins, (pieces,)."""
    counts = -(-lengths // size)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    return sequence, size * (np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts))


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float
) -> tuple[torch.Tensor, Any]:
    """q: (tokens, heads, head_dim), k, v: (kv_tokens, kv_heads, head_dim) -> o: (tokens, heads, head_dim).

    plan: from `attention_plan`. Rows of q that belong to no sequence come out as zeros; rows of k and v that no
    query sees may hold anything. Sequences may share rows of k and v, but have no backward then. Raises ValueError
    where more than 64 heads share their keys.
    """
    q, k, v = by_tokens(q), k.contiguous(), v.contiguous()
    group = q.shape[1] // k.shape[1]
    if group > ROWS:
        raise ValueError(f"{group} heads share their keys; at most {ROWS} can")
    o = _new(q, plan.q_lengths)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    tiles = plan.table(_query_tiles, ROWS // group, q)
    _forward_kernel[(len(tiles), k.shape[1])](
        q, k, v, o, lse, tiles, k.shape[1], q.stride(0), **_constants(q, k, scale, FORWARD)
    )
    return o, (q, k, v, o, lse, plan, scale)


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    tiles_ptr,
    kv_heads,
    q_stride,  # from one token to the next
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM: tl.constexpr,
):
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    first_query, queries = tl.load(tile_ptr), tl.load(tile_ptr + 1).to(tl.int32)
    first_key, seen = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3).to(tl.int32)
    keys = seen + queries - 1
    i, key, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    query, head = i // GROUP, tl.program_id(1) * GROUP + i % GROUP
    row = (first_query + query) * (kv_heads * GROUP) + head
    o_at, q_in = row[:, None] * HEAD_DIM + d, (query < queries)[:, None] & (d < HEAD_DIM)
    k_at = ((first_key + key) * kv_heads + tl.program_id(1))[:, None] * HEAD_DIM + d
    q_at = ((first_query + query) * q_stride + head * HEAD_DIM)[:, None] + d
    q = tl.load(q_ptr + q_at, q_in, 0)

    top = tl.full((BLOCK_M,), float("-inf"), SUM)  # the largest of each row's scores so far
    total = tl.full((BLOCK_M,), 0, SUM)  # of 2^(score - top)
    o = tl.full((BLOCK_M, BLOCK_D), 0, SUM)
    for start in range(0, keys, BLOCK_N):
        k_in = (start + key < keys)[:, None] & (d < HEAD_DIM)
        k = tl.load(k_ptr + k_at, k_in, 0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=SUM) * (SCALE * LOG2E)
        s = tl.where((start + key)[None, :] < (seen + query)[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + k_at, k_in, 0)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee", out_dtype=SUM)
        top = new_top
        k_at += BLOCK_N * kv_heads * HEAD_DIM
    tl.store(o_ptr + o_at, o / total[:, None], q_in)
    tl.store(lse_ptr + row, top + tl.log2(total), query < queries)


def attention_backward(do: torch.Tensor, saved: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """do: (tokens, heads, head_dim) -> dq: like q, dk, dv: like k.

    Raises ValueError where sequences share rows of k and v: these have gradients of one sequence each; and after a
    `decoding_plan`.
    """
    q, k, v, o, lse, plan, scale = saved
    q, do = q.contiguous(), do.contiguous()
    dq, dk, dv = _new(q, plan.q_lengths), _new(k, plan.k_lengths), _new(v, plan.k_lengths)
    delta = torch.empty_like(lse)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    constants = _constants(q, k, scale, BACKWARD_Q)
    tiles = plan.table(_query_tiles, ROWS // group, q)
    _backward_q_kernel[(len(tiles), kv_heads)](q, k, v, o, lse, do, dq, delta, tiles, kv_heads, **constants)
    constants = _constants(q, k, scale, BACKWARD_KV)
    tiles = plan.table(_key_tiles, constants["BLOCK_N"], q)
    _backward_kv_kernel[(len(tiles), kv_heads)](q, k, v, lse, delta, do, dk, dv, tiles, kv_heads, **constants)
    return dq, dk, dv


@triton.jit
def _backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    do_ptr,
    dq_ptr,
    delta_ptr,
    tiles_ptr,
    kv_heads,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM: tl.constexpr,
):
    """dq; and delta, for dk and dv. The tiles are the forward's."""
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    first_query, queries = tl.load(tile_ptr), tl.load(tile_ptr + 1).to(tl.int32)
    first_key, seen = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3).to(tl.int32)
    keys = seen + queries - 1
    i, key, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    query, head = i // GROUP, tl.program_id(1) * GROUP + i % GROUP
    row = (first_query + query) * (kv_heads * GROUP) + head
    q_at, q_in = row[:, None] * HEAD_DIM + d, (query < queries)[:, None] & (d < HEAD_DIM)
    k_at = ((first_key + key) * kv_heads + tl.program_id(1))[:, None] * HEAD_DIM + d
    do = tl.load(do_ptr + q_at, q_in, 0)
    delta = tl.sum(do.to(SUM) * tl.load(o_ptr + q_at, q_in, 0).to(SUM), 1)
    tl.store(delta_ptr + row, delta, query < queries)
    q = tl.load(q_ptr + q_at, q_in, 0)
    lse = tl.load(lse_ptr + row, query < queries, 0)

    dq = tl.full((BLOCK_M, BLOCK_D), 0, SUM)
    for start in range(0, keys, BLOCK_N):
        k_in = (start + key < keys)[:, None] & (d < HEAD_DIM)
        k = tl.load(k_ptr + k_at, k_in, 0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=SUM) * (SCALE * LOG2E)
        s = tl.where((start + key)[None, :] < (seen + query)[:, None], s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        v = tl.load(v_ptr + k_at, k_in, 0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee", out_dtype=SUM)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee", out_dtype=SUM)
        k_at += BLOCK_N * kv_heads * HEAD_DIM
    tl.store(dq_ptr + q_at, dq * SCALE, q_in)


@triton.jit
def _backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    kv_heads,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM: tl.constexpr,
):
    """dk and dv. Scores lie on their side here, as (keys, queries): it is P^T and dS^T that are multiplied."""
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    first_query, queries = tl.load(tile_ptr), tl.load(tile_ptr + 1).to(tl.int32)
    first_key, seen = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3).to(tl.int32)
    keys = seen + queries - 1
    i, key, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    query, head = i // GROUP, tl.program_id(1) * GROUP + i % GROUP
    k_at = ((first_key + key) * kv_heads + tl.program_id(1))[:, None] * HEAD_DIM + d
    k_in = (key < keys)[:, None] & (d < HEAD_DIM)
    row = (first_query + query) * (kv_heads * GROUP) + head
    k = tl.load(k_ptr + k_at, k_in, 0)
    v = tl.load(v_ptr + k_at, k_in, 0)

    dk = tl.full((BLOCK_N, BLOCK_D), 0, SUM)
    dv = tl.full((BLOCK_N, BLOCK_D), 0, SUM)
    for start in range(0, queries, BLOCK_M // GROUP):
        real = query < tl.minimum(queries - start, BLOCK_M // GROUP)
        q_at, q_in = row[:, None] * HEAD_DIM + d, real[:, None] & (d < HEAD_DIM)
        q = tl.load(q_ptr + q_at, q_in, 0)
        lse = tl.load(lse_ptr + row, real, 0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=SUM) * (SCALE * LOG2E)
        s = tl.where(key[:, None] < (seen + start + query)[None, :], s, float("-inf"))
        p = tl.exp2(s - lse[None, :])
        do = tl.load(do_ptr + q_at, q_in, 0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee", out_dtype=SUM)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee", out_dtype=SUM)
        ds = p * (dp - tl.load(delta_ptr + row, real, 0)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=SUM)
        row += BLOCK_M // GROUP * kv_heads * GROUP
    tl.store(dk_ptr + k_at, dk * SCALE, k_in)
    tl.store(dv_ptr + k_at, dv, k_in)


def _constants(q: torch.Tensor, k: torch.Tensor, scale: float, kernel: int) -> dict[str, Any]:
    """What kernel number `kernel` of TILES is compiled for."""
    head_dim = q.shape[2]
    keys, warps, stages = (WIDE_TILES if head_dim > 128 else TILES)[q.dtype][kernel]
    return {
        "SCALE": float(scale),
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "BLOCK_M": ROWS,
        "BLOCK_N": keys,
        "SUM": sum_dtype(q),
        "num_warps": warps,
        "num_stages": stages,
    }


def _new(x: torch.Tensor, lengths: Index) -> torch.Tensor:
    """A new array like x; of zeros where sequences of these lengths leave out some of its rows."""
    make = torch.empty if lengths.sum() == len(x) else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)
