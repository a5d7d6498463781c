"""Independent pieces of work, one on each core.

NumPy's matrix products use all cores but its elementwise loops only one; the work of two micro-batches in two
threads uses both cores throughout. Each thread then multiplies with one core.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import lru_cache
from queue import SimpleQueue
from threading import Lock, Thread
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


@contextmanager
def on_one_core() -> Iterator[None]:
    """Matrix products in this context use one core: for small ones, which waking other cores makes slower.

    The setting is the whole process's: the first thread to enter makes it, the last one to leave takes it back.
    """
    global _inside, _limit
    with _entering:
        if _inside == 0:
            _limit = _in_setter(lambda: _libraries().limit(limits=1, user_api="blas"))
        _inside += 1
    try:
        yield
    finally:
        with _entering:
            _inside -= 1
            if _inside == 0:
                _in_setter(_limit.restore_original_limits)


_entering = Lock()
_inside = 0
_limit: Any = None

Work = SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any]]


@lru_cache
def _helpers() -> "Work":
    """Where a thread for each core but the caller's takes its work from."""
    return _crew(width() - 1)


@lru_cache
def _setter() -> "Work":
    """The work of the one thread that sets how many cores OpenBLAS uses: it listens to the first that did."""
    return _crew(1)


def _in_setter(function: Callable[[], Result]) -> Result:
    future: Future[Result] = Future()
    _setter().put((future, lambda _: function(), None))
    return future.result()


def _crew(threads: int) -> "Work":
    """A queue and threads that work it off.

    They are daemons, so they never hold up the end of the program, and work until then; executors of the
    standard library take no more work once the main thread has ended.
    """
    work: Work = SimpleQueue()

    def help_out() -> None:
        while True:
            future, function, item = work.get()
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)
            del future, function, item  # else they would live until there is more to do

    for _ in range(threads):
        Thread(target=help_out, name="minitinker-reference", daemon=True).start()
    return work


@lru_cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


if hasattr(os, "register_at_fork"):  # the child has none of the threads, and makes its own when it needs them
    os.register_at_fork(after_in_child=_helpers.cache_clear)
    os.register_at_fork(after_in_child=_setter.cache_clear)
