"""TensorData: the arrays that go in and out of calls, int64 or float32, never changing once made."""

import math
import sys
from collections.abc import Sequence
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, get_args

import numpy as np
import numpy.typing as npt

from minitinker.conform import conform
from minitinker.sparse import Layout, compress, expand, layout

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["int64", "float32"]

_DTYPES: tuple[TensorDtype, ...] = get_args(TensorDtype)
_INT64_END = 2**63  # one past the largest


class TensorData:
    """An array of int64 or float32, copied from its source and read-only from then on.

    Equal are tensors of the same dtype, layout, shape and values; NaN equals NaN, so that a copy equals its
    original.

    Args:
        data: numbers, flat or nested, or an array; None: none. Booleans count as 0 and 1. For "int64" they must be
            whole.
        dtype: "int64" or "float32".
        shape: what flat data is folded into; otherwise the shape of the data itself.
        sparse_crow_indices, sparse_col_indices: for a matrix in compressed sparse rows. `data` then holds the
            listed values alone, row by row; `shape` is that of the whole matrix; row i lists the columns
            sparse_col_indices[sparse_crow_indices[i] : sparse_crow_indices[i + 1]].

    Raises: TypeError for what is not numbers; ValueError for numbers that the dtype cannot hold, for
        ragged data and for a shape or indices that do not fit.
    """

    __slots__ = ("_array", "_layout")
    _array: npt.NDArray[Any]  # all numbers, or, of a sparse tensor, the listed ones: (listed,)
    _layout: Layout | None

    def __init__(
        self,
        data: "Sequence[Any] | npt.NDArray[Any] | None" = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        if dtype is None:
            raise TypeError(f"TensorData needs a dtype, one of {_DTYPES}")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"dtype is {shortened(dtype)}; it must be one of {_DTYPES}")
        source = _as_numbers([] if data is None else data)
        array = _as_int64(source) if dtype == "int64" else _as_float32(source)
        lengths = None if shape is None else _lengths("shape", shape)
        self._layout = None
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            array = array.ravel()
            self._layout = layout(sparse_crow_indices, sparse_col_indices, lengths, len(array))
        elif lengths is not None and tuple(lengths) != array.shape:
            array = _fold(array, tuple(lengths))
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
        try:
            return cls.from_numpy(tensor.numpy(force=True))
        except (RuntimeError, TypeError) as error:  # of a layout or device without numbers to read
            raise TypeError(f"the data is a torch tensor that NumPy cannot hold: {error}") from None

    @classmethod
    def from_torch_sparse(cls, tensor: "torch.Tensor", pad_value: int = 0) -> "TensorData":
        """Of a matrix only the cells that are not `pad_value`, where that takes less room; else as from_torch."""
        dense, pad = cls.from_torch(tensor), _checked_pad(pad_value)
        if dense._array.ndim != 2:
            return dense
        values, where = compress(dense._array, pad)
        if len(where.crow) + 2 * len(values) >= dense._array.size:
            return dense
        return cls(values, dense.dtype, where.shape, where.crow.tolist(), where.col.tolist())

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

    def with_layout_of(self, other: "TensorData") -> "TensorData":
        """This matrix with the cells alone that `other`, of the same shape, lists; all, where that is dense."""
        where = other._layout
        if where is None:
            return self
        values = self.to_numpy()[where.rows, where.col]
        return TensorData(values, self.dtype, where.shape, where.crow.tolist(), where.col.tolist())

    @property
    def dtype(self) -> TensorDtype:
        """ "int64" or "float32"."""
        return "int64" if self._array.dtype == np.int64 else "float32"

    @property
    def shape(self) -> list[int]:
        """The length of each dimension, of a sparse tensor those of the whole matrix."""
        return list(self._array.shape if self._layout is None else self._layout.shape)

    @property
    def data(self) -> list[Any]:
        """All numbers in one flat list, last dimension fastest; of a sparse tensor the listed ones."""
        flat: list[Any] = self._array.ravel().tolist()
        return flat

    @property
    def sparse_crow_indices(self) -> list[int] | None:
        """Where each row begins among the listed values, and at last their number: (rows + 1); None if dense."""
        return None if self._layout is None else [int(i) for i in self._layout.crow]

    @property
    def sparse_col_indices(self) -> list[int] | None:
        """The column of each listed value; None if dense."""
        return None if self._layout is None else [int(i) for i in self._layout.col]

    def tolist(self, pad_value: int = 0) -> Any:
        """The numbers in lists nested as the shape has it; a bare number for shape []."""
        return self.to_numpy(pad_value).tolist()

    def to_numpy(self, pad_value: int = 0) -> npt.NDArray[Any]:
        """A copy of the array, for the caller to keep; `pad_value` where a sparse tensor lists nothing."""
        pad = _checked_pad(pad_value)
        return self._array.copy() if self._layout is None else expand(self._array, self._layout, pad)

    def to_torch(self, pad_value: int = 0) -> "torch.Tensor":
        """A copy as a torch tensor on the CPU. Raises ImportError where torch is not installed."""
        import torch

        return torch.from_numpy(self.to_numpy(pad_value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self._form() == other._form() and np.array_equal(self._array, other._array, equal_nan=True)

    def _form(self) -> tuple[Any, ...]:
        return self.dtype, self.shape, self.sparse_crow_indices, self.sparse_col_indices

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrays come back from pickle and deepcopy writeable; going through the constructor they do not.
        return TensorData, (self._array, *self._form())

    def __repr__(self) -> str:
        shown = np.array2string(self._array, threshold=8, edgeitems=3, separator=", ").replace("\n", "")
        sparse = "" if self._layout is None else ", sparse"
        return f"TensorData({shown}, dtype={self.dtype!r}, shape={self.shape}{sparse})"


TensorLike: TypeAlias = "TensorData | npt.NDArray[Any] | torch.Tensor | Sequence[Any]"


def is_torch_tensor(value: object) -> "TypeGuard[torch.Tensor]":
    """Whether `value` is a torch tensor. Where torch was never imported nothing is, and it stays so."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _lengths(name: str, value: Any) -> list[int]:
    """Whole numbers in a list. Raises ValueError that names the argument."""
    try:
        lengths: list[int] = conform(list[int], value, name)
        np.array(lengths, np.int64)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"{name} must be whole numbers that int64 holds: {error}") from None
    return lengths


def _as_numbers(data: object) -> npt.NDArray[Any]:
    """An array of booleans, integers or floats."""
    try:
        source = np.asarray(data)
    except ValueError:
        raise ValueError("data: nested lists must be rectangular, but these are ragged") from None
    except Exception as error:  # of what only seems to be an array, as a torch tensor without numbers
        raise TypeError(f"data is {shortened(data)}, of which no array can be made: {error!s:.200}") from None
    # NumPy turns Python integers that fit no common integer type into objects or floats.
    if source.dtype == object or (source.dtype == float and np.any(np.abs(source) >= _INT64_END)):
        numbers = np.asarray(data, dtype=object).flat
        if all(isinstance(number, int) for number in numbers):
            raise ValueError("data: an integer is outside of int64")
    if source.dtype.kind not in "biuf":
        raise TypeError(
            f"data: values of dtype {source.dtype!s:.80} are not numbers that int64 or float32 can hold"
        )
    return source


def _dtype_of(source: npt.NDArray[Any] | np.generic) -> TensorDtype:
    if source.dtype.kind in "iu":
        return "int64"
    if source.dtype.kind == "f":
        return "float32"
    raise TypeError(
        f"data: dtype {source.dtype!s:.80} is neither integer nor float; convert it, for instance with astype"
    )


def _as_int64(source: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if source.dtype.kind == "f" and not np.all(np.trunc(source) == source):  # NaN equals nothing
        raise ValueError("data: dtype is int64, but a number is not whole")
    if source.size and not -_INT64_END <= source.min().item() <= source.max().item() < _INT64_END:
        raise ValueError("data: a number is outside of int64")
    return np.array(source, dtype=np.int64, order="C")


def _as_float32(source: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        array = np.array(source, dtype=np.float32, order="C")
    if np.any(np.isinf(array) & np.isfinite(source)):
        raise ValueError(
            f"data: a number is outside of float32, which ends at {np.finfo(np.float32).max:.4g}"
        )
    return array


def _fold(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Flat `array` in the given shape."""
    if any(length < 0 for length in shape):
        raise ValueError(
            f"shape is {shortened(list(shape))}; a length must be at least 0, for none is worked out from the data,"
            f" which has shape {list(array.shape)}"
        )
    if array.ndim != 1 or math.prod(shape) != array.size:
        raise ValueError(f"shape is {shortened(list(shape))}, but the data has shape {list(array.shape)}")
    try:
        return array.reshape(shape)
    except ValueError as error:  # more dimensions than NumPy has
        raise ValueError(f"shape is {shortened(list(shape))}: {error}") from None


def _checked_pad(pad_value: object) -> int:
    if isinstance(pad_value, bool) or not isinstance(pad_value, int | np.integer):
        raise TypeError(
            f"pad_value is {shortened(pad_value)} ({type(pad_value).__name__}); it must be a whole number"
        )
    return int(pad_value)
