"""A frozen linear layer with low-rank adapters (Hu et al. 2021, arXiv:2106.09685).

forward    y  = x W^T + bias + s (x A^T) B^T        A, B, s of the row's adapter
backward   u  = s dy B
           dx = dy W + u A
           dA = u^T x
           dB = s dy^T (x A^T)

W + s B A is never formed for the rows to go through: a choice by the number of tokens would change their bits.
Three kernels, each for both directions, since W^T and A^T are W and A with other strides:

narrow     xa = s x A^T                    u  = s dy B
product    y  = x W^T + xa B^T + bias      dx = dy W + u A       both products into one accumulator
gradient   dB = dy^T xa                    dA = u^T x            chunks of tokens first, then their sum

The product needs xa only after x W^T, so from Hopper on it begins beside narrow and waits for it there (programmatic
dependent launch). When decoding, narrow is a few programs that take nearly as long as the product.

Rows of many adapters stand in one tile in any order. For them the product adds xa B^T of one adapter after the other
to all rows, and takes from each sum the rows that have that adapter.

To sample, linears of the same x, as those of q, k and v, go together: their W stand below each other, so do their A and
their B, and each column of y has the part of xa that is its linear's.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from .array import INTERPRETED, array, cdiv, next_power_of_2, sum_dtype

# The order of every sum: over d_in, d_out, rank and tokens in blocks of this many numbers, by dtype alone.
_BLOCK_K = {torch.bfloat16: 64, torch.float32: 32, torch.float64: 16}
# The tiles partition the output and order no sum, so they may vary: rows, columns, numbers of d_in at once, warps,
# stages of the pipeline. Few rows (decoding) take narrow tiles, so that all multiprocessors read from W, and so that
# one has room for a program of narrow beside the product's. 64 rows are the fewest: below that Hopper takes another
# instruction, which may round otherwise. With tensor cores a block of d_in is added up 16 numbers after the other, so
# its size orders nothing. Without them, as in float32, operands go through registers, and tiles are small.
_FEW_ROWS, _SOME_ROWS, _FEW_COLUMNS = 128, 512, 1024
_TILE_OF_FEW = {
    torch.bfloat16: (64, 32, 128, 4, 4),
    torch.float32: (64, 32, 32, 4, 4),
    torch.float64: (64, 32, 16, 4, 3),
}
_TILE_OF_FEW_COLUMNS = _TILE_OF_FEW | {torch.bfloat16: (64, 16, 128, 4, 4)}
_TILE_OF_MANY = {
    torch.bfloat16: (128, 256, 64, 8, 4),
    torch.float32: (64, 64, 32, 4, 3),
    torch.float64: (64, 64, 16, 4, 3),
}
_TILE_OF_SOME = _TILE_OF_MANY | {torch.bfloat16: (64, 64, 128, 4, 3)}
# Of several results at once, which many rows of many adapters need, no larger one fits the registers.
_TILE_OF_MIXED = _TILE_OF_MANY | {torch.bfloat16: (128, 128, 64, 8, 4)}
_EACH = 128  # columns of xa B^T formed at once, of as many adapters as have room
_MOST_RANK = {torch.bfloat16: 128, torch.float32: 64, torch.float64: 64}  # columns of a tile over rank
_FEW_OF_RANK = 16  # the same of few rows, twice that where they have many adapters
_CHUNK = 512  # tokens of one partial sum of dA, dB
_PARTIAL_BYTES = 64 << 20  # of partial sums that exist at once, about


def lora_linear_forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    adapter: torch.Tensor | None,
    exact: bool = False,
    parts: Sequence[int] | None = None,
) -> tuple[torch.Tensor, Any]:
    """x: (tokens, d_in), w: (d_out, d_in), bias: (d_out,) or None -> y: (tokens, d_out).

    a: (adapters, rank, d_in), b: (adapters, d_out, rank), scale: (adapters,); all None: no adapter at all.
    adapter: (tokens,) int64, the adapter of each row, -1 for none; None: adapter 0 for every row.
    exact: whether a row shall have its bits among any others, which here it always has.
    parts: d_out of each of up to three linears whose W stand below each other in w, their B in b, and their A in
    a: (adapters, linears * rank, d_in); y has the bits that they give one by one, where these are finite, and no
    backward. None: one linear.
    x, w, bias, a and b have one dtype, y too; scale is float32. w, a and b may have any strides.
    """
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    if a is None or b is None or scale is None:
        return _product(x, w, bias), (x, w, None, None, None, None, None)
    scale = scale.contiguous()
    adapter = None if adapter is None else adapter.contiguous()
    xa = _narrow(x, a, scale, adapter)
    y = _product(x, w, bias, xa, b, adapter, parts)
    return y, None if parts else (x, w, a, b, scale, adapter, xa)


def lora_linear_backward(
    dy: torch.Tensor, saved: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dy: (tokens, d_out) -> dx: (tokens, d_in), da: (adapters, rank, d_in), db: (adapters, d_out, rank).

    da and db are float32, float64 for a float64 dy.
    """
    x, w, a, b, scale, adapter, xa = saved
    dy = dy.contiguous()
    if a is None:
        return _product(dy, w.mT, None), None, None
    u = _narrow(dy, b.mT, scale, adapter)
    dx = _product(dy, w.mT, None, u, a.mT, adapter)
    da, db = (torch.zeros(like.shape, dtype=_wide(dy), device=dy.device) for like in (a, b))
    _gradient(u, x, adapter, da)
    _gradient(xa, dy, adapter, db.mT)
    return dx, da, db


def lora_weight(w: Any, dtype: Any = "float32", device: str | None = None) -> torch.Tensor:
    """A frozen W: (d_out, d_in) as it lies best in memory: here row by row. dtype and device as in `array`."""
    return array(w, dtype, device)


def lora_panels(w: torch.Tensor) -> torch.Tensor:
    """A frozen W: (d_out, d_in) as it lies best for sampling: here no otherwise than for training."""
    return w


def _narrow(
    x: torch.Tensor, a: torch.Tensor, scale: torch.Tensor, adapter: torch.Tensor | None
) -> torch.Tensor:
    """x: (tokens, d_in), a: (adapters, rank, d_in) -> s x A^T: (tokens, rank), rows without adapter unwritten."""
    tokens, d_in = x.shape
    adapters, rank, _ = a.shape
    xa = torch.empty((tokens, rank), dtype=x.dtype, device=x.device)
    block_r = _block_r(rank, x.dtype)
    if tokens <= _FEW_ROWS:
        block_r = min(block_r, _FEW_OF_RANK if adapter is None else 2 * _FEW_OF_RANK)
    grid = (cdiv(tokens, 64), cdiv(rank, block_r), 1 if adapter is None else adapters)
    _narrow_kernel[grid](
        x,
        a,
        scale,
        adapter,
        xa,
        tokens,
        d_in,
        rank,
        *a.stride(),
        BLOCK_M=64,
        BLOCK_R=block_r,
        BLOCK_K=2 * _BLOCK_K[x.dtype],
        OVERLAPS=_overlaps(),
        SUM=sum_dtype(x),
        num_stages=4,
    )
    return xa


@triton.jit(do_not_specialize=["tokens"])
def _narrow_kernel(
    x_ptr,
    a_ptr,
    scale_ptr,
    adapter_ptr,
    xa_ptr,
    tokens,
    d_in,
    rank,
    a_stride,
    a_stride_rank,
    a_stride_in,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SUM: tl.constexpr,
):
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = rows < tokens
    if adapter_ptr is not None:
        mine = mine & (tl.load(adapter_ptr + rows, mask=mine, other=-1) == i)
    if tl.max(mine.to(tl.int32), axis=0) == 0:
        return
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * d_in + k[None, :]
    a_ptrs = a_ptr + tl.cast(i, tl.int64) * a_stride + r[None, :] * a_stride_rank + k[:, None] * a_stride_in
    xa = tl.zeros((BLOCK_M, BLOCK_R), SUM)
    for start in range(0, d_in, BLOCK_K):
        inside = k < d_in - start
        x = tl.load(x_ptrs, mask=mine[:, None] & inside[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
        xa = tl.dot(x, a, xa, input_precision="ieee", out_dtype=SUM)
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K * a_stride_in
    xa = tl.load(scale_ptr + i).to(SUM) * xa
    xa_ptrs = xa_ptr + rows.to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(xa_ptrs, xa.to(xa_ptr.dtype.element_ty), mask=mine[:, None] & (r < rank)[None, :])


def _product(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    adapter: torch.Tensor | None = None,
    parts: Sequence[int] | None = None,
) -> torch.Tensor:
    """x: (tokens, d_in), w: (d_out, d_in), xa: (tokens, linears * rank), b: (adapters, d_out, rank)
    -> y: (tokens, d_out)."""
    tokens, d_in = x.shape
    d_out = len(w)
    rank = 0 if b is None else b.shape[2]
    if tokens <= _FEW_ROWS:
        tiles = _TILE_OF_FEW_COLUMNS if d_out <= _FEW_COLUMNS else _TILE_OF_FEW
    elif tokens <= _SOME_ROWS:
        tiles = _TILE_OF_SOME
    else:
        tiles = _TILE_OF_MANY if adapter is None else _TILE_OF_MIXED
    block_m, block_n, block_k, warps, stages = tiles[x.dtype]
    y = torch.empty((tokens, d_out), dtype=x.dtype, device=x.device)
    grid = (cdiv(tokens, block_m) * cdiv(d_out, block_n),)
    overlaps = b is not None and b.numel() > 0 and _overlaps()  # of nothing there is no narrow
    _product_kernel[grid](
        x,
        w,
        bias,
        xa,
        b,
        adapter,
        y,
        tokens,
        d_in,
        d_out,
        rank,
        *_ends(d_out, parts),
        *w.stride(),
        *((0, 0, 0) if b is None else b.stride()),
        LINEARS=len(parts or [d_out]),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=min(_BLOCK_K[x.dtype], _block_r(rank, x.dtype)),
        ADAPTERS=max(1, _EACH // block_n),
        ONE_TILE=rank <= _BLOCK_K[x.dtype],
        APART=x.dtype != torch.bfloat16,
        OVERLAPS=overlaps,
        SUM=sum_dtype(x),
        num_warps=warps,
        num_stages=stages,
        **({"launch_pdl": True} if overlaps else {}),
    )
    return y


@triton.jit(do_not_specialize=["tokens"])
def _product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    xa_ptr,
    b_ptr,
    adapter_ptr,
    y_ptr,
    tokens,
    d_in,
    d_out,
    rank,
    end_0,
    end_1,
    w_stride_out,
    w_stride_in,
    b_stride,
    b_stride_out,
    b_stride_rank,
    LINEARS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ADAPTERS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    APART: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SUM: tl.constexpr,
):
    # Programs that run at the same time share few rows of x and few of W: down 16 tiles, then to the right.
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_M), tl.cdiv(d_out, BLOCK_N)
    pid = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(pid // column_tiles, pid % column_tiles, row_tiles, column_tiles, 16)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = (rows < tokens)[:, None], (columns < d_out)[None, :]

    if adapter_ptr is not None:  # here, so that it is there when it is asked for
        adapter = tl.load(adapter_ptr + rows, mask=rows < tokens, other=-1).to(tl.int32)
    y = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * d_in + k[None, :]
    w_ptrs = w_ptr + columns.to(tl.int64)[None, :] * w_stride_out + k[:, None] * w_stride_in
    for start in range(0, d_in, BLOCK_K):
        inside = k < d_in - start
        x = tl.load(x_ptrs, mask=row_mask & inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=inside[:, None] & column_mask, other=0.0)
        y = tl.dot(x, w, y, input_precision="ieee", out_dtype=SUM)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * w_stride_in

    if xa_ptr is not None:
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()  # for narrow; what was read so far was there before narrow began
        # Without tensor cores numbers are added one by one, so the adapter's begin at 0 and not where W's ended: each
        # sum loses less the shorter it is.
        of_w = y
        if APART:
            y = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        xa_row = xa_ptr + rows.to(tl.int64)[:, None] * (LINEARS * rank)
        b_row = b_ptr + columns.to(tl.int64)[None, :] * b_stride_out
        if LINEARS == 1 and adapter_ptr is None:
            y = _expansion(y, xa_row, b_row, row_mask, column_mask, rank, b_stride_rank, BLOCK_R, SUM)
        else:
            first, end = column_tile * BLOCK_N, tl.minimum(column_tile * BLOCK_N + BLOCK_N, d_out)
            for i in range(_linear(first, end_0, end_1), _linear(end - 1, end_0, end_1) + 1):
                own = column_mask & (_linear(columns, end_0, end_1) == i)[None, :]
                xa_own = xa_row + i * rank
                if adapter_ptr is None:
                    y = _expansion(y, xa_own, b_row, row_mask, own, rank, b_stride_rank, BLOCK_R, SUM)
                else:
                    each = _expansion_of_each(
                        y, xa_own, b_ptr, adapter, i, first, d_out, rank, end_0, end_1,
                        b_stride, b_stride_out, b_stride_rank, BLOCK_M, BLOCK_N, BLOCK_R, ADAPTERS, ONE_TILE, SUM,
                    )  # fmt: skip
                    y = tl.where((adapter >= 0)[:, None] & own, each, y)

        if APART:
            y += of_w
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < d_out, other=0.0).to(SUM)[None, :]
    y_at = rows.to(tl.int64)[:, None] * d_out + columns[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit
def _expansion(
    y, xa_row, b_row, row_mask, column_mask, rank, b_stride_rank, BLOCK_R: tl.constexpr, SUM: tl.constexpr
):
    """y + xa B^T of one adapter. xa_row: (rows, 1) and b_row: (1, columns) point to where each begins."""
    r = tl.arange(0, BLOCK_R)
    for start in range(0, rank, BLOCK_R):
        inside = r < rank - start
        xa_at, b_at = (start + r)[None, :], (start + r)[:, None] * b_stride_rank
        xa = tl.load(xa_row + xa_at, mask=row_mask & inside[None, :], other=0.0)
        b = tl.load(b_row + b_at, mask=inside[:, None] & column_mask, other=0.0)
        y = tl.dot(xa, b, y, input_precision="ieee", out_dtype=SUM)
    return y


@triton.jit
def _expansion_of_each(
    y,
    xa_row,
    b_ptr,
    adapter,
    linear,
    first,
    d_out,
    rank,
    end_0,
    end_1,
    b_stride,
    b_stride_out,
    b_stride_rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ADAPTERS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SUM: tl.constexpr,
):
    """y + xa B^T of each row's adapter, (rows,), in the columns of a linear, for rows that have one; first: the tile's
    first."""
    has_one = (adapter >= 0)[:, None]
    lowest, highest = tl.min(tl.where(adapter < 0, 1 << 30, adapter), axis=0), tl.max(adapter, axis=0)
    # The columns of some adapters, one's beside the other's.
    n = tl.arange(0, ADAPTERS * BLOCK_N)
    column, nth = first + n % BLOCK_N, n // BLOCK_N
    own = (column < d_out) & (_linear(column, end_0, end_1) == linear)
    y_each = tl.broadcast_to(y[:, None, :], (BLOCK_M, ADAPTERS, BLOCK_N))
    y_each = tl.reshape(y_each, (BLOCK_M, ADAPTERS * BLOCK_N))
    found = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    b_row = (
        b_ptr + (lowest + nth).to(tl.int64)[None, :] * b_stride + column.to(tl.int64)[None, :] * b_stride_out
    )
    r = tl.arange(0, BLOCK_R)[:, None]
    xa = tl.load(xa_row + tl.trans(r), mask=has_one & (tl.trans(r) < rank), other=0.0)
    for i in tl.range(lowest, highest + 1, ADAPTERS, num_stages=8 if ONE_TILE else 1):
        there = (own & (i + nth <= highest))[None, :]
        if ONE_TILE:  # one loop, so that several B are on their way at once
            b = tl.load(b_row + r * b_stride_rank, mask=(r < rank) & there, other=0.0)
            z = tl.dot(xa, b, y_each, input_precision="ieee", out_dtype=SUM)
        else:
            z = _expansion(y_each, xa_row, b_row, has_one, there, rank, b_stride_rank, BLOCK_R, SUM)
        of_row = (adapter[:, None] == i + tl.arange(0, ADAPTERS)[None, :])[:, :, None]
        z = tl.reshape(z, (BLOCK_M, ADAPTERS, BLOCK_N))
        found += tl.sum(tl.where(of_row, z, 0.0), axis=1)  # at most one is not 0
        b_row += ADAPTERS * b_stride
    return found


@triton.jit
def _linear(column, end_0, end_1):
    """Which linear a column is of; end_0 and end_1: where the first and the second end."""
    return (column >= end_0).to(tl.int32) + (column >= end_1).to(tl.int32)


def _ends(d_out: int, parts: Sequence[int] | None) -> tuple[int, int]:
    """Where the first and the second of the linears end among d_out columns."""
    first, second = [*(parts or [d_out]), 0][:2]
    return first, first + second if len(parts or []) > 1 else d_out


def _gradient(u: torch.Tensor, x: torch.Tensor, adapter: torch.Tensor | None, da: torch.Tensor) -> None:
    """da: (adapters, rank, d_in) += u^T x over the rows of each adapter; u: (tokens, rank), x: (tokens, d_in)."""
    (tokens, d_in), rank = x.shape, u.shape[1]
    adapters = 1 if adapter is None else len(da)
    size = adapters * rank * d_in
    block_r = _block_r(rank, x.dtype)
    step = _CHUNK * max(1, _PARTIAL_BYTES // (size * da.element_size()))
    for start in range(0, tokens, step):
        some = slice(start, min(start + step, tokens))
        chunks = cdiv(some.stop - start, _CHUNK)
        partial = torch.empty((chunks, size), dtype=da.dtype, device=da.device)
        _partial_kernel[(cdiv(d_in, 128) * cdiv(rank, block_r), chunks, adapters)](
            u[some],
            x[some],
            None if adapter is None else adapter[some],
            partial,
            some.stop - start,
            d_in,
            rank,
            size,
            *da.stride(),
            CHUNK=_CHUNK,
            BLOCK_N=128,
            BLOCK_R=block_r,
            BLOCK_T=_BLOCK_K[x.dtype],
            SUM=sum_dtype(x),
            num_stages=4,
        )
        _sum_kernel[(cdiv(size, 1024),)](partial, da, chunks, size, BLOCK=1024)


@triton.jit(do_not_specialize=["tokens"])
def _partial_kernel(
    u_ptr,
    x_ptr,
    adapter_ptr,
    partial_ptr,
    tokens,
    d_in,
    rank,
    size,
    da_stride,
    da_stride_rank,
    da_stride_in,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SUM: tl.constexpr,
):
    """x^T u of one chunk, which lies in memory as dA does (or dB): x^T, since a tile of d_in is never too narrow."""
    rank_tiles = tl.cdiv(rank, BLOCK_R)
    n = tl.program_id(0) // rank_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(0) % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    chunk, i = tl.program_id(1), tl.program_id(2)
    total = tl.zeros((BLOCK_N, BLOCK_R), SUM)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mine = t < tokens
        if adapter_ptr is not None:
            mine = mine & (tl.load(adapter_ptr + t, mask=mine, other=-1) == i)
        rows = t.to(tl.int64)
        x_mask = (n < d_in)[:, None] & mine[None, :]
        x = tl.load(x_ptr + rows[None, :] * d_in + n[:, None], mask=x_mask, other=0.0)
        u_mask = mine[:, None] & (r < rank)[None, :]
        u = tl.load(u_ptr + rows[:, None] * rank + r[None, :], mask=u_mask, other=0.0)
        total = tl.dot(x, u, total, input_precision="ieee", out_dtype=SUM)
    partial_ptr += tl.cast(chunk, tl.int64) * size + tl.cast(i, tl.int64) * da_stride
    place = n.to(tl.int64)[:, None] * da_stride_in + r[None, :] * da_stride_rank
    tl.store(partial_ptr + place, total, mask=(n < d_in)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["chunks"])
def _sum_kernel(partial_ptr, da_ptr, chunks, size, BLOCK: tl.constexpr):
    """da += the partial sums, in the order of the tokens."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    da = tl.load(da_ptr + place, mask=place < size)
    for _ in range(chunks):
        da += tl.load(partial_ptr + place, mask=place < size)
        partial_ptr += size
    tl.store(da_ptr + place, da, mask=place < size)


@cache
def _overlaps() -> bool:
    """Whether a kernel can begin before the one in front of it has ended, as from Hopper on."""
    if INTERPRETED:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 90


def _block_r(rank: int, dtype: torch.dtype) -> int:
    """Columns of a tile over rank: a power of 2, at least what a dot takes, at most what registers hold."""
    return min(_MOST_RANK[dtype], max(16, next_power_of_2(rank)))


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of gradients of A and B."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
