"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on one flat buffer, with global-norm clipping.

g   <- g * min(1, max_norm / (norm + 1e-6))         as torch.nn.utils.clip_grad_norm_; max_norm 0: as it is
p   <- p (1 - lr * weight_decay)
m   <- beta1 m + (1 - beta1) g
v   <- beta2 v + (1 - beta2) g^2
p   <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

import math

import torch
import triton
import triton.language as tl

from .array import cdiv, sum_dtype

TILE, WARPS = 1024, 4  # numbers at once, of a program of so many warps
CHUNK = 65_536  # numbers of the gradient that one program adds up


def global_norm(grad: torch.Tensor) -> float:
    """The Euclidean norm of all elements; grad: (n,). Summed in float64."""
    chunks = cdiv(len(grad), CHUNK)
    partial = torch.empty(chunks, dtype=torch.float64, device=grad.device)
    total = torch.empty((), dtype=torch.float64, device=grad.device)
    _square_kernel[(chunks,)](grad.contiguous(), partial, len(grad), CHUNK, TILE, num_warps=8)
    _sum_kernel[(1,)](partial, total, chunks, TILE, num_warps=8)
    return math.sqrt(total.item())


@triton.jit
def _square_kernel(grad_ptr, partial_ptr, n, CHUNK: tl.constexpr, TILE: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float64)
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), TILE):
        i = start + tl.arange(0, TILE)
        g = tl.load(grad_ptr + i, mask=i < n, other=0).to(tl.float64)
        total += g * g
    tl.store(partial_ptr + chunk, tl.sum(total))


@triton.jit
def _sum_kernel(partial_ptr, total_ptr, chunks, TILE: tl.constexpr):
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, chunks, TILE):
        i = start + tl.arange(0, TILE)
        total += tl.load(partial_ptr + i, mask=i < chunks, other=0)
    tl.store(total_ptr, tl.sum(total))


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    copy: torch.Tensor | None,
    norm: float,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
) -> None:
    """Step param, m and v in place; grad is left as it is. param, grad, m, v: (n,).

    copy: (n,) of another dtype, or None: gets the new param, rounded. norm: the gradient's global norm. step: t,
    counted from 1. ValueError where what is written is not contiguous.
    """
    for name, x in {"param": param, "m": m, "v": v, "copy": copy}.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(
                f"{name} is written in place and has to be contiguous; its strides are {x.stride()}"
            )
    clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    step_size = lr / (1 - beta1**step)
    root_correction = math.sqrt(1 - beta2**step)
    # An argument of a kernel would be rounded to float32; an array keeps what float64 buffers need.
    scalars = torch.tensor(
        [clip, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, root_correction, eps, step_size],
        dtype=torch.float64,
    )
    if param.is_cuda:  # from pinned memory, which nobody waits for
        scalars = scalars.pin_memory().to(param.device, non_blocking=True)
    n = len(param)
    _step_kernel[(cdiv(n, TILE),)](
        param, grad.contiguous(), m, v, copy, scalars, n, sum_dtype(param), TILE, num_warps=WARPS
    )


@triton.jit
def _step_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, copy_ptr, scalars_ptr, n, SUM: tl.constexpr, TILE: tl.constexpr
):
    clip = tl.load(scalars_ptr).to(SUM)
    decay = tl.load(scalars_ptr + 1).to(SUM)
    beta1, one_less_beta1 = tl.load(scalars_ptr + 2).to(SUM), tl.load(scalars_ptr + 3).to(SUM)
    beta2, one_less_beta2 = tl.load(scalars_ptr + 4).to(SUM), tl.load(scalars_ptr + 5).to(SUM)
    root_correction = tl.load(scalars_ptr + 6).to(SUM)
    eps = tl.load(scalars_ptr + 7).to(SUM)
    step_size = tl.load(scalars_ptr + 8).to(SUM)

    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < n
    g = tl.load(grad_ptr + i, mask=inside, other=0).to(SUM) * clip
    p = tl.load(param_ptr + i, mask=inside, other=0).to(SUM) * decay
    m = tl.load(m_ptr + i, mask=inside, other=0).to(SUM) * beta1 + one_less_beta1 * g
    v = tl.load(v_ptr + i, mask=inside, other=0).to(SUM) * beta2 + one_less_beta2 * (g * g)
    p -= step_size * _quotient(m, _quotient(_root(v), root_correction) + eps)
    tl.store(param_ptr + i, p, mask=inside)
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(v_ptr + i, v, mask=inside)
    if copy_ptr is not None:
        tl.store(copy_ptr + i, p.to(copy_ptr.dtype.element_ty), mask=inside)


# In float32 `/` and sqrt are approximate, and sqrt takes the smallest numbers for 0; in float64 they are exact.


@triton.jit
def _quotient(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)
