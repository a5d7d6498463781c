"""Log-probabilities of given targets under a softmax over the vocabulary.

forward    L_t  = log sum_v exp(z_tv)
           y_tk = z[t, target_tk] - L_t
backward   dz_tv = sum_k dy_tk [v = target_tk] - exp(z_tv - L_t) sum_k dy_tk
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def logprob_forward(logits: Array, targets: NDArray[np.int64]) -> tuple[Array, Any]:
    """logits z: (tokens, vocab), targets: (tokens, K) int64 -> logprobs y: (tokens, K)."""
    top = logits.max(axis=-1, keepdims=True)  # taken off first, so large logits stay exact
    p = logits - top
    np.exp(p, out=p)
    total = p.sum(axis=-1, keepdims=True)  # (tokens, 1): exp(L - top)
    y = np.take_along_axis(logits, targets, axis=-1) - top
    y -= np.log(total)
    return y, (logits, targets, top, total)


def logprob_backward(dy: Array, saved: Any) -> Array:
    """dy: (tokens, K) -> dlogits: (tokens, vocab)."""
    logits, targets, top, total = saved
    dlogits: Array = logits - top
    np.exp(dlogits, out=dlogits)
    dlogits *= -dy.sum(axis=-1, keepdims=True) / total
    rows = np.arange(len(logits))[:, None]
    np.add.at(dlogits, (rows, targets), dy)  # a target may stand twice among the K
    return dlogits
