"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Llama and Qwen.

Coordinates i and i + head_dim/2 of a head form a pair, turned by the angle position * frequency_i:

forward    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin
backward   the turn is orthogonal, so the gradient is turned back: the same with -sin

A table holds what each coordinate is multiplied with, (cos, cos), and what its partner is, (-sin, sin).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def rope_table(positions: NDArray[np.int64], frequencies: NDArray[np.float64]) -> tuple[Array, Array]:
    """positions: (tokens,), frequencies: (head_dim / 2,) -> cos, sin: (tokens, head_dim) float32."""
    angles = positions[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)


def rope_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, Any]:
    """x: (tokens, heads, head_dim), cos and sin: (tokens, head_dim) -> y: like x."""
    return _turn(x, cos, sin), (cos, sin)


def rope_backward(dy: Array, saved: Any) -> Array:
    """dy: (tokens, heads, head_dim) -> dx: like dy."""
    cos, sin = saved
    return _turn(dy, cos, -sin)


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    partner = np.concatenate([x[..., half:], x[..., :half]], axis=-1)  # (x2, x1)
    partner *= sin[:, None, :]  # all heads alike
    y: Array = x * cos[:, None, :]
    y += partner
    return y
