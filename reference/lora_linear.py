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
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[np.floating]
Index = NDArray[np.int64]


def lora_linear_forward(
    x: Array,
    w: Array,
    bias: Array | None,
    a: Array | None,
    b: Array | None,
    scale: Array | None,
    adapter: Index | None,
) -> tuple[Array, Any]:
    """x: (tokens, d_in), w: (d_out, d_in), bias: (d_out,) or None -> y: (tokens, d_out).

    a: (adapters, rank, d_in), b: (adapters, d_out, rank), scale: (adapters,); all None: no adapter at all.
    adapter: (tokens,) int64, the adapter of each row, -1 for none; None: adapter 0 for every row.
    """
    merged = xa = None
    if a is None or b is None or scale is None:
        y = x @ w.T
    elif adapter is None and _merging_pays(len(x), a, b):
        merged = lora_merge(w, a, b, scale)
        y = x @ merged.T
    elif adapter is None:
        y = x @ w.T
        xa = _scaled(x @ a[0].T, scale[0])  # (tokens, rank): s x A^T
        y += xa @ b[0].T
    else:
        y = x @ w.T
        xa = np.zeros((len(x), a.shape[1]), x.dtype)
        for i, rows in _rows_of_adapters(adapter):
            xa[rows] = _scaled(x[rows] @ a[i].T, scale[i])
            y[rows] += xa[rows] @ b[i].T
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
    for i, rows in _rows_of_adapters(adapter):
        u = _scaled(dy[rows] @ b[i], scale[i])  # (rows, rank)
        dx[rows] += u @ a[i]
        np.matmul(u.T, x[rows], out=da[i])
        np.matmul(dy[rows].T, xa[rows], out=db[i])
    return dx, da, db


def lora_weight(w: Array, dtype: DTypeLike = "float32", device: str | None = None) -> Array:
    """A frozen W: (d_out, d_in) as it lies best in memory: here column by column, so that with few rows, as in
    decoding, x W^T takes less than half the time. dtype and device as in `array`."""
    return np.asfortranarray(w, dtype=dtype)


def lora_merge(w: Array, a: Array, b: Array, scale: Array) -> Array:
    """W' = W + s B A of one adapter: w: (d_out, d_in), a: (1, rank, d_in), b: (1, d_out, rank) -> like w.

    It lies in memory column by column, as `lora_linear_forward` reads it fastest where rows are few.
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


def _rows_of_adapters(adapter: Index | None) -> Iterator[tuple[int, slice | Index]]:
    """(adapter, its rows), for each adapter that has rows."""
    if adapter is None:
        yield 0, slice(None)
    else:
        for i in np.unique(adapter[adapter >= 0]):
            yield int(i), np.flatnonzero(adapter == i)


def _scaled(x: Array, factor: Any) -> Array:
    return x if factor == 1 else x * factor
