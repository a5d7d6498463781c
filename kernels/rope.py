"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Llama and Qwen.

Coordinates i and i + head_dim/2 of a head form a pair, turned by the angle position * frequency_i:

forward    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin
backward   the turn is orthogonal, so the gradient is turned back: the same with -sin

A table holds what each coordinate is multiplied with, (cos, cos), and what its partner is, (-sin, sin).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .array import by_tokens, cdiv, next_power_of_2, sum_dtype

BLOCK_ANGLES = 512  # entries of the table per program
BLOCK_PAIRS = 1024  # pairs per program, of whole heads: no sum is formed, so any number gives the same bits


def rope_table(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """positions: (tokens,), frequencies: (head_dim / 2,) -> cos, sin: (tokens, head_dim) float32."""
    tokens, half = len(positions), len(frequencies)
    cos = torch.empty((tokens, 2 * half), dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    grid = (cdiv(tokens * half, BLOCK_ANGLES),)
    positions, frequencies = positions.contiguous(), frequencies.contiguous()
    _table_kernel[grid](positions, frequencies, cos, sin, tokens * half, half, BLOCK=BLOCK_ANGLES)
    return cos, sin


@triton.jit
def _table_kernel(positions_ptr, frequencies_ptr, cos_ptr, sin_ptr, n, half, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + i // half, i < n, 0).to(tl.float64)
    frequency = tl.load(frequencies_ptr + i % half, i < n, 0).to(tl.float64)
    angle = position * frequency  # in float64: at position 100,000 an angle in float32 is off by 0.004
    cos, sin = tl.cos(angle).to(tl.float32), tl.sin(angle).to(tl.float32)
    first = i + i // half * half
    tl.store(cos_ptr + first, cos, i < n)
    tl.store(cos_ptr + first + half, cos, i < n)
    tl.store(sin_ptr + first, -sin, i < n)
    tl.store(sin_ptr + first + half, sin, i < n)


def rope_forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """x: (tokens, heads, head_dim), cos and sin: (tokens, head_dim) -> y: like x."""
    cos, sin = cos.contiguous(), sin.contiguous()
    return _turn(x, cos, sin, 1), (cos, sin)


def rope_backward(dy: torch.Tensor, saved: Any) -> torch.Tensor:
    """dy: (tokens, heads, head_dim) -> dx: like dy."""
    cos, sin = saved
    return _turn(dy, cos, sin, -1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    x, (tokens, heads, head_dim) = by_tokens(x), x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_half = next_power_of_2(head_dim // 2)
    block_rows = max(1, BLOCK_PAIRS // block_half)
    grid = (cdiv(tokens * heads, block_rows),)
    tiles = {"HALF": head_dim // 2, "BLOCK_ROWS": block_rows, "BLOCK_HALF": block_half}
    _turn_kernel[grid](
        x, cos, sin, y, tokens * heads, heads, x.stride(0), SIGN=sign, SUM=sum_dtype(x), **tiles
    )
    return y


@triton.jit(do_not_specialize=["rows"])
def _turn_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    rows,  # tokens * heads
    heads,
    stride,  # of x, from one token to the next
    SIGN: tl.constexpr,
    SUM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_HALF)
    inside = (row[:, None] < rows) & (column[None, :] < HALF)
    angle = (row // heads)[:, None] * (2 * HALF) + column[None, :]  # all heads of a token alike
    cos = tl.load(cos_ptr + angle, inside, 0).to(SUM)
    sin = SIGN * tl.load(sin_ptr + angle + HALF, inside, 0).to(SUM)
    there = (row // heads * stride + row % heads * (2 * HALF))[:, None] + column[None, :]
    x1 = tl.load(x_ptr + there, inside, 0).to(SUM)
    x2 = tl.load(x_ptr + there + HALF, inside, 0).to(SUM)
    first = row[:, None] * (2 * HALF) + column[None, :]
    tl.store(y_ptr + first, x1 * cos - x2 * sin, inside)
    tl.store(y_ptr + first + HALF, x2 * cos + x1 * sin, inside)
