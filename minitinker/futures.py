"""APIFuture: what a call returns at once, to be asked for its result from any thread or event loop."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, wait
from typing import Any, Generic, Self, TypeVar

from minitinker.conform import argument
from minitinker.errors import BadRequestError

T = TypeVar("T")

# Waiting for a lock cannot be interrupted on Windows, so result() looks up this often (seconds) to let
# Ctrl-C through. A result that arrives ends the wait at once on every system.
_LOOK_UP = 0.2


def settle(future: Future[T], result: T | None = None, error: BaseException | None = None) -> None:
    """Complete a future that is not done yet, unless it was cancelled.

    What its callbacks raise, be it SystemExit, stays with them: the thread that settles goes on.
    """
    with contextlib.suppress(BaseException):
        if not (future.running() or future.set_running_or_notify_cancel()):
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)


class APIFuture(Generic[T]):
    """The result of a call, of type T, that may not be there yet.

    `f.result()` blocks, `await f` waits in an event loop; each may be done as often as wanted, by several
    waiters at once, and every one of them gets the result or the exception of the work.

    Giving up waiting never stops the work: neither a timeout nor the cancelling of a task that awaits.
    The calls of a client run in the order they were made, and one taken out of the middle would leave
    another model behind than the script says. To take back work that has not begun, call
    `f.future().cancel()`; whoever waits then gets concurrent.futures.CancelledError.

    Args:
        future: what the worker completes.
        worker: the thread that does the work. Waiting there for a future that is not done would wait
            for itself, so it raises RuntimeError.
    """

    def __init__(self, future: Future[T], worker: threading.Thread | None = None) -> None:
        self._future = future
        self._worker = worker
        self.failure_seen = False  # whether someone who asked for the result was told that the work failed

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result, at most `timeout` seconds (None: as long as it takes).

        Raises: TimeoutError (the work goes on), RuntimeError in the worker's own thread, and whatever the
            work raised.
        """
        timeout = _checked_timeout(timeout)
        self._refuse_to_wait_for_itself()
        end = None if timeout is None else time.monotonic() + timeout
        while not self._future.done():
            left = _LOOK_UP if end is None else end - time.monotonic()
            if left <= 0:
                raise TimeoutError(_too_late(timeout))
            wait([self._future], min(left, _LOOK_UP))
        return self._outcome()

    async def result_async(self, timeout: float | None = None) -> T:
        """Like `result`, without blocking the event loop."""
        timeout = _checked_timeout(timeout)
        self._refuse_to_wait_for_itself()
        if not self._future.done():
            try:
                async with asyncio.timeout(timeout):
                    await self._done_in_this_loop()
            except TimeoutError:
                raise TimeoutError(_too_late(timeout)) from None
        return self._outcome()

    def future(self) -> Future[T]:
        """The future underneath, for concurrent.futures.wait, as_completed and callbacks."""
        return self._future

    async def coroutine(self) -> T:
        """The same as a coroutine, for asyncio.create_task and others that take nothing else."""
        return await self

    def __await__(self) -> Generator[Any, Any, T]:
        return self.result_async().__await__()

    def _done_in_this_loop(self) -> asyncio.Future[None]:
        """A future of the running event loop that is done when the work is.

        asyncio.wrap_future would hand a cancellation on to the work, and complains when the work
        outlives the loop.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            if not done.done():
                done.set_result(None)

        def tell_from_worker(_: Future[T]) -> None:
            # A loop that has been closed meanwhile raises, and has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(tell)

        self._future.add_done_callback(tell_from_worker)
        return done

    def _outcome(self) -> T:
        try:
            return self._future.result()
        except BaseException:
            self.failure_seen = True
            raise

    def _refuse_to_wait_for_itself(self) -> None:
        if threading.current_thread() is self._worker and not self._future.done():
            raise RuntimeError(
                "this result would never come: the code that asks (a custom loss, for instance) runs in the "
                "thread that has to do the work. Ask outside, or before the call that runs this code"
            )


class ClientFuture(APIFuture[Any]):
    """A client that is its own future: use it right away, await it, or ask it for `.result()`.

    What is kept is only that the making is over. A future with the client for its result would be held by
    the client and hold it, and the weights of a dropped client would stay until Python looks for cycles.

    Args:
        made: done when the client is made, or has the exception that the making raised.
        worker: the thread that makes it.
    """

    def __init__(self, made: Future[None], worker: threading.Thread) -> None:
        self._made = APIFuture(made, worker)

    def result(self, timeout: float | None = None) -> Self:
        """Wait until the client is made, at most `timeout` seconds, and return it; see APIFuture.result."""
        self._made.result(timeout)
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        """Like `result`, without blocking the event loop."""
        await self._made.result_async(timeout)
        return self

    def future(self) -> Future[Self]:
        """A new future with the client for its result. Cancelling it does not stop the making."""
        answer: Future[Self] = Future()

        def hand_on(made: Future[None]) -> None:
            if made.cancelled():
                answer.cancel()
            if not answer.set_running_or_notify_cancel():
                return
            error = made.exception()
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(self)

        self._made.future().add_done_callback(hand_on)
        return answer

    async def coroutine(self) -> Self:
        """The same as a coroutine, for asyncio.create_task and others that take nothing else."""
        return await self

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.result_async().__await__()


def _checked_timeout(timeout: float | None) -> float | None:
    seconds: float | None = argument(float | None, timeout, "timeout")
    if seconds != seconds:
        raise BadRequestError("timeout is NaN; it must be a number of seconds, or None")
    return seconds


def _too_late(timeout: float | None) -> str:
    return f"no result after {timeout} s; the work goes on and may be asked for again"
