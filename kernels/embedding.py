"""Token embedding: x_t = W[token_t]. The table is frozen, so there is nothing to differentiate."""

import torch
import triton
import triton.language as tl

from .array import cdiv, next_power_of_2

TILE = 1024  # numbers of a row at once


def embedding(tokens: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """tokens: (tokens,) int64 in [0, vocab), w: (vocab, d) -> x: (tokens, d)."""
    tokens, w = tokens.contiguous(), w.contiguous()
    d = w.shape[1]
    x = torch.empty((len(tokens), d), dtype=w.dtype, device=w.device)
    tile = min(next_power_of_2(d), TILE)
    _forward_kernel[(len(tokens), cdiv(d, tile))](tokens, w, x, d, tile)
    return x


@triton.jit
def _forward_kernel(tokens_ptr, w_ptr, x_ptr, d, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < d
    w = tl.load(w_ptr + token * d + columns, mask=inside)
    tl.store(x_ptr + row * d + columns, w, mask=inside)
