"""Independent pieces of work, one on each core.

NumPy's matrix products use all cores but its elementwise loops only one; the work of two micro-batches in two
threads uses both cores throughout. Each thread then multiplies with one core.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")


def width() -> int:
    """How many pieces run at the same time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """function of each item, in the order of the items. If one raises, so does this, after all have ended."""
    if len(items) <= 1 or width() == 1:
        return [function(item) for item in items]
    with on_one_core():
        others: list[Future[Result]] = [Future() for _ in items[1:]]
        for future, item in zip(others, items[1:], strict=True):
            _helpers().put((future, function, item))
        try:
            first = function(items[0])
        finally:
            wait(others)
        return [first, *(future.result() for future in others)]


def on_one_core() -> AbstractContextManager[object]:
    """Matrix products in this context use one core: for small ones, which waking other cores makes slower."""
    context: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return context


@lru_cache
def _helpers() -> "SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any]]":
    """Where a thread for each core but the caller's takes its work from.

    They are daemons, so they never hold up the end of the program, and work until then; executors of the
    standard library take no more work once the main thread has ended.
    """
    work: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any]] = SimpleQueue()

    def help_out() -> None:
        while True:
            future, function, item = work.get()
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)
            del future, function, item  # else they would live until there is more to do

    for _ in range(width() - 1):
        Thread(target=help_out, name="minitinker-reference", daemon=True).start()
    return work


@lru_cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
