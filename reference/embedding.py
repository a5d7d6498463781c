"""Token embedding: x_t = W[token_t]. The table is frozen, so there is nothing to differentiate."""

import numpy as np
from numpy.typing import NDArray


def embedding(tokens: NDArray[np.int64], w: NDArray[np.floating]) -> NDArray[np.floating]:
    """tokens: (tokens,) int64 in [0, vocab), w: (vocab, d) -> x: (tokens, d)."""
    return w[tokens]
