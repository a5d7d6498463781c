"""SwiGLU (Shazeer 2020, arXiv:2002.05202) on the two halves of an MLP, with s = sigmoid(gate).

forward    y     = gate * s * up
backward   dup   = dy * gate * s
           dgate = dy * up * s * (1 + gate * (1 - s))       since s' = s (1 - s)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, Any]:
    """gate, up: (tokens, d_ffn) -> y: (tokens, d_ffn)."""
    t = _one_plus_exp(gate)
    y: Array = gate / t
    y *= up
    return y, (gate, up, t)


def swiglu_backward(dy: Array, saved: Any) -> tuple[Array, Array]:
    """dy: (tokens, d_ffn) -> dgate, dup: like dy."""
    gate, up, t = saved
    s = 1 / t
    silu = gate * s
    dup = dy * silu
    slope = 1 - s  # first, and exact where s is near 1: times a large gate it would show
    slope *= silu
    slope += s
    slope *= up
    slope *= dy
    return slope, dup


def _one_plus_exp(x: Array) -> Array:
    """1 + exp(-x), the reciprocal of the sigmoid."""
    t: Array = np.negative(x)
    with np.errstate(over="ignore"):  # exp(-x) = inf for x << 0, and x / inf = 0 is right
        np.exp(t, out=t)
    t += 1
    return t
