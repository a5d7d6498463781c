"""Draw one token per row from tempered, cut logits, given the uniforms.

p      = softmax(z / temperature)                the reported logprob is of this distribution
top_k  keeps the k largest p, and all that equal the k-th
top_p  of those, renormalised, keeps the fewest largest that together reach top_p, and all that equal the last
token  = the first in the order of ids at which the running sum of what is kept exceeds u * (its total)

Temperature 0 takes the largest logit, the lowest id among equals, and reports its logprob at temperature 1:
what is reported is what a forward pass with the same weights says of the token.

p has the dtype of the logits, sums of it are in float64.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

BLOCK = 128  # tokens whose p are added up before it is looked for where among them the draw falls


def sample(
    logits: Array, uniforms: Array, temperature: Array, top_k: NDArray[np.int64], top_p: Array
) -> tuple[NDArray[np.int64], Array]:
    """logits z: (rows, vocab), uniforms in [0, 1): (rows,), temperature >= 0: (rows,), top_k: (rows,) with
    top_k < 1 for no limit, top_p in (0, 1]: (rows,) -> tokens: (rows,) int64, logprobs: (rows,).
    """
    divisor = _divisor(temperature)
    z, p = _tempered(logits, divisor)
    running = _running_sums(p)
    kept = _cut_to_top_p(z, _cut_to_top_k(z, p, top_k), top_p)
    tokens = _first_beyond(kept, running if kept is p else _running_sums(kept), uniforms)
    if not temperature.all():
        tokens = np.where(temperature == 0, logits.argmax(axis=-1), tokens)
    return tokens, _logprobs(z, running, tokens[:, None], divisor)[:, 0]


def tempered_logprob(logits: Array, tokens: NDArray[np.int64], temperature: Array) -> Array:
    """What `sample` reports of given tokens, whichever is drawn. logits z: (rows, vocab), tokens: (rows, K) int64,
    temperature >= 0: (rows,) -> logprobs: (rows, K)."""
    divisor = _divisor(temperature)
    z, p = _tempered(logits, divisor)
    return _logprobs(z, _running_sums(p), tokens, divisor)


def _divisor(temperature: Array) -> Array:
    """What the logits of each row are divided by: (rows, 1)."""
    return np.where(temperature == 0, 1, temperature)[:, None]


def _tempered(logits: Array, divisor: Array) -> tuple[Array, Array]:
    """z less the largest of its row, and p = exp(z / temperature), the largest being 1: (rows, vocab)."""
    z = logits - logits.max(axis=-1, keepdims=True)
    if (divisor == 1).all():
        return z, np.exp(z)
    with np.errstate(over="ignore"):  # to -inf, whose exponential is as much 0
        return z, np.exp((z / divisor).astype(z.dtype))


def _logprobs(z: Array, running: Array, tokens: NDArray[np.int64], divisor: Array) -> Array:
    """z: (rows, vocab), running: `_running_sums` of p, tokens: (rows, K) -> (rows, K)."""
    with np.errstate(over="ignore"):  # to -inf
        chosen = z[np.arange(len(z))[:, None], tokens] / divisor
        logprobs: Array = (chosen - np.log(running[:, -1:])).astype(z.dtype)
    return logprobs


def _running_sums(p: Array) -> Array:
    """The sum of p: (rows, vocab) before each block, and that of all: (rows, blocks + 1) float64."""
    in_blocks = _blocks(p)
    sums: Array = np.zeros((len(p), in_blocks.shape[1] + 1))
    in_blocks.sum(axis=-1, dtype=np.float64).cumsum(axis=-1, out=sums[:, 1:])
    return sums


def _blocks(p: Array) -> Array:
    """p: (rows, vocab), with zeros at the end where the vocabulary is no multiple of BLOCK: (rows, blocks, BLOCK)."""
    rows, vocab = p.shape
    if vocab % BLOCK > 0:
        p = np.pad(p, ((0, 0), (0, -vocab % BLOCK)))
    return p.reshape(rows, -1, BLOCK)


def _first_beyond(kept: Array, running: Array, uniforms: Array) -> NDArray[np.int64]:
    """The first token at which the running sum of kept: (rows, vocab) exceeds u * (its total). Only in one block
    are the sums formed token by token."""
    rows, drawn = np.arange(len(kept)), uniforms * running[:, -1]  # less than the total
    block = (running[:, 1:] > drawn[:, None]).argmax(axis=-1)
    drawn -= running[rows, block]
    within = _blocks(kept)[rows, block].cumsum(axis=-1, dtype=np.float64)
    # Sums formed in two orders may differ in their last bit: then the last that is kept is meant.
    drawn = np.minimum(drawn, np.nextafter(within[:, -1], 0))
    tokens: NDArray[np.int64] = block * BLOCK + (within > drawn[:, None]).argmax(axis=-1)
    return tokens


def _cut_to_top_k(z: Array, p: Array, top_k: NDArray[np.int64]) -> Array:
    vocab = p.shape[-1]
    if not np.any((top_k >= 1) & (top_k < vocab)):
        return p
    k = np.where(top_k >= 1, np.minimum(top_k, vocab), vocab)
    kth = np.take_along_axis(np.sort(z, axis=-1), (vocab - k)[:, None], axis=-1)
    return np.where(z >= kth, p, 0)


def _cut_to_top_p(z: Array, p: Array, top_p: Array) -> Array:
    if np.all(top_p >= 1):
        return p
    running = np.sort(p, axis=-1)[:, ::-1].cumsum(axis=-1, dtype=np.float64)
    needed = (running < (top_p * running[:, -1])[:, None]).sum(axis=-1)  # how many fall short of top_p
    # Where the last one needed stands, smallest first.
    place = np.maximum(p.shape[-1] - 1 - needed, 0)[:, None]
    last = np.take_along_axis(np.sort(z, axis=-1), place, axis=-1)
    return np.where((z >= last) | (top_p >= 1)[:, None], p, 0)
