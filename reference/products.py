"""Products of rows with a matrix in which a row has the same bits among any other rows.

BLAS adds up in an order that may depend on how many rows there are, and on where a row stands among them. What is done
about that follows OpenBLAS (0.3.31), which NumPy's wheels bring, on processors with AVX-512 and with AVX2. With another
BLAS a row has its bits up to rounding.
"""

from contextlib import nullcontext
from functools import lru_cache, reduce
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

from .side_by_side import on_one_core, side_by_side, width

Array = NDArray[np.floating]

# With AVX-512 products of so few multiplications are formed without copying the operands first, the columns beyond a
# multiple of 16 in another way; larger ones are summed over d_in in parts of 448.
UNPACKED = 1_000_000
ROUND = 16
PART = 448
PANEL = 64  # columns of W^T that stay in a core's cache while few rows are multiplied with them
# With AVX2 4 rows and 8 rows are summed in the same order, with columns in eights and at most 256 of them.
GROUP = 8
COLUMNS = 256
ONE_CORE = 1 << 18  # multiplications up to which BLAS leaves a product to one core

SHARED = 30_000_000  # multiplications of a product in groups from which several cores are faster
FEW = 32  # rows up to which copying the matrix takes longer than multiplying


@lru_cache
def instructions() -> str:
    """What OpenBLAS uses: "AVX-512", "AVX2", or "" for something else, or where BLAS is another."""
    kinds = dict.fromkeys(("SkylakeX", "Cooperlake", "SapphireRapids"), "AVX-512")
    kinds |= dict.fromkeys(("Haswell", "Zen"), "AVX2")
    used = [library["architecture"] for library in threadpool_info() if library["internal_api"] == "openblas"]
    return kinds.get(used[0], "") if used else ""


def as_panels(w: Array) -> Array | None:
    """A frozen W: (d_out, d_in) as W^T in panels of 64 columns, (d_out / 64, d_in, 64), where few rows are multiplied
    with these in less time, half of it, that of reading W; None elsewhere."""
    d_out, d_in = w.shape
    if d_out % PANEL > 0 or instructions() != "AVX-512":
        return None
    return np.ascontiguousarray(w.T.reshape(d_in, -1, PANEL).swapaxes(0, 1))


def times_exactly(x: Array, wt: Array) -> Array:
    """x @ wt: x: (..., rows, d_in), wt: (..., d_in, d_out) -> (..., rows, d_out), with a row's own bits where wt lies
    row by row; as fast with few rows as with many."""
    if instructions() == "AVX2":
        return times_in_groups(x, wt)
    if wt.strides[-1] != wt.itemsize or instructions() == "":
        return x @ wt
    (rows, d_in), d_out = x.shape[-2:], wt.shape[-1]
    if rows == 1:  # BLAS has another function for a single one
        return times_exactly(np.repeat(x, 2, axis=-2), wt)[..., :1, :]
    rest = d_out % ROUND if d_out % ROUND != 1 or d_out == 1 else ROUND + 1
    if rest > 0:
        by_column = np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
        last = _in_parts(by_column, wt[..., d_out - rest :])
        return (
            last
            if rest == d_out
            else np.concatenate([times_exactly(x, wt[..., : d_out - rest]), last], axis=-1)
        )
    if wt.ndim > 2 or rows > FEW or rows * d_in * d_out <= UNPACKED:
        return _in_parts(x, wt)
    columns = max(ROUND, UNPACKED // (rows * min(d_in, PART)) // ROUND * ROUND)
    starts = range(0, d_out, columns)
    return np.concatenate([_in_parts(x, wt[:, start : start + columns]) for start in starts], axis=-1)


def times_quickly(x: Array, wt: Array) -> Array:
    """x @ wt: x: (rows, d_in), wt: (d_in, d_out). With AVX2 BLAS takes longer for a few rows than for up to three more
    that make whole groups, up to twice, so zeros fill them up; not a single one, which BLAS has a function for."""
    rows = len(x)
    if rows == 1 or rows > FEW or -rows % _group(rows) >= GROUP // 2 or instructions() != "AVX2":
        return x @ wt
    return (_in_whole_groups(x) @ wt)[:rows]


def times_panels(x: Array, panels: Array) -> Array:
    """x W^T: x: (rows, d_in), panels: (d_out / 64, d_in, 64) -> (rows, d_out), with the bits of `times_exactly`."""
    if len(x) == 1:
        return times_panels(np.repeat(x, 2, axis=0), panels)[:1]
    y = np.empty((len(x), len(panels), PANEL), x.dtype)
    by_panel = y.swapaxes(0, 1)
    first, *others = _parts(x.shape[1])
    np.matmul(x[:, first], panels[:, first], out=by_panel)
    for part in others:
        by_panel += x[:, part] @ panels[:, part]
    return y.reshape(len(x), len(panels) * PANEL)


def _in_parts(x: Array, wt: Array) -> Array:
    """x @ wt, the sum over d_in in parts where BLAS would not do that itself."""
    rows, d_in = x.shape[-2:]
    # On several cores BLAS halves a d_in that is no multiple of 32 in another place.
    large = rows * d_in * wt.shape[-1] > UNPACKED and d_in % (2 * ROUND) == 0
    if d_in <= PART or large:
        return x @ wt
    return reduce(np.add, [x[..., part] @ wt[..., part, :] for part in _parts(d_in)])


@lru_cache
def _parts(d_in: int) -> list[slice]:
    """d_in as OpenBLAS cuts it: into parts of PART, what remains below twice that into two about equal ones."""
    parts, first = [], 0
    while first < d_in:
        left = d_in - first
        size = PART if left >= 2 * PART else left if left <= PART else -(-(left // 2) // ROUND) * ROUND
        parts.append(slice(first, first + size))
        first += size
    return parts


def times_in_groups(x: Array, wt: Array) -> Array:
    """x @ wt, some rows and columns at a time: the rows filled up with zeros; the last columns are eight, some of which
    may have been among others before."""
    *more, rows, d_in = x.shape
    d_out = wt.shape[-1]
    if d_out < GROUP:
        padding = np.zeros((*wt.shape[:-1], GROUP - d_out), wt.dtype)
        return times_in_groups(x, np.concatenate([wt, padding], axis=-1))[..., :d_out]
    group = _group(rows)
    groups = _in_whole_groups(x).reshape(*more, -1, group, d_in)
    y = np.empty((*groups.shape[:-1], d_out), x.dtype)

    def multiply(some: slice) -> None:
        own = (wt[some] if more else wt)[..., None, :, :]
        for start in range(0, d_out, COLUMNS):
            end = min(start + COLUMNS, d_out) // GROUP * GROUP
            np.matmul(groups[some], own[..., start:end], out=y[some, ..., start:end])
        if d_out % GROUP > 0:
            y[some, ..., -GROUP:] = groups[some] @ own[..., -GROUP:]

    cores = min(width(), len(groups)) if rows * wt.size >= SHARED else 1
    cuts = [len(groups) * core // cores for core in range(cores + 1)]
    with on_one_core() if group * min(d_out, COLUMNS) * d_in > ONE_CORE else nullcontext():
        side_by_side(multiply, [slice(*ends) for ends in pairwise(cuts)])
    return y.reshape(*more, -1, d_out)[..., :rows, :]


def _group(rows: int) -> int:
    """How many rows go together where there are so many."""
    return GROUP if rows > GROUP // 2 else GROUP // 2


def _in_whole_groups(x: Array) -> Array:
    """x: (..., rows, d_in), with rows of zeros at the end where there are no whole groups."""
    *more, rows, d_in = x.shape
    missing = -rows % _group(rows)
    return np.concatenate([x, np.zeros((*more, missing, d_in), x.dtype)], axis=-2) if missing > 0 else x
