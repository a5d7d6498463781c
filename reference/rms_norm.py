"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) with a frozen weight.

forward    rho = 1 / sqrt(mean(x^2) + eps)        one number per row
           y   = w * x * rho
backward   with g = w * dy:
           dx  = rho * g - x * rho^3 * mean(g * x)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def rms_norm_forward(x: Array, w: Array, eps: float) -> tuple[Array, Any]:
    """x: (..., d), w: (d,), or with more of x's axes -> y: (..., d). Each row along the last axis is normalised by
    itself."""
    rms = np.sqrt(np.vecdot(x, x)[..., None] / x.shape[-1] + eps)  # (..., 1): 1 / rho
    y: Array = x / rms
    y *= w
    return y, (x, w, rms)


def rms_norm_backward(dy: Array, saved: Any) -> Array:
    """dy: (..., d) -> dx: (..., d)."""
    x, w, rms = saved
    rho, g = 1 / rms, dy * w
    mean_gx = np.vecdot(g, x)[..., None] / x.shape[-1]  # (..., 1)
    g *= rho
    g -= x * (rho**3 * mean_gx)
    dx: Array = g
    return dx
