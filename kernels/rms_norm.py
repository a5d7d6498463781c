"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) with a frozen weight.

forward    rho = 1 / sqrt(mean(x^2) + eps)        one number per row
           y   = w * x * rho
backward   with g = w * dy:
           dx  = rho * g - x * rho^3 * mean(g * x)

A program holds whole rows, so x is read once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .array import by_tokens, cdiv, next_power_of_2, sum_dtype

WIDEST = 16_384  # a row that a program can hold in its registers


def rms_norm_forward(x: torch.Tensor, w: torch.Tensor, eps: float) -> tuple[torch.Tensor, Any]:
    """x: (..., d), w: (d,), or (n, d) for x: (..., n, d) -> y: (..., d). Each row along the last axis is normalised by
    itself.

    Raises ValueError where d is over WIDEST.
    """
    d = x.shape[-1]
    if d > WIDEST:
        raise ValueError(f"rows of {d} numbers; rms_norm takes at most {WIDEST}")
    x = by_tokens(x) if x.dim() == 3 else x.contiguous()
    heads, stride = (x.shape[1], x.stride(0)) if x.dim() == 3 else (1, d)
    w, rows = w.contiguous(), x.numel() // d
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rho = torch.empty(rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    grid, tiles = _tiles(rows, d)
    _forward_kernel[grid](
        x, w, y, rho, rows, stride, HEADS=heads, WEIGHTS=w.numel() // d, EPS=eps, SUM=sum_dtype(x), **tiles
    )
    return y, (x, w, rho)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    rho_ptr,
    rows,
    stride,  # of x, from one token to the next
    HEADS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EPS: tl.constexpr,
    SUM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(row, rows - 1)  # what is left of the last tile does the last row again
    column = tl.arange(0, BLOCK_D)
    here = row[:, None] * D + column[None, :]
    inside = column[None, :] < D
    there = (row // HEADS * stride + row % HEADS * D)[:, None] + column[None, :]
    x = tl.load(x_ptr + there, inside, 0).to(SUM)
    w = tl.load(w_ptr + (row % WEIGHTS * D)[:, None] + column[None, :], inside, 0).to(SUM)
    rho = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
    tl.store(rho_ptr + row, rho)
    tl.store(y_ptr + here, w * (x * rho[:, None]), inside)


def rms_norm_backward(dy: torch.Tensor, saved: Any) -> torch.Tensor:
    """dy: (..., d) -> dx: (..., d)."""
    x, w, rho = saved
    x, dx = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, tiles = _tiles(len(rho), x.shape[-1])
    weights = w.numel() // x.shape[-1]
    _backward_kernel[grid](
        dy.contiguous(), x, w, rho, dx, len(rho), WEIGHTS=weights, SUM=sum_dtype(x), **tiles
    )
    return dx


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    rho_ptr,
    dx_ptr,
    rows,
    WEIGHTS: tl.constexpr,
    SUM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(row, rows - 1)  # what is left of the last tile does the last row again
    column = tl.arange(0, BLOCK_D)
    here = row[:, None] * D + column[None, :]
    inside = column[None, :] < D
    x = tl.load(x_ptr + here, inside, 0).to(SUM)
    dy = tl.load(dy_ptr + here, inside, 0).to(SUM)
    w = tl.load(w_ptr + (row % WEIGHTS * D)[:, None] + column[None, :], inside, 0).to(SUM)
    rho = tl.load(rho_ptr + row)
    g = w * dy
    mean_gx = tl.sum(g * x, axis=1) / D
    tl.store(dx_ptr + here, rho[:, None] * g - x * (rho * rho * rho * mean_gx)[:, None], inside)


def _tiles(rows: int, d: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the tile: whole rows, in all about 2048 numbers or one row. Only d decides over it, since
    the tile decides in which order a row is summed."""
    block_d = next_power_of_2(d)
    block_rows = max(1, 2048 // block_d)
    warps = min(16, max(4, block_d // 512))  # 16 numbers a thread: two accesses of 16 bytes in bfloat16
    tiles = {"D": d, "BLOCK_ROWS": block_rows, "BLOCK_D": block_d, "num_warps": warps}
    return (cdiv(rows, block_rows),), tiles
