"""Independent pieces of work: one after the other, since each one fills the GPU."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def width() -> int:
    """How many pieces run at the same time."""
    return 1


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """function of each item, in the order of the items."""
    return [function(item) for item in items]


def on_one_core() -> AbstractContextManager[None]:
    """Nothing: the work is not on cores."""
    return nullcontext()
