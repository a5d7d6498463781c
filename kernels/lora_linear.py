"""A frozen linear layer with low-rank adapters (Hu et al. 2021, arXiv:2106.09685).

forward    y  = x W^T + bias + s (x A^T) B^T        A, B, s of the row's adapter
backward   u  = s dy B
           dx = dy W + u A
           dA = u^T x
           dB = s dy^T (x A^T)

W + s B A is never formed for the rows to go through: a choice by the number of tokens would change their bits.
Three kernels, each for both directions, since W^T and A^T are W and A with other strides:

narrow     xa = s x A^T                    u  = s dy B
product    y  = xa B^T + x W^T + bias      dx = u A + dy W       both products into one accumulator
gradient   dB = dy^T xa                    dA = u^T x            chunks of tokens first, then their sum

Linears of the same x, as those of q, k and v, share the launches. Rows of many adapters stand in one tile in any order;
for them `expand` forms xa and xa B^T, a program for each adapter of a tile's rows, and the product begins from what it
wrote, in full precision: the same bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .array import array, sum_dtype

Tensors = tuple[torch.Tensor, ...]  # of each linear
Linear = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # w, bias, a, b

# The order of every sum: over d_in, d_out, rank and tokens in blocks of this many numbers, by dtype alone.
_BLOCK_K = {torch.bfloat16: 64, torch.float32: 32, torch.float64: 16}
# The tiles partition the output and order no sum, so they may vary: rows, columns, numbers of d_in at once, warps,
# stages of the pipeline. A few rows (decoding) take narrow tiles, so that all multiprocessors read from W. 64 rows are
# the fewest: below that Hopper takes another instruction, which may round otherwise. With tensor cores a block of d_in
# is added up 16 numbers after the other, so its size orders nothing. Without them, as in float32, operands go through
# registers, and tiles are small.
_FEW_ROWS = 128
_TILE_OF_FEW = {
    torch.bfloat16: (64, 32, 64, 4, 8),
    torch.float32: (64, 32, 32, 4, 4),
    torch.float64: (64, 32, 16, 4, 3),
}
_TILE_OF_MANY = {
    torch.bfloat16: (128, 256, 64, 8, 4),
    torch.float32: (64, 64, 32, 4, 3),
    torch.float64: (64, 64, 16, 4, 3),
}
# Where a product begins from what `expand` wrote, that takes registers, too.
_TILE_OF_MIXED = _TILE_OF_MANY | {torch.bfloat16: (128, 128, 64, 8, 4)}
_EXPANDED = 8  # tiles of columns that a program of `expand` does
_MOST_RANK = {torch.bfloat16: 128, torch.float32: 64, torch.float64: 64}  # columns of a tile over rank
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
) -> tuple[torch.Tensor, Any]:
    """x: (tokens, d_in), w: (d_out, d_in), bias: (d_out,) or None -> y: (tokens, d_out).

    a: (adapters, rank, d_in), b: (adapters, d_out, rank), scale: (adapters,); all None: no adapter at all.
    adapter: (tokens,) int64, the adapter of each row, -1 for none; None: adapter 0 for every row.
    exact: whether a row shall have its bits among any others, which here it always has.
    x, w, bias, a and b have one dtype, y too; scale is float32. w, a and b may have any strides.
    """
    return lora_linears_forward(x, [(w, bias, a, b)], scale, adapter, exact)[0]


def lora_linears_forward(
    x: torch.Tensor,
    linears: Sequence[Linear],
    scale: torch.Tensor | None,
    adapter: torch.Tensor | None,
    exact: bool = False,
) -> list[tuple[torch.Tensor, Any]]:
    """What `lora_linear_forward` gives for each of several linears (w, bias, a, b) of the same x, to the bit, from
    launches that they share where they differ in d_out alone."""
    x = x.contiguous()
    if len(linears) > 1 and len({_layout(linear) for linear in linears}) > 1:
        return [one for linear in linears for one in lora_linears_forward(x, [linear], scale, adapter, exact)]
    ws, biases, a, b = zip(*linears, strict=True)
    added = None if biases[0] is None else tuple(bias.contiguous() for bias in biases)
    if a[0] is None or b[0] is None or scale is None:
        return [(y, (x, w, *[None] * 5)) for w, y in zip(ws, _product(x, ws, added), strict=True)]
    scale = scale.contiguous()
    adapter = None if adapter is None else adapter.contiguous()
    xa, expanded = (_narrow(x, a, scale), None) if adapter is None else _expand(x, a, b, scale, adapter)
    saved = [(x, w, *ab, scale, adapter, own) for w, *ab, own in zip(ws, a, b, xa, strict=True)]
    return list(zip(_product(x, ws, added, xa, b, adapter, expanded), saved, strict=True))


def _layout(linear: Linear) -> Any:
    """What linears that share launches have in common."""
    w, bias, a, b = linear
    adapted = None if a is None or b is None else (a.shape, a.stride(), b.stride()[1:])
    return w.stride(), bias is None, adapted


def lora_linear_backward(
    dy: torch.Tensor, saved: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dy: (tokens, d_out) -> dx: (tokens, d_in), da: (adapters, rank, d_in), db: (adapters, d_out, rank).

    da and db are float32, float64 for a float64 dy.
    """
    x, w, a, b, scale, adapter, xa = saved
    dy = dy.contiguous()
    if a is None:
        return _product(dy, (w.mT,), None)[0], None, None
    bt, at = (b.mT,), (a.mT,)
    u, expanded = (_narrow(dy, bt, scale), None) if adapter is None else _expand(dy, bt, at, scale, adapter)
    (dx,) = _product(dy, (w.mT,), None, u, at, adapter, expanded)
    da, db = (torch.zeros(like.shape, dtype=_wide(dy), device=dy.device) for like in (a, b))
    _gradient(u[0], x, adapter, da)
    _gradient(xa, dy, adapter, db.mT)
    return dx, da, db


def lora_weight(w: Any, dtype: Any = "float32", device: str | None = None) -> torch.Tensor:
    """A frozen W: (d_out, d_in) as it lies best in memory: here row by row. dtype and device as in `array`."""
    return array(w, dtype, device)


def lora_panels(w: torch.Tensor) -> torch.Tensor:
    """A frozen W: (d_out, d_in) as it lies best for sampling: here no otherwise than for training."""
    return w


def _narrow(x: torch.Tensor, a: Tensors, scale: torch.Tensor) -> torch.Tensor:
    """x: (tokens, d_in), a: (1, rank, d_in) each -> s x A^T: (linears, tokens, rank)."""
    tokens, d_in = x.shape
    rank = a[0].shape[1]
    xa = torch.empty((len(a), tokens, rank), dtype=x.dtype, device=x.device)
    few = tokens <= _FEW_ROWS
    block_r = 16 if few else _block_r(rank, x.dtype)
    _narrow_kernel[triton.cdiv(tokens, 64), len(a) * triton.cdiv(rank, block_r)](
        x,
        a,
        scale,
        xa,
        tokens,
        d_in,
        rank,
        *a[0].stride()[1:],
        BLOCK_M=64,
        BLOCK_R=block_r,
        BLOCK_K=_narrow_block_k(few, x.dtype),
        SUM=sum_dtype(x),
        num_stages=4,
    )
    return xa


@triton.jit(do_not_specialize=["tokens"])
def _narrow_kernel(
    x_ptr,
    a_ptrs,
    scale_ptr,
    xa_ptr,
    tokens,
    d_in,
    rank,
    a_stride_rank,
    a_stride_in,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
):
    rank_tiles = tl.cdiv(rank, BLOCK_R)
    linear, a_ptr = tl.program_id(1) // rank_tiles, a_ptrs[0]
    for j in tl.static_range(1, len(a_ptrs)):
        if linear == j:
            a_ptr = a_ptrs[j]
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask, r_mask = (rows < tokens)[:, None], (r < rank)[None, :]
    x_row, a_row = x_ptr + rows.to(tl.int64)[:, None] * d_in, a_ptr + r[None, :] * a_stride_rank
    xa = _reduction(x_row, a_row, row_mask, r_mask, d_in, a_stride_in, BLOCK_M, BLOCK_R, BLOCK_K, SUM)
    xa = tl.load(scale_ptr).to(SUM) * xa
    xa_at = (tl.cast(linear, tl.int64) * tokens + rows)[:, None] * rank + r[None, :]
    tl.store(xa_ptr + xa_at, xa.to(xa_ptr.dtype.element_ty), mask=row_mask & r_mask)


@triton.jit
def _reduction(
    x_row,
    a_row,
    row_mask,
    r_mask,
    d_in,
    a_stride_in,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
):
    """x A^T of one adapter. x_row: (rows, 1) and a_row: (1, columns) point to where each begins."""
    k = tl.arange(0, BLOCK_K)
    x_at, a_at = x_row + k[None, :], a_row + k[:, None] * a_stride_in
    xa = tl.zeros((BLOCK_M, BLOCK_R), SUM)
    for start in range(0, d_in, BLOCK_K):
        inside = k < d_in - start
        x = tl.load(x_at, mask=row_mask & inside[None, :], other=0.0)
        a = tl.load(a_at, mask=inside[:, None] & r_mask, other=0.0)
        xa = tl.dot(x, a, xa, input_precision="ieee", out_dtype=SUM)
        x_at += BLOCK_K
        a_at += BLOCK_K * a_stride_in
    return xa


def _narrow_block_k(few: bool, dtype: torch.dtype) -> int:
    """Numbers of d_in at once in x A^T. Only in bfloat16 may few rows take more, see _TILE_OF_FEW."""
    return (4 if few and dtype == torch.bfloat16 else 2) * _BLOCK_K[dtype]


def _expand(
    x: torch.Tensor, a: Tensors, b: Tensors, scale: torch.Tensor, adapter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (tokens, d_in), a: (adapters, rank, d_in) and b: (adapters, d_out, rank) each -> xa, as `_narrow` has it, and
    xa B^T, one linear beside the other, (tokens, all d_out), in the dtype of sums: of each row's adapter; rows without
    one are not written."""
    tokens, d_in = x.shape
    (adapters, rank, _), d_out = a[0].shape, tuple(w.shape[1] for w in b)
    block_n = 64 if x.dtype == torch.bfloat16 else 32
    columns = _EXPANDED * block_n
    xa = torch.empty((len(a), tokens, rank), dtype=x.dtype, device=x.device)
    expanded = torch.empty((tokens, sum(d_out)), dtype=_wide(x), device=x.device)
    _expand_kernel[sum(triton.cdiv(n, columns) for n in d_out), triton.cdiv(tokens, 64), adapters](
        x,
        a,
        b,
        scale,
        adapter,
        xa,
        expanded,
        tokens,
        d_in,
        d_out,
        sum(d_out),
        rank,
        *a[0].stride(),
        tuple(w.stride(0) for w in b),
        *b[0].stride()[1:],
        BLOCK_M=64,
        BLOCK_N=block_n,
        COLUMNS=columns,
        BLOCK_K=2 * _BLOCK_K[x.dtype],
        BLOCK_R=min(_BLOCK_K[x.dtype], _block_r(rank, x.dtype)),
        SUM=sum_dtype(x),
        num_warps=8,
        num_stages=3,
    )
    return xa, expanded


@triton.jit(do_not_specialize=["tokens"])
def _expand_kernel(
    x_ptr,
    a_ptrs,
    b_ptrs,
    scale_ptr,
    adapter_ptr,
    xa_ptr,
    expanded_ptr,
    tokens,
    d_in,
    d_outs,
    all_d_out,
    rank,
    a_stride,
    a_stride_rank,
    a_stride_in,
    b_strides,
    b_stride_out,
    b_stride_rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM: tl.constexpr,
):
    """COLUMNS of xa B^T of one adapter of one linear. Each such program forms all of xa, which costs less than a launch
    of its own."""
    i = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = tl.load(adapter_ptr + rows, mask=rows < tokens, other=-1) == i
    if tl.max(mine.to(tl.int32), axis=0) == 0:
        return
    part = tl.program_id(0)
    a_ptr, b_ptr, b_stride, d_out, linear, before = a_ptrs[0], b_ptrs[0], b_strides[0], d_outs[0], 0, 0
    for j in tl.static_range(1, len(b_ptrs)):
        if part >= tl.cdiv(d_outs[j - 1], COLUMNS):
            part -= tl.cdiv(d_outs[j - 1], COLUMNS)
            a_ptr, b_ptr, b_stride, d_out, linear = a_ptrs[j], b_ptrs[j], b_strides[j], d_outs[j], j
            before += d_outs[j - 1]
    # From where this tile and adapter begin on, 32 bits are enough, and take half the registers.
    first_row, adapter = tl.program_id(1).to(tl.int64) * BLOCK_M, tl.cast(i, tl.int64)
    x_ptr += first_row * d_in
    a_ptr += adapter * a_stride
    b_ptr += adapter * b_stride
    xa_ptr += (tl.cast(linear, tl.int64) * tokens + first_row) * rank
    expanded_ptr += first_row * all_d_out + before
    row, row_mask = tl.arange(0, BLOCK_M)[:, None], mine[:, None]
    scale = tl.load(scale_ptr + i).to(SUM)
    for r_start in range(0, rank, BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        r_mask = (r < rank)[None, :]
        x_row, a_row = x_ptr + row * d_in, a_ptr + r[None, :] * a_stride_rank
        xa = _reduction(x_row, a_row, row_mask, r_mask, d_in, a_stride_in, BLOCK_M, BLOCK_R, BLOCK_K, SUM)
        xa = (scale * xa).to(xa_ptr.dtype.element_ty)
        if part == 0:
            tl.store(xa_ptr + row * rank + r[None, :], xa, mask=row_mask & r_mask)
        tl.debug_barrier()  # what the threads wrote for the ranks before is there for all of them
        for start in tl.range(
            part * COLUMNS, tl.minimum(part * COLUMNS + COLUMNS, d_out), BLOCK_N, num_stages=1
        ):
            columns = (start + tl.arange(0, BLOCK_N))[None, :]
            b_at = columns * b_stride_out + r[:, None] * b_stride_rank
            b = tl.load(b_ptr + b_at, mask=(r < rank)[:, None] & (columns < d_out), other=0.0)
            y_at, y_mask = expanded_ptr + row * all_d_out + columns, row_mask & (columns < d_out)
            y = tl.zeros((BLOCK_M, BLOCK_N), SUM)
            if r_start > 0:
                y = tl.load(y_at, mask=y_mask, other=0.0)
            y = tl.dot(xa, b, y, input_precision="ieee", out_dtype=SUM)
            tl.store(y_at, y, mask=y_mask)


def _product(
    x: torch.Tensor,
    w: Tensors,
    biases: Tensors | None,
    xa: torch.Tensor | None = None,
    b: Tensors | None = None,
    adapter: torch.Tensor | None = None,
    expanded: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """x: (tokens, d_in), w: (d_out, d_in) each, xa: (linears, tokens, rank), b: (1, d_out, rank) each, or expanded:
    (tokens, all d_out) from `_expand` -> y: (tokens, d_out) each."""
    tokens, d_in = x.shape
    d_out = tuple(map(len, w))
    tiles = _TILE_OF_MANY if adapter is None else _TILE_OF_MIXED
    block_m, block_n, block_k, warps, stages = (_TILE_OF_FEW if tokens <= _FEW_ROWS else tiles)[x.dtype]
    y = [torch.empty((tokens, n), dtype=x.dtype, device=x.device) for n in d_out]
    grid = (triton.cdiv(tokens, block_m) * sum(triton.cdiv(n, block_n) for n in d_out),)
    _product_kernel[grid](
        x,
        w,
        biases,
        xa,
        b,
        adapter,
        expanded,
        tuple(y),
        tokens,
        d_in,
        d_out,
        sum(triton.cdiv(n, block_n) for n in d_out),
        sum(d_out),
        0 if xa is None else xa.shape[2],
        *w[0].stride(),
        *((0, 0) if b is None else b[0].stride()[1:]),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=_BLOCK_K[x.dtype],
        SUM=sum_dtype(x),
        num_warps=warps,
        num_stages=stages,
    )
    return y


@triton.jit(do_not_specialize=["tokens", "column_tiles"])
def _product_kernel(
    x_ptr,
    w_ptrs,
    bias_ptrs,
    xa_ptr,
    b_ptrs,
    adapter_ptr,
    expanded_ptr,
    y_ptrs,
    tokens,
    d_in,
    d_outs,
    column_tiles,
    all_d_out,
    rank,
    w_stride_out,
    w_stride_in,
    b_stride_out,
    b_stride_rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM: tl.constexpr,
):
    # Programs that run at the same time share few rows of x and few of W: down 16 tiles, then to the right.
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    pid = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(pid // column_tiles, pid % column_tiles, row_tiles, column_tiles, 16)
    # Which of the linears it is.
    w_ptr, y_ptr, d_out, linear, before = w_ptrs[0], y_ptrs[0], d_outs[0], 0, 0
    bias_ptr = None if bias_ptrs is None else bias_ptrs[0]
    b_ptr = None if b_ptrs is None else b_ptrs[0]
    for j in tl.static_range(1, len(w_ptrs)):
        if column_tile >= tl.cdiv(d_outs[j - 1], BLOCK_N):
            column_tile -= tl.cdiv(d_outs[j - 1], BLOCK_N)
            w_ptr, y_ptr, d_out, linear, before = w_ptrs[j], y_ptrs[j], d_outs[j], j, before + d_outs[j - 1]
            if bias_ptrs is not None:
                bias_ptr = bias_ptrs[j]
            if b_ptrs is not None:
                b_ptr = b_ptrs[j]

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = (rows < tokens)[:, None], (columns < d_out)[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    if expanded_ptr is not None:
        has_one = (tl.load(adapter_ptr + rows, mask=rows < tokens, other=-1) >= 0)[:, None]
        at = rows.to(tl.int64)[:, None] * all_d_out + before + columns[None, :]
        y = tl.load(expanded_ptr + at, mask=has_one & column_mask, other=0.0)
    elif xa_ptr is not None:
        xa_row = xa_ptr + (tl.cast(linear, tl.int64) * tokens + rows)[:, None] * rank
        b_row = b_ptr + columns.to(tl.int64)[None, :] * b_stride_out
        y = _expansion(y, xa_row, b_row, row_mask, column_mask, rank, b_stride_rank, BLOCK_R, SUM)

    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * d_in + k[None, :]
    w_ptrs_k = w_ptr + columns.to(tl.int64)[None, :] * w_stride_out + k[:, None] * w_stride_in
    for start in range(0, d_in, BLOCK_K):
        inside = k < d_in - start
        x = tl.load(x_ptrs, mask=row_mask & inside[None, :], other=0.0)
        w = tl.load(w_ptrs_k, mask=inside[:, None] & column_mask, other=0.0)
        y = tl.dot(x, w, y, input_precision="ieee", out_dtype=SUM)
        x_ptrs += BLOCK_K
        w_ptrs_k += BLOCK_K * w_stride_in

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


def _gradient(u: torch.Tensor, x: torch.Tensor, adapter: torch.Tensor | None, da: torch.Tensor) -> None:
    """da: (adapters, rank, d_in) += u^T x over the rows of each adapter; u: (tokens, rank), x: (tokens, d_in)."""
    (tokens, d_in), rank = x.shape, u.shape[1]
    adapters = 1 if adapter is None else len(da)
    size = adapters * rank * d_in
    block_r = _block_r(rank, x.dtype)
    step = _CHUNK * max(1, _PARTIAL_BYTES // (size * da.element_size()))
    for start in range(0, tokens, step):
        some = slice(start, min(start + step, tokens))
        chunks = triton.cdiv(some.stop - start, _CHUNK)
        partial = torch.empty((chunks, size), dtype=da.dtype, device=da.device)
        _partial_kernel[(triton.cdiv(d_in, 128) * triton.cdiv(rank, block_r), chunks, adapters)](
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
        _sum_kernel[(triton.cdiv(size, 1024),)](partial, da, chunks, size, BLOCK=1024)


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


def _block_r(rank: int, dtype: torch.dtype) -> int:
    """Columns of a tile over rank: a power of 2, at least what a dot takes, at most what registers hold."""
    return min(_MOST_RANK[dtype], max(16, int(triton.next_power_of_2(rank))))


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of gradients of A and B."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
