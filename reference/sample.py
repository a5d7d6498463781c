"""Draw one token per row from tempered, cut logits, given the uniforms.

p      = softmax(z / temperature)                the reported logprob is of this distribution
top_k  keeps the k largest p, and all that equal the k-th
top_p  of those, renormalised, keeps the fewest largest that together reach top_p, and all that equal the last
token  = the first in the order of ids at which the running sum of what is kept exceeds u * (its total)

Temperature 0 takes the largest logit, the lowest id among equals, and reports its logprob at temperature 1:
what is reported is what a forward pass with the same weights says of the token.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def sample(
    logits: Array, uniforms: Array, temperature: Array, top_k: NDArray[np.int64], top_p: Array
) -> tuple[NDArray[np.int64], Array]:
    """logits z: (rows, vocab), uniforms in [0, 1): (rows,), temperature >= 0: (rows,), top_k: (rows,) with
    top_k < 1 for no limit, top_p in (0, 1]: (rows,) -> tokens: (rows,) int64, logprobs: (rows,).
    """
    z = _tempered(logits, temperature)
    p = np.exp(z)
    kept = _cut_to_top_p(_cut_to_top_k(p, top_k), top_p)
    running = kept.cumsum(axis=-1)
    tokens = (running > (uniforms * running[:, -1])[:, None]).argmax(axis=-1)
    if not temperature.all():
        tokens = np.where(temperature == 0, logits.argmax(axis=-1), tokens)
    return tokens, _logprobs(z, p, tokens[:, None]).astype(logits.dtype)[:, 0]


def tempered_logprob(logits: Array, tokens: NDArray[np.int64], temperature: Array) -> Array:
    """What `sample` reports of given tokens, whichever is drawn. logits z: (rows, vocab), tokens: (rows, K) int64,
    temperature >= 0: (rows,) -> logprobs: (rows, K)."""
    z = _tempered(logits, temperature)
    return _logprobs(z, np.exp(z), tokens).astype(logits.dtype)


def _tempered(logits: Array, temperature: Array) -> Array:
    """z / temperature less the largest of its row, in float64: (rows, vocab)."""
    z: Array = (logits - logits.max(axis=-1, keepdims=True)).astype(np.float64)
    z /= np.where(temperature == 0, 1, temperature)[:, None]
    return z


def _logprobs(z: Array, p: Array, tokens: NDArray[np.int64]) -> Array:
    """z: (rows, vocab), p: exp(z), tokens: (rows, K) -> (rows, K)."""
    total: Array = p.sum(axis=-1, keepdims=True)
    chosen: Array = z[np.arange(len(z))[:, None], tokens]
    return chosen - np.log(total)


def _cut_to_top_k(p: Array, top_k: NDArray[np.int64]) -> Array:
    vocab = p.shape[-1]
    if not np.any((top_k >= 1) & (top_k < vocab)):
        return p
    k = np.where(top_k >= 1, np.minimum(top_k, vocab), vocab)
    kth = np.take_along_axis(np.sort(p, axis=-1), (vocab - k)[:, None], axis=-1)
    return np.where(p >= kth, p, 0)


def _cut_to_top_p(p: Array, top_p: Array) -> Array:
    if np.all(top_p >= 1):
        return p
    largest_first = -np.sort(-p, axis=-1)
    running = largest_first.cumsum(axis=-1)
    needed = (running < (top_p * running[:, -1])[:, None]).sum(axis=-1)  # how many fall short of top_p
    last = np.take_along_axis(largest_first, np.minimum(needed, p.shape[-1] - 1)[:, None], axis=-1)
    return np.where((p >= last) | (top_p >= 1)[:, None], p, 0)
