"""SwiGLU (Shazeer 2020, arXiv:2002.05202) on the two halves of an MLP, with s = sigmoid(gate).

forward    y     = gate * s * up
backward   dup   = dy * gate * s
           dgate = dy * up * s * (1 + gate * (1 - s))       since s' = s (1 - s)

s is formed again in the backward: to keep it would take half as much memory again.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .array import cdiv, sum_dtype

BLOCK = 1024  # numbers per program: no sum is formed, so any number gives the same bits


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """gate, up: (tokens, d_ffn) -> y: (tokens, d_ffn)."""
    # Two halves of one array are as they should be.
    if not gate.stride() == up.stride() == (gate.stride(0), 1):
        gate, up = gate.contiguous(), up.contiguous()
    tokens, d_ffn = gate.shape
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _forward_kernel[tokens, cdiv(d_ffn, BLOCK)](
        gate, up, y, d_ffn, gate.stride(0), BLOCK=BLOCK, **_dtypes(gate)
    )
    return y, (gate, up)


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, d_ffn, stride, SUM: tl.constexpr, EXP: tl.constexpr, BLOCK: tl.constexpr
):
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + token * stride + i, i < d_ffn, 0).to(SUM)
    up = tl.load(up_ptr + token * stride + i, i < d_ffn, 0).to(SUM)
    tl.store(y_ptr + token * d_ffn + i, gate * _sigmoid(gate, EXP) * up, i < d_ffn)


def swiglu_backward(dy: torch.Tensor, saved: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """dy: (tokens, d_ffn) -> dgate, dup: like dy."""
    gate, up = (x.contiguous() for x in saved)
    dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    grid = (cdiv(n, BLOCK),)
    _backward_kernel[grid](dy.contiguous(), gate, up, dgate, dup, n, BLOCK=BLOCK, **_dtypes(gate))
    return dgate, dup


@triton.jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, SUM: tl.constexpr, EXP: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + i, i < n, 0).to(SUM)
    gate = tl.load(gate_ptr + i, i < n, 0).to(SUM)
    up = tl.load(up_ptr + i, i < n, 0).to(SUM)
    s = _sigmoid(gate, EXP)
    tl.store(dup_ptr + i, dy * gate * s, i < n)
    tl.store(dgate_ptr + i, dy * up * s * (1 + gate * (1 - s)), i < n)


@triton.jit
def _sigmoid(x, EXP: tl.constexpr):
    e = tl.exp(-tl.abs(x.to(EXP))).to(x.dtype)  # at most 1: nothing overflows
    return tl.where(x < 0, e, 1) / (1 + e)


def _dtypes(gate: torch.Tensor) -> dict[str, tl.dtype]:
    """Those of the arithmetic and of the exponential. Triton's exponential in float32 loses digits with the size
    of x, enough to be seen in float32, and ends at 1e-38."""
    return {"SUM": sum_dtype(gate), "EXP": tl.float32 if gate.dtype == torch.bfloat16 else tl.float64}
