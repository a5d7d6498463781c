"""TensorData: the arrays that go in and out of calls, int64 or float32, never changing once made."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["int64", "float32"]

_DTYPES: tuple[TensorDtype, ...] = get_args(TensorDtype)
_INT64_END = 2**63  # one past the largest


class TensorData:
    """An array of int64 or float32, copied from its source and read-only from then on.

    Equal are tensors of the same dtype, shape and values; NaN equals NaN, so that a copy equals its original.

    Args:
        data: numbers, flat or nested, or an array. Booleans count as 0 and 1. For "int64" they must be whole.
        dtype: "int64" or "float32".
        shape: what flat data is folded into; otherwise the shape of the data itself.

    Raises: TypeError for what is not numbers; ValueError for numbers that the dtype cannot hold, for
        ragged data and for a shape that does not fit.
    """

    __slots__ = ("_array",)

    def __init__(
        self,
        data: "Sequence[Any] | npt.NDArray[Any]",
        dtype: TensorDtype,
        shape: Sequence[int] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {_DTYPES}")
        source = _as_numbers(data)
        array = _as_int64(source) if dtype == "int64" else _as_float32(source)
        if shape is not None and tuple(shape) != array.shape:
            array = _fold(array, tuple(shape))
        array.flags.writeable = False
        self._array = array

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> "TensorData":
        """Integers of any width become int64, floats of any width float32.

        Raises: TypeError for any other dtype: a boolean array does not say which of the two it means.
        """
        if not isinstance(array, np.ndarray | np.generic):
            raise TypeError(f"from_numpy takes a NumPy array, not {type(array).__name__}")
        return cls(array, _dtype_of(array))

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        """As from_numpy, from any device; bfloat16 widens to float32, gradients are cut off."""
        if not is_torch_tensor(tensor):
            raise TypeError(f"from_torch takes a torch tensor, not {type(tensor).__name__}")
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4:
            tensor = tensor.float()  # NumPy has no bfloat16
        return cls.from_numpy(tensor.numpy(force=True))

    @classmethod
    def from_any(cls, value: "TensorLike", dtype: TensorDtype | None = None) -> "TensorData":
        """From a TensorData (which is returned as it is), an array, a torch tensor or nested lists.

        `dtype` is for the lists alone; without it whole numbers become int64 and others float32.
        """
        if isinstance(value, TensorData):
            return value
        if isinstance(value, np.ndarray):
            return cls.from_numpy(value)
        if is_torch_tensor(value):
            return cls.from_torch(value)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            source = _as_numbers(value)
            return cls(source, dtype or _dtype_of(source))
        raise TypeError(
            f"{type(value).__name__} is not a tensor; give a TensorData, an array or a list of numbers"
        )

    @property
    def dtype(self) -> TensorDtype:
        """ "int64" or "float32"."""
        return "int64" if self._array.dtype == np.int64 else "float32"

    @property
    def shape(self) -> list[int]:
        """The length of each dimension."""
        return list(self._array.shape)

    @property
    def data(self) -> list[Any]:
        """All numbers in one flat list, last dimension fastest."""
        flat: list[Any] = self._array.ravel().tolist()
        return flat

    def tolist(self) -> Any:
        """The numbers in lists nested as the shape has it; a bare number for shape []."""
        return self._array.tolist()

    def to_numpy(self) -> npt.NDArray[Any]:
        """A copy of the array, for the caller to keep."""
        return self._array.copy()

    def to_torch(self) -> "torch.Tensor":
        """A copy as a torch tensor on the CPU. Raises ImportError where torch is not installed."""
        import torch

        return torch.from_numpy(self.to_numpy())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(self._array, other._array, equal_nan=True)

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrays come back from pickle and deepcopy writeable; going through the constructor they do not.
        return TensorData, (self._array, self.dtype)

    def __repr__(self) -> str:
        shown = np.array2string(self._array, threshold=8, edgeitems=3, separator=", ").replace("\n", "")
        return f"TensorData({shown}, dtype={self.dtype!r}, shape={self.shape})"


TensorLike: TypeAlias = "TensorData | npt.NDArray[Any] | torch.Tensor | Sequence[Any]"


def is_torch_tensor(value: object) -> "TypeGuard[torch.Tensor]":
    """Whether `value` is a torch tensor. Where torch was never imported nothing is, and it stays so."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_numbers(data: object) -> npt.NDArray[Any]:
    """An array of booleans, integers or floats."""
    try:
        source = np.asarray(data)
    except ValueError:
        raise ValueError("nested lists must be rectangular, but these are ragged") from None
    # NumPy turns Python integers that fit no common integer type into objects or floats.
    if source.dtype == object or (source.dtype == float and np.any(np.abs(source) >= _INT64_END)):
        numbers = np.asarray(data, dtype=object).flat
        if all(isinstance(number, int) for number in numbers):
            raise ValueError("an integer is outside of int64")
    if source.dtype.kind not in "biuf":
        raise TypeError(f"values of dtype {source.dtype} are not numbers that int64 or float32 can hold")
    return source


def _dtype_of(source: npt.NDArray[Any] | np.generic) -> TensorDtype:
    if source.dtype.kind in "iu":
        return "int64"
    if source.dtype.kind == "f":
        return "float32"
    raise TypeError(
        f"dtype {source.dtype} is neither integer nor float; convert it, for instance with astype"
    )


def _as_int64(source: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if source.dtype.kind == "f" and not np.all(np.trunc(source) == source):  # NaN equals nothing
        raise ValueError("dtype is int64, but a number is not whole")
    if source.size and not -_INT64_END <= source.min().item() <= source.max().item() < _INT64_END:
        raise ValueError("a number is outside of int64")
    return np.array(source, dtype=np.int64, order="C")


def _as_float32(source: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        array = np.array(source, dtype=np.float32, order="C")
    if np.any(np.isinf(array) & np.isfinite(source)):
        raise ValueError(f"a number is outside of float32, which ends at {np.finfo(np.float32).max:.4g}")
    return array


def _fold(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Flat `array` in the given shape."""
    if array.ndim != 1 or any(length < 0 for length in shape) or np.prod(shape, dtype=int) != array.size:
        raise ValueError(f"shape is {list(shape)}, but the data has shape {list(array.shape)}")
    return array.reshape(shape)
