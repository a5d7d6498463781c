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
many columns faster than those of many rows; but for decoding, see Decoding.

Bits: a query's output does not depend on who is in its block, nor on which of its sequence's queries are: sums over
keys go in tiles from key 0 of the sequence on, one key after the other, and what is hidden adds 0. Sums over head_dim
are left to BLAS; OpenBLAS forms them in one order wherever the layout of the product is one of those used here, and
with AVX2 the groups of products.py.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .products import GROUP, instructions, times_in_groups

Array = NDArray[np.floating]
Index = NDArray[np.int64]

KEY_TILE = 256  # keys whose weighted values BLAS adds up by itself; it cuts longer sums by their length
ROUND = 16  # columns of a product K Q^T come in such numbers, since OpenBLAS forms the rest in another way
QUERY_BLOCK = 64  # queries at once: bounds P to (heads, 64, keys), and skips most of what the mask hides
SCORES = 1 << 18  # numbers of P at once, of several blocks where these are small: a megabyte stays in cache
FEW = 2  # queries of a group that are multiplied one by one in decoding: of more, BLAS copies the keys first
ALIKE = 32  # blocks that differ by fewer queries or keys than this are done together, the smaller ones padded


@dataclass(frozen=True)
class Blocks:
    """Blocks of queries of any sequences, padded to one shape.

    queries: (blocks, rows), rows of q. keys: (blocks, keys), the rows of k and v that the last of these sees. Both
    are padded with their last, so that nothing of another sequence, NaN say, is ever read. sizes: queries and
    keys without padding. padding: (blocks or 1, rows), where queries are padded. mask: (blocks or 1, last keys, 1,
    rows), -inf where a query does not see a key and 0 where it does; all queries see the keys before. in_groups:
    whether products are formed as `times_in_groups` does.
    """

    queries: Index
    keys: Index
    sizes: list[tuple[int, int]]
    padding: NDArray[np.bool_]
    mask: Array
    in_groups: bool


@dataclass(frozen=True)
class Plan:
    """Where the sequences are. k_starts, k_ends: (sequences with queries,), rows of k and v."""

    blocks: list[Blocks]
    k_starts: Index
    k_ends: Index

    def keys_are_shared(self) -> bool:
        """Whether sequences share rows of k and v."""
        order = np.argsort(self.k_starts)
        return bool((self.k_ends[order][:-1] > self.k_starts[order][1:]).any())


@dataclass(frozen=True)
class Decoding:
    """One query of each sequence, where its bits may depend on the others: fewer and faster steps. With the few rows of
    a group of heads P lies as Q K^T gives it.

    groups: of sequences with about as many keys: (sequences,) the rows of q, a slice where these are all; (sequences,
    keys) those of k and v, padded with the last; a mask, (sequences, 1, 1, 1, keys), -inf where they are padded and 0
    elsewhere, or None where none is."""

    groups: list[tuple[slice | Index, Index, Array | None]]


def attention_plan(
    q_starts: Index, q_lengths: Index, k_starts: Index, k_lengths: Index, exact: bool = False
) -> Plan:
    """Where each sequence has its queries and its keys, for `attention_forward` of any number of layers.

    All (sequences,) int64: rows of q, and of k and v. exact: whether a query shall have its bits, as above, where that
    takes longer: with AVX2. Raises ValueError where a sequence has more queries than keys.
    """
    for i in np.flatnonzero(q_lengths > k_lengths):
        raise ValueError(
            f"a sequence has {q_lengths[i]} queries but {k_lengths[i]} keys; it needs as many keys at least"
        )
    alike: defaultdict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)
    sequences = zip(q_starts.tolist(), q_lengths.tolist(), k_starts.tolist(), k_lengths.tolist(), strict=True)
    for q_start, queries, k_start, keys in sequences:
        for first in range(0, queries, QUERY_BLOCK):
            rows = min(QUERY_BLOCK, queries - first)
            seen = keys - queries + first + rows
            # Of one query, as in decoding, more is padding than in the shape of larger blocks.
            shape = (0, seen.bit_length()) if rows == 1 else (-(-rows // ALIKE), -(-seen // ALIKE))
            alike[shape].append((q_start + first, rows, k_start, seen))
    some = q_lengths > 0
    in_groups = exact and instructions() == "AVX2"
    blocks = [_padded(np.array(blocks), in_groups) for blocks in alike.values()]
    return Plan(blocks, k_starts[some], (k_starts + k_lengths)[some])


def decoding_plan(k_starts: Index, k_lengths: Index, exact: bool = False) -> Plan | Decoding:
    """The plan where sequence i has one query, row i of q. It has no backward.

    k_starts, k_lengths: (sequences,). exact: whether a query shall have its bits, which takes longer."""
    bit_lengths = [length.bit_length() for length in k_lengths.tolist()]
    kinds = set(bit_lengths)
    groups: list[slice | Index] = [slice(None)]
    if len(kinds) != 1:
        groups = [np.flatnonzero(np.equal(bit_lengths, kind)) for kind in kinds]
    if not exact:
        return Decoding([_padded_keys(rows, k_starts[rows], k_lengths[rows]) for rows in groups])
    sequences = np.stack([np.arange(len(k_starts)), np.ones_like(k_starts), k_starts, k_lengths], axis=1)
    blocks = [_padded(sequences[rows], instructions() == "AVX2") for rows in groups]
    return Plan(blocks, k_starts, k_starts + k_lengths)


def attention_forward(q: Array, k: Array, v: Array, plan: Plan | Decoding, scale: float) -> tuple[Array, Any]:
    """q: (tokens, heads, head_dim), k, v: (kv_tokens, kv_heads, head_dim) -> o: (tokens, heads, head_dim).

    plan: from `attention_plan`, where rows of q that belong to no sequence come out as zeros, or `decoding_plan`.
    Sequences may share rows of k and v, but have no backward then.
    """
    if isinstance(plan, Decoding):
        return _of_one_query_each(q, k, v, plan, scale), None
    heads, kv_heads, head_dim = q.shape[1], *k.shape[1:]
    o = np.zeros_like(q)
    by_key_head = o.reshape(len(o), kv_heads, heads // kv_heads, head_dim)
    sums = []
    for block in _fitting(plan.blocks, heads, kv_heads):
        p, _ = _scores(q, k, block, scale)  # P^T: (blocks, kv_heads, keys, group * rows)
        top = p.max(axis=-2, keepdims=True)
        p -= top
        np.exp(p, out=p)
        out, total = _weighted(p, v.take(block.keys, axis=0).swapaxes(1, 2), block.in_groups)
        out /= total.swapaxes(-1, -2)
        by_key_head[block.queries] = _by_row(out, block)  # padding writes the last query's once more
        sums.append((top, total))
    return o, (q, k, v, o, sums, plan, scale)


def attention_backward(do: Array, saved: Any) -> tuple[Array, Array, Array]:
    """do: (tokens, heads, head_dim) -> dq: like q, dk, dv: like k.

    Raises ValueError where sequences share rows of k and v: these have gradients of one sequence each; and after a
    `decoding_plan`.
    """
    if saved is None:
        raise ValueError("a plan for decoding has no backward")
    q, k, v, o, sums, plan, scale = saved
    if plan.keys_are_shared():
        raise ValueError("sequences share rows of k and v; there is a backward only where each has its own")
    heads, kv_heads = q.shape[1], k.shape[1]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    do_o = np.einsum("thd,thd->th", do, o)[..., None]
    for block, (top, total) in zip(_fitting(plan.blocks, heads, kv_heads), sums, strict=True):
        p, q_columns = _scores(q, k, block, scale)  # P^T: (blocks, kv_heads, keys, group * rows)
        padding = np.tile(block.padding, heads // kv_heads)[:, None, None]
        p -= np.where(padding, q.dtype.type(np.inf), np.log(total) + top)  # L
        np.exp(p, out=p)
        do_columns = _columns(do, kv_heads, block)
        dv_block = (p @ do_columns.swapaxes(-1, -2)).swapaxes(1, 2)
        ds = v.take(block.keys, axis=0).swapaxes(1, 2) @ do_columns
        ds -= _columns(do_o, kv_heads, block)
        ds *= p
        dk_block = (ds @ q_columns.swapaxes(-1, -2)).swapaxes(1, 2)  # the scale is in q_columns
        dq_block = ds.swapaxes(-1, -2) @ k.take(block.keys, axis=0).swapaxes(1, 2)
        dq_block *= scale
        dq_rows = _by_row(dq_block, block).reshape(len(dq_block), -1, *q.shape[1:])
        for i, (rows, keys) in enumerate(block.sizes):  # one by one, since blocks of a sequence share keys
            first_query, first_key = block.queries[i, 0], block.keys[i, 0]
            dq[first_query : first_query + rows] = dq_rows[i, :rows]
            dk[first_key : first_key + keys] += dk_block[i, :keys]
            dv[first_key : first_key + keys] += dv_block[i, :keys]
    return dq, dk, dv


def _of_one_query_each(q: Array, k: Array, v: Array, plan: Decoding, scale: float) -> Array:
    """What `attention_forward` gives. P: (sequences, kv_heads, group / at_once, at_once, keys)."""
    heads, kv_heads, head_dim = q.shape[1], *k.shape[1:]
    group = heads // kv_heads
    at_once = group if group > FEW else 1
    o = np.empty_like(q)
    for all_rows, all_keys, mask in plan.groups:
        count = max(1, SCORES // (heads * all_keys.shape[1]))  # at once
        for first in range(0, len(all_keys), count):
            part = slice(first, first + count)
            keys = all_keys[part]
            rows = part if isinstance(all_rows, slice) else all_rows[part]
            q_rows = (q[rows] * scale).reshape(-1, kv_heads, group // at_once, at_once, head_dim)
            p = q_rows @ k.take(keys, axis=0).transpose(0, 2, 3, 1)[:, :, None]
            if mask is not None:
                p += mask[part]
            p -= p.max(axis=-1, keepdims=True)
            np.exp(p, out=p)
            out = p @ v.take(keys, axis=0).swapaxes(1, 2)[:, :, None]
            out /= p.sum(axis=-1, keepdims=True)
            o[rows] = out.reshape(-1, heads, head_dim)
    return o


def _padded_keys(
    rows: slice | Index, k_starts: Index, k_lengths: Index
) -> tuple[slice | Index, Index, Array | None]:
    """A group of Decoding."""
    key, last = np.arange(k_lengths.max()), k_lengths[:, None] - 1
    if len(key) == k_lengths.min():
        return rows, k_starts[:, None] + key, None
    mask = np.where(key > last, np.float32(-np.inf), np.float32(0))[:, None, None, None]
    return rows, k_starts[:, None] + np.minimum(key, last), mask


def _padded(blocks: Index, in_groups: bool) -> Blocks:
    """(blocks, 4): of some rows that see some keys, each (first row of q, rows, first row of k, keys)."""
    q_firsts, rows, k_firsts, seen = blocks.T[..., None]  # (blocks, 1)
    sizes = list(zip(rows[:, 0].tolist(), seen[:, 0].tolist(), strict=True))
    most, most_seen = int(rows.max()), int(seen.max())
    row = np.arange(1 if most == 1 else -(-most // ROUND) * ROUND)
    key = np.arange(-(-most_seen // GROUP) * GROUP if in_groups else most_seen)
    own_row = np.minimum(row, rows - 1)
    queries = q_firsts + own_row
    keys = k_firsts + np.minimum(key, seen - 1)
    if len(set(sizes)) == 1:
        rows, seen, own_row = rows[:1], seen[:1], own_row[:1]
    last = seen - rows + own_row  # (blocks, rows), the last key that each query sees
    hidden = key[last.min() + 1 :, None] > last[:, None, :]
    mask = np.where(hidden, np.float32(-np.inf), np.float32(0))
    return Blocks(queries, keys, sizes, row >= rows, mask[:, :, None], in_groups)


def _fitting(blocks: list[Blocks], heads: int, kv_heads: int) -> Iterator[Blocks]:
    """As many blocks of one shape at once as SCORES allows, each with two rows or more to a head of keys: BLAS has
    another function for a single one."""
    for block in blocks:
        if block.queries.shape[1] * heads == kv_heads:
            queries, mask = block.queries.repeat(2, axis=1), block.mask.repeat(2, axis=-1)
            block = replace(block, queries=queries, mask=mask, padding=np.tile([False, True], (len(mask), 1)))
        count = max(1, SCORES // (heads * block.queries.shape[1] * block.keys.shape[1]))
        if count >= len(block.queries):
            yield block
            continue
        for first in range(0, len(block.queries), count):
            part = slice(first, first + count)
            padding, mask = block.padding, block.mask
            if len(mask) > 1:
                padding, mask = padding[part], mask[part]
            sizes = block.sizes[part]
            yield Blocks(block.queries[part], block.keys[part], sizes, padding, mask, block.in_groups)


def _scores(q: Array, k: Array, block: Blocks, scale: float) -> tuple[Array, Array]:
    """scale K Q^T + mask of some blocks: (blocks, kv_heads, keys, group * rows), and scale Q^T.

    q: (tokens, heads, head_dim), k: (kv_tokens, kv_heads, head_dim).
    """
    k_block = k.take(block.keys, axis=0).swapaxes(1, 2)  # (blocks, kv_heads, keys, head_dim)
    q_columns = _columns(q, k.shape[1], block, scale)
    scores: Array
    if q_columns.shape[-1] % ROUND == 0 and not block.in_groups:
        scores = k_block @ q_columns
    else:
        multiply = times_in_groups if block.in_groups else np.matmul
        scores = multiply(q_columns.swapaxes(-1, -2), k_block.swapaxes(-1, -2))
        # All columns in one row of memory: few at a time, NumPy's maxima and sums would be slow.
        scores = np.ascontiguousarray(scores.transpose(3, 0, 1, 2)).transpose(1, 2, 0, 3)
    blocks, kv_heads, keys, _ = scores.shape
    last_keys, _, rows = block.mask.shape[1:]
    if last_keys > 0:
        grouped = scores.reshape(blocks, kv_heads, keys, -1, rows)
        grouped[:, :, keys - last_keys :] += block.mask[:, None]
    return scores, q_columns


def _weighted(p: Array, v: Array, in_groups: bool) -> tuple[Array, Array]:
    """P V and the sums of P's rows. p: P^T: (blocks, kv_heads, keys, n), v: (blocks, kv_heads, keys, head_dim)
    -> (blocks, kv_heads, n, head_dim), (blocks, kv_heads, 1, n)."""
    tiles = [slice(first, first + KEY_TILE) for first in range(0, p.shape[2], KEY_TILE)]
    multiply = times_in_groups if in_groups else np.matmul
    out = reduce(np.add, [multiply(p[:, :, tile].swapaxes(-1, -2), v[:, :, tile]) for tile in tiles])
    return out, reduce(np.add, [p[:, :, tile].sum(axis=-2, keepdims=True) for tile in tiles])


def _columns(x: Array, kv_heads: int, block: Blocks, scale: float = 1) -> Array:
    """scale times the rows of x: (tokens, heads, n) that some blocks have, lying as columns, those of heads that share
    keys side by side: (blocks, kv_heads, n, group * rows)."""
    (blocks, rows), (_, heads, n) = block.queries.shape, x.shape
    by_row = x.take(block.queries, axis=0).reshape(blocks, rows, kv_heads, heads // kv_heads, n)
    columns = np.multiply(by_row.transpose(0, 2, 4, 3, 1), scale, order="C", dtype=x.dtype)
    return columns.reshape(blocks, kv_heads, n, -1)


def _by_row(x: Array, block: Blocks) -> Array:
    """(blocks, kv_heads, group * rows, n) -> (blocks, rows, kv_heads, group, n), not copied."""
    blocks, kv_heads, _, n = x.shape
    return x.reshape(blocks, kv_heads, -1, block.queries.shape[1], n).transpose(0, 3, 1, 2, 4)
