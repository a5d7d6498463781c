"""Calls of a function that is asked for again and again: on a CPU, each is a call like any other."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Replays:
    """Calls functions of rows."""

    def __init__(self, device: str | None = None) -> None:
        """device: None or "cpu"."""

    def __call__(
        self, of: Sequence[Any], function: Callable[..., Sequence[Array]], *inputs: Array
    ) -> Sequence[Array]:
        """function(*inputs), each (rows, ...); it returns arrays of as many rows. of: what else it depends on."""
        return function(*map(np.asarray, inputs))
