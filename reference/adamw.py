"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on one flat buffer, with global-norm clipping.

g   <- g * min(1, max_norm / (norm + 1e-6))         as torch.nn.utils.clip_grad_norm_; max_norm 0: as it is
p   <- p (1 - lr * weight_decay)
m   <- beta1 m + (1 - beta1) g
v   <- beta2 v + (1 - beta2) g^2
p   <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

BLOCK = 32_768  # elements at once: the five arrays of a block stay in the second-level cache


def global_norm(grad: Array) -> float:
    """The Euclidean norm of all elements; grad: (n,). Summed in float64."""
    return math.sqrt(float(np.einsum("i,i->", grad, grad, dtype=np.float64)))


def adamw_(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    copy: Array | None,
    norm: float,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
) -> None:
    """Step param, m and v in place; grad is left as it is. param, grad, m, v: (n,).

    copy: (n,) of another dtype, or None: gets the new param, rounded. norm: the gradient's global norm. step: t,
    counted from 1.
    """
    clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    step_size = lr / (1 - beta1**step)
    root_correction = math.sqrt(1 - beta2**step)
    for start in range(0, len(param), BLOCK):
        block = slice(start, start + BLOCK)
        g = grad[block] * clip
        m_block, v_block, p = m[block], v[block], param[block]
        p *= 1 - lr * weight_decay
        m_block *= beta1
        m_block += (1 - beta1) * g
        v_block *= beta2
        g *= g
        g *= 1 - beta2
        v_block += g
        np.sqrt(v_block, out=g)
        g /= root_correction
        g += eps
        np.divide(m_block, g, out=g)
        g *= step_size
        p -= g
        if copy is not None:
            copy[block] = p
