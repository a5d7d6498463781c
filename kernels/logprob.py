"""Log-probabilities of given targets under a softmax over the vocabulary.

forward    L_t  = log sum_v exp(z_tv)
           y_tk = z[t, target_tk] - L_t
backward   dz_tv = sum_k dy_tk [v = target_tk] - exp(z_tv - L_t) sum_k dy_tk

L_t is kept as two numbers, the largest logit and the sum of exp(z_tv - top_t), so large logits stay exact:
L_t = top_t + log(total_t). A row goes by in tiles; when a tile brings a larger logit, the sum so far is scaled to it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .array import cdiv, next_power_of_2, sum_dtype

TILE = 4096  # logits of a row at once: two accesses of 16 bytes a thread in bfloat16
TARGETS = 256  # log-probabilities at once, of as many rows as that takes


def logprob_forward(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """logits z: (tokens, vocab), targets: (tokens, K) int64 -> logprobs y: (tokens, K), float32 for bfloat16."""
    logits, targets = logits.contiguous(), targets.contiguous()
    top, total = _log_sum_exp(logits)
    y = torch.empty(targets.shape, dtype=top.dtype, device=logits.device)
    _forward_kernel[(cdiv(y.numel(), TARGETS),)](
        logits,
        targets,
        top,
        total,
        y,
        y.numel(),
        logits.shape[1],
        targets.shape[1],
        sum_dtype(logits),
        TARGETS,
    )
    return y, (logits, targets, top, total)


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    z_ptr, targets_ptr, top_ptr, total_ptr, y_ptr, size, vocab, K, SUM: tl.constexpr, TARGETS: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * TARGETS + tl.arange(0, TARGETS)
    inside = i < size
    row = i // K
    target = tl.load(targets_ptr + i, mask=inside, other=0)
    z = tl.load(z_ptr + row * vocab + target, mask=inside, other=0).to(SUM)
    top = tl.load(top_ptr + row, mask=inside, other=0)
    total = tl.load(total_ptr + row, mask=inside, other=1)
    tl.store(y_ptr + i, _logprob(z, top, total), mask=inside)


@triton.jit
def _logprob(z, top, total):
    return (z - top) - tl.log(total)


def logprob_backward(dy: torch.Tensor, saved: Any) -> torch.Tensor:
    """dy: (tokens, K) -> dlogits: (tokens, vocab)."""
    logits, targets, top, total = saved
    tokens, vocab = logits.shape
    dlogits = torch.empty_like(logits)
    tile = _tile(vocab)
    _backward_kernel[(tokens, cdiv(vocab, tile))](
        dy.contiguous(), logits, targets, top, total, dlogits, vocab, targets.shape[1], sum_dtype(logits), tile,
        num_warps=8,
    )  # fmt: skip
    return dlogits


@triton.jit
def _backward_kernel(
    dy_ptr, z_ptr, targets_ptr, top_ptr, total_ptr, dz_ptr, vocab, K, SUM: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < vocab
    sum_dy = tl.full((), 0, SUM)
    at_targets = tl.zeros((TILE,), SUM)
    for k in range(K):
        dy = tl.load(dy_ptr + row * K + k).to(SUM)
        target = tl.load(targets_ptr + row * K + k)
        sum_dy += dy
        at_targets += tl.where(columns == target, dy, 0)  # a target may stand twice among the K
    z = tl.load(z_ptr + row * vocab + columns, mask=inside, other=float("-inf")).to(SUM)
    dz = tl.exp(z - tl.load(top_ptr + row)) * (-sum_dy / tl.load(total_ptr + row)) + at_targets
    tl.store(dz_ptr + row * vocab + columns, dz.to(dz_ptr.dtype.element_ty), mask=inside)


def _log_sum_exp(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: (tokens, vocab), contiguous -> top, total: (tokens,), with L = top + log(total).

    `sample` asks here too, so that what it reports has the bits of a forward pass.
    """
    tokens, vocab = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    top, total = (torch.empty(tokens, dtype=dtype, device=logits.device) for _ in range(2))
    _row_kernel[(tokens,)](logits, top, total, vocab, sum_dtype(logits), _tile(vocab), num_warps=8)
    return top, total


@triton.jit
def _row_kernel(z_ptr, top_ptr, total_ptr, vocab, SUM: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), float("-inf"), SUM)
    total = tl.zeros((TILE,), SUM)  # a sum for each column of a tile, added up at the end
    for start in range(0, vocab, TILE):
        columns = start + tl.arange(0, TILE)
        z = tl.load(z_ptr + row * vocab + columns, mask=columns < vocab, other=float("-inf")).to(SUM)
        top_before, top = top, tl.maximum(top, tl.max(z))
        shift = tl.where(top == float("-inf"), 0, top)  # so far nothing but -inf: not to become NaN
        total = total * tl.exp(top_before - shift) + tl.exp(z - shift)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, tl.sum(total))


def _tile(vocab: int) -> int:
    return min(next_power_of_2(vocab), TILE)
