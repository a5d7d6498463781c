"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Llama and Qwen.

Coordinates i and i + head_dim/2 of a head form a pair, turned by the angle position * frequency_i:

forward    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin
backward   the turn is orthogonal, so the gradient is turned back: the same with -sin
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def rope_frequencies(
    head_dim: int, theta: float, llama3: tuple[float, float, float, int] | None = None
) -> NDArray[np.float64]:
    """Radians per position of each pair: theta^(-2i / head_dim), shape (head_dim / 2,), float64.

    `llama3` = (factor, low_freq_factor, high_freq_factor, original context) is the scaling of Llama 3.1
    (its model card and `rope_type: "llama3"`): a pair that turns less than low_freq_factor times within the
    original context is slowed by `factor`, one that turns more than high_freq_factor times is left alone,
    and between the two the slowing fades out linearly in the number of turns.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if llama3 is None:
        return frequencies
    factor, low, high, context = llama3
    turns = context * frequencies / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / factor)


def rope_table(positions: NDArray[np.int64], frequencies: NDArray[np.float64]) -> tuple[Array, Array]:
    """positions: (tokens,), frequencies: (head_dim / 2,) -> cos, sin: (tokens, head_dim / 2) float32."""
    angles = positions[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, Any]:
    """x: (tokens, heads, head_dim), cos and sin: (tokens, head_dim / 2) -> y: like x."""
    return _turn(x, cos, sin), (cos, sin)


def rope_backward(dy: Array, saved: Any) -> Array:
    """dy: (tokens, heads, head_dim) -> dx: like dy."""
    cos, sin = saved
    return _turn(dy, cos, -sin)


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    partner = np.concatenate([x[..., half:], x[..., :half]], axis=-1)  # (x2, x1)
    partner *= np.concatenate([-sin, sin], axis=-1)[
        :, None, :
    ]  # (tokens, 1, head_dim), the same for all heads
    y: Array = x * np.concatenate([cos, cos], axis=-1)[:, None, :]
    y += partner
    return y
