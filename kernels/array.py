"""How arrays enter and leave a backend. Everything between is done by the ops, `+`, reshape and slicing."""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: on a CPU, slowly, to check numbers
DEVICE, DTYPE = ("cpu", "float32") if INTERPRETED else ("cuda:0", "bfloat16")
# Bytes that the largest tile of any op needs; an H100, an H200 and a B200 have 227 KB, an A100 163, an L40 99.
SHARED_MEMORY = 200 << 10


def place(device: str | None = None, dtype: str | None = None) -> tuple[str, str]:
    """The device and the dtype of activations to compute with. Raises ValueError for one that cannot be had."""
    device, dtype = device or DEVICE, dtype or DTYPE
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r:.80}; the kernels compute in 'bfloat16' or 'float32'")
    if INTERPRETED:
        if device != DEVICE:
            raise ValueError(
                f"device is {device!r:.80}, but TRITON_INTERPRET is set: the interpreter runs on 'cpu'"
            )
        if dtype != DTYPE:
            raise ValueError(
                "dtype is 'bfloat16', which Triton's interpreter computes wrongly; use 'float32'"
            )
        return device, dtype
    count = torch.cuda.device_count()
    names = [f"cuda:{i}" for i in range(count)]
    if count == 0:
        raise ValueError(
            "torch sees no NVIDIA GPU, which the kernels need; with TRITON_INTERPRET=1 in the environment they run"
            " on a CPU, slowly, to check numbers"
        )
    device = names[0] if device == "cuda" else device
    if device not in names:
        raise ValueError(f"device is {device!r:.80}; there is: {', '.join(names)}")
    index = names.index(device)
    chip = torch.cuda.get_device_name(index)  # first: it initialises CUDA, which Triton takes for granted
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if shared < SHARED_MEMORY:
        raise ValueError(
            f"{device}, {chip}, has {shared >> 10} KB of shared memory for a program; the"
            f" kernels' tiles need {SHARED_MEMORY >> 10} KB, as an H100 has: use backend='reference' here"
        )
    return device, dtype


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


def by_tokens(x: torch.Tensor) -> torch.Tensor:
    """x: (tokens, heads, d) as it is where each token's numbers lie without gaps, be it in wider rows, as q and k do
    beside v; else a copy without any."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def cdiv(n: int, size: int) -> int:
    """In how many pieces of a size n numbers come. Triton's own takes microseconds a call."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def sum_dtype(x: torch.Tensor) -> tl.dtype:
    """The dtype in which a kernel forms its sums over numbers of x: float64 for float64, else float32."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    return getattr(torch, dtype if isinstance(dtype, str) else np.dtype(dtype).name)  # type: ignore[no-any-return]
