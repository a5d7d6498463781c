"""The one place that names the op folders and reads the environment.

A backend is a module of ops, chosen here and passed on as a value.
"""

import os
import warnings
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from minitinker.conform import argument
from minitinker.errors import BadRequestError

BACKENDS = ("reference", "kernels")
_ON_DEVICE = (
    "array",
    "zeros",
    "lora_weight",
    "prepare",
    "free_memory",
    "Replays",
)  # the ops that have no array to tell them where to work
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # there where an NVIDIA driver is: on Linux, and in Windows' Linux


def load_backend(name: str | None = None, device: str | None = None, dtype: str | None = None) -> ModuleType:
    """The module of ops called `name`, else the one $MINITINKER_BACKEND names, else `kernels` where torch sees a
    GPU and no device "cpu" is asked for, else `reference`. Where nothing is asked for and the kernels do not fit
    the GPU, it is `reference`, too, with a warning.

    device: "cpu" for the reference, "cuda:0", ... for the kernels; dtype: that of base weights and activations,
    "float32", or "bfloat16", the default on a GPU. The module's DEVICE and DTYPE tell them, and its makers of
    arrays heed them. Raises BadRequestError for a name that is none of BACKENDS, a backend that cannot run here,
    and a device or dtype that it does not have.
    """
    for what, given in (("backend", name), ("device", device), ("dtype", dtype)):
        argument(str | None, given, what)
    named = name or os.environ.get("MINITINKER_BACKEND")
    name = named or ("kernels" if device != "cpu" and _gpu() else "reference")
    if name not in BACKENDS:
        raise BadRequestError(f"there is no backend {name!r:.80}; there are: {', '.join(BACKENDS)}")
    # Triton warns where this is not set, since what it is by default will change; as it is, bits stay.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        ops = import_module(f"minitinker.{name}")
    except ModuleNotFoundError as error:
        raise BadRequestError(
            f"the backend {name!r} needs {error.name}, which is not installed: pip install 'minitinker[gpu]'"
        ) from error
    try:
        device, dtype = ops.place(device, dtype)
    except ValueError as error:
        if named or device or dtype:
            raise BadRequestError(str(error)) from error
        warnings.warn(f"this computes on the CPU, for the kernels cannot run here: {error}", stacklevel=3)
        return load_backend("reference")
    if (device, dtype) == (ops.DEVICE, ops.DTYPE):
        return ops
    placed = ModuleType(ops.__name__, ops.__doc__)
    vars(placed).update(vars(ops), DEVICE=device, DTYPE=dtype)
    vars(placed).update({op: partial(getattr(ops, op), device=device) for op in _ON_DEVICE})
    return placed


def storage_folder() -> Path:
    """Where checkpoints live: $MINITINKER_HOME, else ~/.minitinker.

    Raises BadRequestError where the home folder that either begins with is not known.
    """
    home = os.environ.get("MINITINKER_HOME")
    try:
        return Path(home).expanduser().absolute() if home else Path.home() / ".minitinker"
    except RuntimeError as error:
        given = f"MINITINKER_HOME is {home!r:.300}" if home else "MINITINKER_HOME is not set"
        raise BadRequestError(
            f"{given}, and that home folder is not known; set it to a whole path"
        ) from error


def _gpu() -> bool:
    """Whether torch sees a GPU. Where there is no driver, that is known without importing torch."""
    if not any(os.path.exists(driver) for driver in _DRIVERS) or not (
        find_spec("torch") and find_spec("triton")
    ):
        return False
    import torch

    return bool(torch.cuda.is_available())
