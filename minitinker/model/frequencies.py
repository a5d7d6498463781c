"""How fast each pair of coordinates turns with the position in RoPE, as the model's config has it."""

import math

import numpy as np
from numpy.typing import NDArray

from minitinker.model.config import Llama3Scaling


def rope_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> NDArray[np.float64]:
    """Radians per position of each pair: theta^(-2i / head_dim), shape (head_dim / 2,), float64.

    `scaling` is that of Llama 3.1 (its model card and `rope_type: "llama3"`): a pair that turns less than
    low_freq_factor times within the original context is slowed by `factor`, one that turns more than
    high_freq_factor times is left alone, and between the two the slowing fades out linearly in the turns.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)
