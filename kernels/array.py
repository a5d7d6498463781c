"""How arrays enter and leave a backend. Everything between is done by the ops, `+`, reshape and slicing."""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1, on a CPU; no bfloat16 there
DEVICE = "cpu" if INTERPRETED else "cuda"


def array(x: Any, dtype: Any = None, device: str | None = None) -> torch.Tensor:
    """The backend's array with the values of `x`; shares memory with `x` where it can.

    dtype: "float32", "bfloat16", "int64", ..., or that of another array; None: the one of `x`. device: "cuda:0",
    ..., None: the first GPU, or "cpu" under the interpreter. Always contiguous.
    """
    if isinstance(x, torch.Tensor):
        tensor = x
    else:
        x = np.asarray(x)
        tensor = torch.from_numpy(x if x.flags.writeable else x.copy())
    return tensor.to(device or DEVICE, _dtype(dtype)).contiguous()


def zeros(shape: tuple[int, ...], dtype: Any = "float32", device: str | None = None) -> torch.Tensor:
    """A new array of zeros. dtype and device as in `array`."""
    return torch.zeros(shape, dtype=_dtype(dtype), device=device or DEVICE)


def to_numpy(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """The values of a backend's array as a NumPy array, bfloat16 as float32; shares memory where it can."""
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()


def sum_dtype(x: torch.Tensor) -> tl.dtype:
    """The dtype in which a kernel forms its sums over numbers of x: float64 for float64, else float32."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    return getattr(torch, dtype if isinstance(dtype, str) else np.dtype(dtype).name)  # type: ignore[no-any-return]
