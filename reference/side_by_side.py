"""Independent pieces of work, one on each core.

NumPy's matrix products use all cores but its elementwise loops only one; the work of two micro-batches in two
threads uses both cores throughout. Each thread then multiplies with one core.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from operator import itemgetter
from queue import SimpleQueue
from threading import Lock, Thread, local
from typing import Any, NamedTuple, TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")
Outcome = tuple[int, Any, BaseException | None]
Ended = SimpleQueue[Outcome]
Work = SimpleQueue[tuple[Ended, int, Callable[[Any], Any], Any]]

_thread = local()


def width() -> int:
    """How many pieces run at the same time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """function of each item, in the order of the items. If one raises, so does this, after all have ended.

    Called from a piece, it takes one item after the other, since the cores are taken.
    """
    if len(items) <= 1 or width() == 1 or getattr(_thread, "has_a_piece", False):
        return [function(item) for item in items]
    ended: Ended = SimpleQueue()
    with on_one_core(), _off_the_helpers_cores():
        for i, item in enumerate(items[1:], 1):
            _helpers().work.put((ended, i, function, item))
        _thread.has_a_piece = True
        outcomes = [_outcome(0, function, items[0])]
        _thread.has_a_piece = False
        outcomes = sorted([*outcomes, *(ended.get() for _ in items[1:])], key=itemgetter(0))
    try:
        for _, _, error in outcomes:
            if error is not None:
                raise error
        return [result for _, result, _ in outcomes]
    finally:
        del outcomes, error  # an error holds its frames, and with them all that the pieces made


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


@contextmanager
def _off_the_helpers_cores() -> Iterator[None]:
    """In this context the caller stays on its core and its helpers keep off that one, where the system allows it. Left
    alone, a virtual machine wakes a thread on the core of the one that wakes it, be it only by letting go of the
    interpreter, since cores that sleep look taken; for some 10 ms the two then take turns there. A thread that a piece
    started would stay on that core."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    core = _current_core()()
    if core not in cores or len(cores) == 1:
        yield
        return
    try:
        with suppress(OSError):  # what is not allowed stays undone
            _give_helpers(frozenset(cores - {core}))
            os.sched_setaffinity(0, {core})
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, cores)


@lru_cache(maxsize=1)  # the last call's cores are theirs still
def _give_helpers(cores: frozenset[int]) -> None:
    for thread in _helpers().threads:
        os.sched_setaffinity(thread, cores)


@lru_cache
def _current_core() -> Callable[[], int]:
    """What tells which core a thread is on: -1 where the system does not."""
    return getattr(ctypes.CDLL(None), "sched_getcpu", lambda: -1) if os.name == "posix" else lambda: -1


class Crew(NamedTuple):
    """Threads, as the system numbers them, and what they work off."""

    work: Work
    threads: list[int]


@lru_cache
def _helpers() -> Crew:
    """A thread for each core but the caller's."""
    return _crew(width() - 1)


@lru_cache
def _setter() -> Crew:
    """The one thread that sets how many cores OpenBLAS uses: it listens to the first that did."""
    return _crew(1)


def _in_setter(function: Callable[[], Any]) -> Any:
    ended: Ended = SimpleQueue()
    _setter().work.put((ended, 0, lambda _: function(), None))
    _, result, error = ended.get()
    if error is not None:
        raise error
    return result


def _crew(count: int) -> Crew:
    """So many threads, at work.

    They are daemons, so they never hold up the end of the program, and work until then; executors of the
    standard library take no more work once the main thread has ended.
    """
    work: Work = SimpleQueue()

    def help_out() -> None:
        _thread.has_a_piece = True
        while True:
            ended, i, function, item = work.get()
            ended.put(_outcome(i, function, item))
            del ended, function, item  # else they would live until there is more to do

    threads = [Thread(target=help_out, name="minitinker-reference", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return Crew(work, [thread.native_id for thread in threads if thread.native_id is not None])


def _outcome(i: int, function: Callable[[Any], Any], item: Any) -> Outcome:
    """Of item i: what came out, or what was raised."""
    try:
        return i, function(item), None
    except BaseException as error:
        return i, None, error


@lru_cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


if hasattr(os, "register_at_fork"):  # the child has none of the threads, and makes its own when it needs them
    os.register_at_fork(after_in_child=_helpers.cache_clear)
    os.register_at_fork(after_in_child=_give_helpers.cache_clear)
    os.register_at_fork(after_in_child=_setter.cache_clear)
