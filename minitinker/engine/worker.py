"""The one thread that does all numeric work of a ServiceClient, in the order in which it was asked."""

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from queue import Empty, SimpleQueue
from traceback import clear_frames
from typing import Any, TypeVar

from minitinker.engine.sampler import Sampler
from minitinker.errors import ServiceClosedError, TinkerError
from minitinker.futures import settle

# Once the main thread has ended this module can no longer be imported, and work that is finished then may
# be the first to import what needs it (torch for a custom loss, the hub's client for a model).
import_module("concurrent.futures.thread")

T = TypeVar("T")

TURN = 0.01  # seconds of jobs between two decode steps; the job that goes beyond is the last
LOOK_UP = 0.2  # seconds after which an idle worker looks whether the program has come to its end


class Worker:
    """A queue of jobs and one thread that runs them, first in, first out.

    Samplers share the thread: when the jobs have had their TURN, each sampler that has work does one decode
    step, so that a long queue does not stall sampling, nor many samples the queue. Requests that are made
    together wait in line together and so decode together. A sampler rests before anything but its own next step.

    When the main thread ends, the worker finishes what was asked and ends too; if an exception ended it, Ctrl-C
    among them but not SystemExit, what has not begun is dropped.
    """

    def __init__(self, explain: Callable[[BaseException], BaseException] = lambda error: error) -> None:
        """explain: from what a job raised to what is told; called when the job's arrays are gone."""
        self._explain = explain
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        # A plain lock and a SimpleQueue are taken and left in one piece. A Condition is not: Ctrl-C may come
        # when the main thread has just taken it, and the worker would wait for it forever.
        self._submitting = threading.Lock()
        self._closed = False
        self._dropping = False
        self._samplers: list[Sampler] = []
        self.thread = threading.Thread(target=self._run, name="minitinker-worker")
        self.thread.start()

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Queue a job. Its result, or what it raises, comes with the future."""
        future: Future[T] = Future()
        with self._submitting:
            if self._closed:
                raise ServiceClosedError
            if not self.thread.is_alive():
                raise TinkerError("the ServiceClient was made before this process was forked; make a new one")
            self._jobs.put((job, future))
        return future

    def add_sampler(self, sampler: Sampler) -> None:
        """Let a sampler take its turns. To be called in the worker's thread."""
        self._samplers.append(sampler)

    @property
    def closed(self) -> bool:
        """Whether it takes no more jobs."""
        return self._closed

    def close(self, finish: bool) -> None:
        """End the thread: after all that was asked if `finish`, else after the job at hand.

        What is left undone is cancelled. Returns when the thread has ended, unless called in that thread.
        """
        with self._submitting:
            self._closed = True
            self._dropping = self._dropping or not finish
        if threading.current_thread() is not self.thread:
            self._jobs.put(None)  # wakes it
            self.thread.join()

    def _run(self) -> None:
        while not self._dropping and not (self._closed and self._jobs.empty() and not self._busy()):
            job = self._next(wait=not self._busy())
            turn = time.monotonic() + TURN
            while job is not None:
                for sampler in self._samplers:
                    sampler.rest()
                _run_job(*job, self._explain)
                job = None  # it may hold the last reference to the client whose end closes this worker
                if not self._dropping and time.monotonic() <= turn:
                    job = self._next(wait=False)
            if not self._dropping:
                busy = self._busy()
                for sampler in busy:
                    sampler.step()
                    if len(busy) > 1:
                        sampler.rest()
            self._close_with_program()
        self._drop()

    def _next(self, wait: bool) -> tuple[Callable[[], Any], "Future[Any]"] | None:
        """The next job, if need be waited for; None where there is none, after a while."""
        if not wait and self._jobs.empty():  # between most steps; raising Empty would take longer
            return None
        with suppress(Empty):
            return self._jobs.get(block=wait, timeout=LOOK_UP)
        return None

    def _drop(self) -> None:
        """Cancel what is left, and tell those who wait for it."""
        while not self._jobs.empty():
            _, future = self._jobs.get() or (None, Future())
            future.cancel()
            future.set_running_or_notify_cancel()
        for sampler in self._samplers:
            sampler.cancel_all()

    def _busy(self) -> list[Sampler]:
        return [sampler for sampler in self._samplers if sampler.busy]

    def _close_with_program(self) -> None:
        if not (self._dropping or threading.main_thread().is_alive()):
            # In an interactive session an error does not end the program, and its end is not an error.
            failed = getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")
            self.close(finish=not failed)


def _run_job(
    job: Callable[[], Any], future: "Future[Any]", explain: Callable[[BaseException], BaseException]
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    failure: BaseException | None = None
    try:
        result = job()
    except BaseException as error:  # whatever it was, whoever asked must hear of it
        failure = error
    if failure is None:
        settle(future, result)
        return
    # The traceback would hold every array of the failed call for as long as someone holds the error.
    cause: BaseException | None = failure
    while cause is not None:
        clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    settle(future, error=explain(failure))
