"""safetensors files: read with errors that name the file and the tensor, written tensor by tensor.

safetensors checks that a file is whole; the bytes are taken from the file here, since its NumPy interface has
no bfloat16. A bfloat16 number is the upper half of a float32.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from minitinker.errors import BadRequestError

_STORED_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16: its bits
_BLOCK = 1 << 16  # numbers converted at a time, so that the temporaries stay in cache

Float32Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `offset` bytes into the file, as `dtype`, by the format's name for it."""

    path: Path
    dtype: str
    shape: Shape
    offset: int

    @property
    def readable(self) -> bool:
        """Whether it is float32, float16 or bfloat16."""
        return self.dtype in _STORED_DTYPES

    def map(self) -> npt.NDArray[Any]:
        """The tensor in the file, read only and mapped, so that it takes no memory of its own."""
        return np.memmap(self.path, _STORED_DTYPES[self.dtype], "r", self.offset, self.shape)

    def to_float32(self, mapped: npt.NDArray[Any]) -> Float32Array:
        """A copy of (a part of) the mapped tensor; NumPy converts blockwise, without a whole temporary."""
        out = np.empty(mapped.shape, np.float32)
        if self.dtype == "BF16":
            np.left_shift(mapped, 16, out=out.view(np.uint32), dtype=np.uint32)
        else:
            out[...] = mapped
        return out


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, after safetensors has found it whole.

    Raises BadRequestError, naming the file and the first tensor that its end cuts off.
    """
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadRequestError(f"{path} is not a whole safetensors file: {_cut_off(path)}{error}") from error
    header, start = _parse_header(path)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of the tensors, and the byte at which their data starts: 8 bytes of length, JSON, data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    header.pop("__metadata__", None)
    return header, 8 + length


def _cut_off(path: Path) -> str:
    """For a damaged file with a readable header: which tensor its end cuts off first."""
    try:
        header, start = _parse_header(path)
        ends = {name: start + entry["data_offsets"][1] for name, entry in header.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""
    size = path.stat().st_size
    cut = [name for name in ends if ends[name] > size]
    if not cut:
        return ""
    first = min(cut, key=ends.__getitem__)
    return f"tensor {first!r} ends at byte {ends[first]}, but the file at byte {size}; "


def check_tensors(
    stored: Mapping[str, Stored], expected: Mapping[str, Shape], listing: Path, source: str
) -> None:
    """Raise BadRequestError unless names and shapes are the expected ones.

    For the messages: `listing` is the file that should name all tensors, `source` what the expectation is
    drawn from.
    """
    missing = [name for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            nearest = difflib.get_close_matches(name, missing or expected, n=1, cutoff=0.0)[0]
            raise BadRequestError(
                f"{tensor.path}: tensor {name!r} is not one that {source} asks for; the nearest"
                f" expected name is {nearest!r}{', which is missing' if missing else ''}"
            )
        if tensor.shape != expected[name]:
            raise BadRequestError(
                f"{tensor.path}: tensor {name!r} has shape {tensor.shape}; {source} makes it {expected[name]}"
            )
    if missing:
        raise BadRequestError(f"{listing}: tensor {missing[0]!r} is missing (of {len(missing)} that are)")


def check_readable(name: str, stored: Stored) -> None:
    """Raise BadRequestError where the tensor is of a dtype that is not read."""
    if not stored.readable:
        raise BadRequestError(
            f"{stored.path}: tensor {name!r} has dtype {stored.dtype}; it must be one of"
            f" {', '.join(_STORED_DTYPES)}"
        )


def read_tensor(name: str, stored: Stored) -> Float32Array:
    """The tensor as a new float32 array. Raises what `check_readable` raises."""
    check_readable(name, stored)
    return stored.to_float32(stored.map())


def write_tensors(
    path: Path, shapes: Mapping[str, Shape], tensors: Iterable[Float32Array], dtype: str
) -> str:
    """Write a safetensors file, in "float32" or "bfloat16", rounded to nearest, ties to even.

    `tensors` gives the arrays of `shapes` in order and is read once, so it may make them as it goes. Returns
    the sha256 of the bytes, in hexadecimal.
    """
    stored, size = ("BF16", 2) if dtype == "bfloat16" else ("F32", 4)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    digest = hashlib.sha256()
    with path.open("wb") as out:

        def put(data: bytes) -> None:
            digest.update(data)
            out.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for _, tensor in zip(shapes, tensors, strict=True):
            # Block by block: safetensors' own writer would want all the bfloat16 bits at once.
            for block in _blocks(tensor):
                put((to_bfloat16_bits(block) if dtype == "bfloat16" else block).tobytes())
    return digest.hexdigest()


def to_bfloat16_bits(x: Float32Array) -> npt.NDArray[np.uint16]:
    """The bits of x, of any shape, in bfloat16: rounded to nearest, ties to even. NaN stays NaN."""
    out = np.empty(x.shape, np.uint16)
    start = 0
    for block in _blocks(x):
        bits = block.view(np.uint32)
        # Half of the last kept place, less a bit where that place is even, carries just when rounding is up.
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        # The same carry would turn some NaNs into infinities: cut those off instead, with the quiet bit set.
        out.reshape(-1)[start : start + len(block)] = np.where(np.isnan(block), (bits >> 16) | 0x40, rounded)
        start += len(block)
    return out


def _blocks(x: Float32Array) -> Iterator[Float32Array]:
    """The numbers of x in row-major order, contiguous, a bounded count at a time."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]
