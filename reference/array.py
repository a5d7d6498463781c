"""How arrays enter and leave a backend. Everything between is done by the ops, `+`, reshape and slicing."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

DEVICE, DTYPE = "cpu", "float32"  # where arrays are, and the dtype of activations


def place(device: str | None = None, dtype: str | None = None) -> tuple[str, str]:
    """The device and the dtype of activations to compute with. Raises ValueError for one that cannot be had."""
    if device not in (None, DEVICE):
        raise ValueError(f"device is {device!r:.80}; the reference computes on the CPU: 'cpu' or None")
    if dtype not in (None, DTYPE):
        raise ValueError(f"dtype is {dtype!r:.80}; the reference computes in 'float32'")
    return DEVICE, DTYPE


def array(x: ArrayLike, dtype: DTypeLike | None = None, device: str | None = None) -> NDArray[np.generic]:
    """The backend's array with the values of `x`; shares memory with `x` where it can.

    dtype: "float32", "int64", ..., or that of another array; None: the one of `x`. device: only "cpu" here.
    """
    return np.asarray(x, dtype=dtype)


def zeros(
    shape: tuple[int, ...], dtype: DTypeLike = "float32", device: str | None = None
) -> NDArray[np.generic]:
    """A new array of zeros. dtype and device as in `array`."""
    return np.zeros(shape, dtype=dtype)


def to_numpy(x: NDArray[np.generic]) -> NDArray[np.generic]:
    """The values of a backend's array as a NumPy array; shares memory with it where it can."""
    return x
