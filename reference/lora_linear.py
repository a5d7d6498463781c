"""A frozen linear layer with low-rank adapters (Hu et al. 2021, arXiv:2106.09685).

forward    y  = x W^T + bias + s (x A^T) B^T        A, B, s of the row's adapter
backward   u  = s dy B
           dx = dy W + u A
           dA = u^T x
           dB = s dy^T (x A^T)

Where the tokens outnumber d_in d_out / (d_in + d_out), forming W' = W + s B A once takes fewer multiplications
than carrying every token through A and B, and W' less memory than x and y:

forward    y  = x W'^T + bias
backward   dx = dy W'

For a high rank on a small layer the gradients are cheaper through dW', too:

           dA = s B^T dW'     dB = s dW' A^T        with dW' = dy^T x

These are the same functions; `_merging_pays` and `_dw_pays` count.

Where each row's adapter is given, as in sampling, W' is never formed. `exact` then gives a row the same bits among any
other rows: products.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .products import as_panels, times_exactly, times_panels, times_quickly

Array = NDArray[np.floating]
Index = NDArray[np.int64]

RANK_TILE = 256
MOST_PADDING = 4  # rows that many adapters' product may take for each one that has an adapter


def lora_linear_forward(
    x: Array,
    w: Array,
    bias: Array | None,
    a: Array | None,
    b: Array | None,
    scale: Array | None,
    adapter: Index | None,
    exact: bool = False,
    parts: Sequence[int] | None = None,
) -> tuple[Array, Any]:
    """x: (tokens, d_in), w: (d_out, d_in), or in sampling what `lora_panels` made of it, bias: (d_out,) or None
    -> y: (tokens, d_out).

    a: (adapters, rank, d_in), b: (adapters, d_out, rank), scale: (adapters,); all None: no adapter at all.
    adapter: (tokens,) int64, the adapter of each row, -1 for none; None: adapter 0 for every row. exact: whether a row
    shall have its bits among any others. parts: d_out of each of up to three linears whose w, a, b and bias stand
    below each other, a: (adapters, linears * rank, d_in); there is no backward then. None: one linear.
    """
    merged = xa = None
    if a is None or b is None or scale is None:
        y = _times_base(x, w, exact)
    elif adapter is not None or parts:
        y = _times_base(x, w, exact)
        # What adapters hold that no row has is nobody's affair.
        with np.errstate(over="ignore", invalid="ignore"):
            _add_adapted(y, x, a, b, scale, adapter, exact, parts)
    elif _merging_pays(len(x), a, b):
        merged = _merge(w, a, b, scale)
        y = x @ merged.T
    else:
        y = x @ w.T
        xa = _scaled(x @ a[0].T, scale[0])  # (tokens, rank): s x A^T
        y += xa @ b[0].T
    if bias is not None:
        y += bias
    return y, (x, w, a, b, scale, adapter, merged, xa)


def lora_linear_backward(dy: Array, saved: Any) -> tuple[Array, Array | None, Array | None]:
    """dy: (tokens, d_out) -> dx: (tokens, d_in), da: (adapters, rank, d_in), db: (adapters, d_out, rank)."""
    x, w, a, b, scale, adapter, merged, xa = saved
    if a is None:
        return dy @ w, None, None
    da, db = np.zeros_like(a), np.zeros_like(b)
    if merged is not None:
        if _dw_pays(len(x), a, b):
            dw = _scaled(dy.T @ x, scale[0])  # (d_out, d_in): s dW'
            np.matmul(b[0].T, dw, out=da[0])
            np.matmul(dw, a[0].T, out=db[0])
        else:
            np.matmul(_scaled(dy @ b[0], scale[0]).T, x, out=da[0])
            np.matmul(dy.T, _scaled(x @ a[0].T, scale[0]), out=db[0])
        return dy @ merged, da, db
    dx = dy @ w
    for i, own in [(0, slice(None))] if adapter is None else _rows(adapter.tobytes(), 1).each:
        u = _scaled(dy[own] @ b[i], scale[i])  # (rows, rank)
        dx[own] += u @ a[i]
        np.matmul(u.T, x[own], out=da[i])
        np.matmul(dy[own].T, _scaled(x[own] @ a[i].T, scale[i]) if xa is None else xa, out=db[i])
    return dx, da, db


def lora_weight(w: Array, dtype: DTypeLike = "float32", device: str | None = None) -> Array:
    """A frozen W: (d_out, d_in) as it lies best in memory: here column by column, so that with few rows, as in
    decoding, x W^T takes less than half the time. dtype and device as in `array`."""
    return np.asfortranarray(w, dtype=dtype)


def lora_panels(w: Array) -> Array:
    """A frozen W: (d_out, d_in) as it lies best for sampling: as `as_panels` lays it, or as `lora_weight` does where
    panels have no use."""
    panels = as_panels(w)
    return lora_weight(w, w.dtype) if panels is None else panels


def _merge(w: Array, a: Array, b: Array, scale: Array) -> Array:
    """W' = W + s B A of one adapter: w: (d_out, d_in), a: (1, rank, d_in), b: (1, d_out, rank) -> like w.

    It lies in memory column by column, like W.
    """
    merged: Array = (a[0].T @ _scaled(b[0], scale[0]).T).T
    merged += w
    return merged


def _merging_pays(tokens: int, a: Array, b: Array) -> bool:
    """Whether W' costs less than two thin products per token; the rank is a factor of both and cancels."""
    d_in, d_out = a.shape[2], b.shape[1]
    return bool(d_in * d_out < tokens * (d_in + d_out))


def _dw_pays(tokens: int, a: Array, b: Array) -> bool:
    """Whether dW', and dA and dB from it, cost less than four thin products per token."""
    rank, d_in, d_out = a.shape[1], a.shape[2], b.shape[1]
    return bool((tokens + 2 * rank) * d_in * d_out < 2 * rank * tokens * (d_in + d_out))


@dataclass(frozen=True)
class _Table:
    """The rows of each adapter that is used, from the first one that has any to the last, for one batch of products:
    (adapters, most), which is its shape. rows: in the table, one after the other, some other row where an adapter has
    fewer; listed: the rows of adapter 0, of 1, ...; places: where in the table these are; slices where that is all in
    order."""

    used: slice
    shape: tuple[int, int]
    rows: slice | Index
    listed: slice | Index
    places: slice | Index


@dataclass(frozen=True)
class _Rows:
    """Which rows have which adapter. each: (adapter, its rows), for those that have rows, a slice where adapter 0 has
    all. table: None there, and where it would be mostly padding."""

    each: list[tuple[int, slice | Index]]
    table: _Table | None = None


@lru_cache(maxsize=8)
def _rows(adapter: bytes, least: int) -> _Rows:
    """Of the index as bytes, since the layers of a pass ask one after the other with the same. least: rows of each
    adapter in the table."""
    index = np.frombuffer(adapter, np.int64)
    listed = np.argsort(index, kind="stable")[(index < 0).sum() :]
    if len(index) > 0 and not index.any():
        return _Rows([(0, slice(None))])
    first = int(index[listed[0]]) if listed.size > 0 else 0
    counts = np.bincount(index[listed] - first)
    ends = np.cumsum(counts)
    each: list[tuple[int, slice | Index]] = [
        (int(i) + first, listed[ends[i] - counts[i] : ends[i]]) for i in np.flatnonzero(counts)
    ]
    nth = np.arange(max(least, counts.max(initial=0)))  # the nth row of an adapter
    if not 0 < counts.size * nth.size <= MOST_PADDING * listed.size:
        return _Rows(each)
    rows = listed[np.minimum((ends - counts)[:, None] + nth, listed.size - 1)].ravel()
    places = np.flatnonzero(nth < counts[:, None])
    orders = [(rows, len(index)), (listed, len(index)), (places, rows.size)]
    used, shape = slice(first, first + counts.size), (counts.size, nth.size)
    return _Rows(each, _Table(used, shape, *(_as_slice(*order) for order in orders)))


def _as_slice(index: Index, size: int) -> slice | Index:
    """The same of `size` rows, as a slice where that is all of them in order."""
    return slice(None) if np.array_equal(index, np.arange(size)) else index


def _add_adapted(
    y: Array,
    x: Array,
    a: Array,
    b: Array,
    scale: Array,
    adapter: Index | None,
    exact: bool,
    parts: Sequence[int] | None,
) -> None:
    """y += s x A^T B^T, each row with its adapter's."""
    times, rank, widths = times_exactly if exact else np.matmul, b.shape[2], tuple(parts or y.shape[1:])
    # Two rows of an adapter at least for exactness: BLAS has another function for a single one.
    index = np.zeros(len(x), np.int64) if adapter is None else adapter
    rows = _rows(index.tobytes(), 2 if exact else 1)
    if (table := rows.table) is None:
        for i, own in rows.each:
            xa = _scaled(times(x[own], a[i].T), scale[i])
            for _, part, ranks in _linears(widths, rank):
                y[own, part] += _widened(xa[:, ranks], b[i, part].T, times)
        return
    # In as few steps as can be: with an adapter for each row they take as long as what they compute.
    adapters, most = table.shape
    # (adapters, most, linears * rank)
    xa = times(x[table.rows].reshape(adapters, most, -1), a[table.used].swapaxes(-1, -2))
    np.multiply(xa, scale[table.used, None, None], out=xa, dtype=xa.dtype)
    for count, part, ranks in _linears(widths, rank, together=True):
        own_xa = xa[..., ranks].reshape(adapters, most, count, rank).swapaxes(1, 2)
        bt = b[table.used, part].swapaxes(1, 2).reshape(adapters, rank, count, -1).swapaxes(1, 2)
        wide = _widened(own_xa, bt, times).swapaxes(1, 2)  # (adapters, most, linears, d_out)
        y[table.listed, part] += wide.reshape(adapters * most, -1)[table.places]


@lru_cache(maxsize=64)
def _linears(widths: tuple[int, ...], rank: int, together: bool = False) -> list[tuple[int, slice, slice]]:
    """Of each linear, or where `together` of each run of linears of one d_out: how many these are, their columns of y,
    and their columns of x A^T. widths: d_out of each linear."""
    runs = [list(run) for _, run in groupby(range(len(widths)), widths.__getitem__ if together else None)]
    ends = [0, *accumulate(widths)]
    return [
        (len(run), slice(ends[run[0]], ends[run[-1] + 1]), slice(run[0] * rank, (run[-1] + 1) * rank))
        for run in runs
    ]


def _times_base(x: Array, w: Array, exact: bool) -> Array:
    """x W^T: x: (rows, d_in), w: (d_out, d_in) or its panels -> (rows, d_out)."""
    if w.ndim > 2:
        return times_panels(x, w)
    return times_exactly(x, w.T) if exact else times_quickly(x, w.T)


def _widened(xa: Array, bt: Array, times: Callable[[Array, Array], Array]) -> Array:
    """x A^T B^T: xa: (..., rows, rank), bt: (..., rank, d_out). The sum over a high rank goes in tiles: BLAS cuts it
    by its length, which is that of the highest rank in the batch, filled up with zeros."""
    if xa.shape[-1] <= RANK_TILE:
        return times(xa, bt)
    tiles = [slice(first, first + RANK_TILE) for first in range(0, xa.shape[-1], RANK_TILE)]
    return reduce(np.add, [times(xa[..., tile], bt[..., tile, :]) for tile in tiles])


def _scaled(x: Array, factor: Any) -> Array:
    return x if (factor == 1).all() else np.multiply(x, factor, dtype=x.dtype)
