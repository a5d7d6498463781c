"""Compressed sparse rows: a matrix of which only some cells are listed, row by row.

Of row i are listed the columns col[crow[i]:crow[i + 1]], in rising order, with the values in the same places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.conform import conform


@dataclass(frozen=True)
class Layout:
    """Which cells are listed. crow: (rows + 1,), col: (listed,), both int64 and read-only."""

    crow: NDArray[np.int64]
    col: NDArray[np.int64]
    shape: tuple[int, int]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each listed cell: (listed,)."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.crow))


def layout(
    crow: Sequence[int] | None, col: Sequence[int] | None, shape: Sequence[int] | None, listed: int
) -> Layout:
    """A checked layout for `listed` values. Raises ValueError that says what does not fit."""
    if crow is None or col is None:
        raise ValueError("sparse_crow_indices and sparse_col_indices are given together or not at all")
    if shape is None or len(shape) != 2 or min(shape) < 0:
        raise ValueError(
            f"shape is {shortened(shape)}; sparse data needs the shape of the whole matrix, [rows, columns], each at"
            " least 0"
        )
    rows, columns = shape
    made = Layout(_indices("crow", crow), _indices("col", col), (rows, columns))
    steps = np.diff(made.crow)
    if made.crow.shape != (rows + 1,) or made.crow[0] != 0 or made.crow[-1] != listed or (steps < 0).any():
        raise ValueError(
            f"sparse_crow_indices must be {rows + 1} numbers that never fall, from 0 to the {listed} values listed"
        )
    if made.col.shape != (listed,) or ((made.col < 0) | (made.col >= columns)).any():
        raise ValueError(
            f"sparse_col_indices must be {listed} columns, one a value, each from 0 to {columns - 1}"
        )
    same_row = np.diff(made.rows) == 0
    if (np.diff(made.col)[same_row] <= 0).any():
        raise ValueError("sparse_col_indices must rise within each row")
    made.crow.flags.writeable = made.col.flags.writeable = False
    return made


def _indices(name: str, value: Sequence[int]) -> NDArray[np.int64]:
    name = f"sparse_{name}_indices"
    try:
        return np.array(conform(list[int], value, name), np.int64)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"{name} must be whole numbers that int64 holds: {error}") from None


def compress(array: NDArray[Any], pad: int) -> tuple[NDArray[Any], Layout]:
    """The cells of a matrix that are not `pad`, and where they are."""
    rows, col = np.nonzero(array != pad)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(array)))])
    return array[rows, col], layout(crow.tolist(), col.tolist(), array.shape, len(col))


def expand(values: NDArray[Any], where: Layout, pad: int) -> NDArray[Any]:
    """The whole matrix, `pad` where nothing is listed."""
    array = np.full(where.shape, pad, values.dtype)
    array[where.rows, where.col] = values
    return array
