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
    """x: (..., d), w: (d,) -> y: (..., d). Each row along the last axis is normalised by itself."""
    d = x.shape[-1]
    rho = np.einsum("...i,...i->...", x, x)[..., None]  # (..., 1)
    rho /= x.dtype.type(d)
    rho += x.dtype.type(eps)
    np.sqrt(rho, out=rho)
    np.divide(1, rho, out=rho)
    y = x * rho
    y *= w
    return y, (x, w, rho)


def rms_norm_backward(dy: Array, saved: Any) -> Array:
    """dy: (..., d) -> dx: (..., d)."""
    x, w, rho = saved
    g: Array = dy * w
    mean_gx = np.einsum("...i,...i->...", g, x)[..., None] / x.dtype.type(x.shape[-1])  # (..., 1)
    g *= rho
    g -= x * (rho**3 * mean_gx)
    return g
