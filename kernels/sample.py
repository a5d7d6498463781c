"""Draw one token per row from tempered, cut logits, given the uniforms.

p      = softmax(z / temperature)                the reported logprob is of this distribution
top_k  keeps the k largest p, and all that equal the k-th
top_p  of those, renormalised, keeps the fewest largest that together reach top_p, and all that equal the last
token  = the first in the order of ids at which the running sum of what is kept exceeds u * (its total)

Temperature 0 takes the largest logit, the lowest id among equals, and reports its logprob at temperature 1:
what is reported is what a forward pass with the same weights says of the token, there and at temperature 1 to the
last bit.

Nothing is sorted. What is kept is all that lies within a limit of the largest logit, and the limit is found by
bisection over the distances from it: as numbers >= 0, they have the order of their bits read as an integer, their key.
p is in float64, and so is every sum of it.
"""

import torch
import triton
import triton.language as tl

from .array import cdiv, next_power_of_2, sum_dtype
from .logprob import _log_sum_exp, _logprob

TILE_BYTES = 8192  # of logits of a row at once: an access of 16 bytes for each of the 512 threads


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits z: (rows, vocab), uniforms in [0, 1): (rows,), temperature >= 0: (rows,), top_k: (rows,) with
    top_k < 1 for no limit, top_p in (0, 1]: (rows,) -> tokens: (rows,) int64, logprobs: (rows,), float32 for bfloat16.

    In a row with NaN the token is any, and its logprob NaN.
    """
    logits = logits.contiguous()
    settings = [x.contiguous() for x in (uniforms, temperature, top_k, top_p)]
    rows, vocab = logits.shape
    top, total = _log_sum_exp(logits)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    tile = _tile(logits)
    tiles = next_power_of_2(cdiv(vocab, tile))
    _forward_kernel[(rows,)](
        logits, top, *settings, tokens, vocab, sum_dtype(logits), tile, tiles, num_warps=16
    )
    return tokens, _logprobs(logits, top, total, tokens[:, None], settings[1])[:, 0]


@triton.jit
def _forward_kernel(
    z_ptr,
    top_ptr,
    uniforms_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    tokens_ptr,
    vocab,
    SUM: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    top = tl.load(top_ptr + row)
    uniform = tl.load(uniforms_ptr + row).to(tl.float64)
    temperature = tl.load(temperature_ptr + row).to(tl.float64)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row).to(tl.float64)

    greedy = temperature == 0
    inverse = _inverse(temperature)
    limit = _key(tl.full((), float("inf"), SUM))
    if greedy:
        limit = _key(tl.full((), 0, SUM))  # the largest alone, and of equals ...
        uniform = tl.full((), 0, tl.float64)  # ... the first
    else:
        if (top_k >= 1) & (top_k < vocab):
            limit = _cut(z_ptr, top, vocab, inverse, limit, top_k.to(tl.float64), False, SUM, TILE)
        if top_p < 1:
            enough = top_p * _mass(z_ptr, top, vocab, inverse, limit, SUM, TILE)
            limit = _cut(z_ptr, top, vocab, inverse, limit, enough, True, SUM, TILE)

    tiles = tl.arange(0, TILES)
    running = tl.full((), 0, tl.float64)
    after = tl.full((TILES,), float("inf"), tl.float64)  # the running sum at the end of each tile
    for tile in range(tl.cdiv(vocab, TILE)):
        distance = _distances(z_ptr, top, tile * TILE, vocab, SUM, TILE)
        running += tl.sum(tl.where(_key(distance) <= limit, _p(distance, inverse), 0))
        after = tl.where(tiles == tile, running, after)

    drawn = uniform * running  # less than running: the running sum exceeds it somewhere
    tile = tl.sum((after <= drawn).to(tl.int32))
    columns = tile * TILE + tl.arange(0, TILE)
    distance = _distances(z_ptr, top, tile * TILE, vocab, SUM, TILE)
    kept = tl.where(_key(distance) <= limit, _p(distance, inverse), 0)
    exceeds = tl.max(tl.where(after <= drawn, after, 0)) + tl.cumsum(kept) > drawn
    # Sums formed in two orders may differ in their last bit: then none exceeds, and the last that is kept is meant.
    first = tl.min(tl.where(exceeds & (kept > 0), columns, vocab))
    last = tl.max(tl.where(kept > 0, columns, 0))
    tl.store(tokens_ptr + row, tl.minimum(first, last).to(tl.int64))


def tempered_logprob(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """What `sample` reports of given tokens, whichever is drawn. logits z: (rows, vocab), tokens: (rows, K) int64,
    temperature >= 0: (rows,) -> logprobs: (rows, K), float32 for bfloat16."""
    logits = logits.contiguous()
    top, total = _log_sum_exp(logits)
    return _logprobs(logits, top, total, tokens.contiguous(), temperature.contiguous())


def _logprobs(
    logits: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
) -> torch.Tensor:
    rows, vocab = logits.shape
    logprobs = torch.empty(tokens.shape, dtype=top.dtype, device=logits.device)
    _logprob_kernel[(rows,)](
        logits, top, total, temperature, tokens, logprobs, vocab, tokens.shape[1], sum_dtype(logits), _tile(logits),
        num_warps=16,
    )  # fmt: skip
    return logprobs


@triton.jit(do_not_specialize=["K"])
def _logprob_kernel(
    z_ptr,
    top_ptr,
    total_ptr,
    temperature_ptr,
    tokens_ptr,
    logprobs_ptr,
    vocab,
    K,
    SUM: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * vocab
    top, total = tl.load(top_ptr + row), tl.load(total_ptr + row)
    temperature = tl.load(temperature_ptr + row).to(tl.float64)
    inverse = _inverse(temperature)
    p = tl.zeros((TILE,), tl.float64)
    for start in range(0, vocab, TILE):
        p += _p(_distances(z_ptr, top, start, vocab, SUM, TILE), inverse)
    log_total = tl.log(tl.sum(p))
    for i in range(row * K, row * K + K):
        z = tl.load(z_ptr + tl.load(tokens_ptr + i)).to(SUM)
        tempered = (z - top).to(tl.float64) * inverse - log_total
        as_it_is = (temperature == 0) | (temperature == 1)
        tl.store(logprobs_ptr + i, tl.where(as_it_is, _logprob(z, top, total), tempered.to(SUM)))


@triton.jit
def _cut(z_ptr, top, vocab, inverse, high, enough, MASS: tl.constexpr, SUM: tl.constexpr, TILE: tl.constexpr):
    """The key of the least distance within which lies enough: of p, or of tokens. high: where all do."""
    low = _key(tl.full((), 0, SUM)) - 1  # at or below low too little lies, at or below high enough
    while low + 1 < high:
        middle = low + (high - low) // 2
        within = tl.zeros((TILE,), tl.float64)
        below, above = tl.full((TILE,), low, low.dtype), tl.full((TILE,), high, high.dtype)
        for start in range(0, vocab, TILE):
            distance = _distances(z_ptr, top, start, vocab, SUM, TILE)
            key = _key(distance)
            near = key <= middle
            within += tl.where(near, _p(distance, inverse) if MASS else 1, 0)
            below = tl.maximum(below, tl.where(near, key, low))
            above = tl.minimum(above, tl.where(near, high, key))
        # On to a key that is there: between two neighbours nothing is left to find.
        if tl.sum(within) >= enough:
            high = tl.max(below)
        else:
            low = tl.min(above) - 1
    return high


@triton.jit
def _mass(z_ptr, top, vocab, inverse, limit, SUM: tl.constexpr, TILE: tl.constexpr):
    """The sum of the p within the limit."""
    within = tl.zeros((TILE,), tl.float64)
    for start in range(0, vocab, TILE):
        distance = _distances(z_ptr, top, start, vocab, SUM, TILE)
        within += tl.where(_key(distance) <= limit, _p(distance, inverse), 0)
    return tl.sum(within)


@triton.jit
def _distances(z_ptr, top, start, vocab, SUM: tl.constexpr, TILE: tl.constexpr):
    """top - z from a column on, (TILE,); past the end of the row infinity."""
    columns = start + tl.arange(0, TILE)
    inside = columns < vocab
    return tl.where(inside, top - tl.load(z_ptr + columns, mask=inside, other=0).to(SUM), float("inf"))


@triton.jit
def _inverse(temperature):
    """1 / temperature, or 1 for 0. Below 1e-200 the smallest distance already makes p 0, and this might overflow."""
    return 1 / tl.where(temperature == 0, 1, tl.maximum(temperature, 1e-200))


@triton.jit
def _p(distance, inverse):
    """p, but for a factor: that of the largest logit is 1."""
    return tl.exp(-distance.to(tl.float64) * inverse)


@triton.jit
def _key(distance):
    return distance.to(tl.int64 if distance.dtype == tl.float64 else tl.int32, bitcast=True)


def _tile(logits: torch.Tensor) -> int:
    """Logits of a row at once."""
    return min(next_power_of_2(logits.shape[1]), TILE_BYTES // logits.element_size())
