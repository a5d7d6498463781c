import asyncio
import concurrent.futures
import os
import signal
import threading
import time
from concurrent.futures import Future

import pytest

from minitinker import futures
from minitinker.futures import APIFuture


@pytest.fixture
def pending():
    """A future that the test completes, and the APIFuture around it."""
    future = Future()
    return future, APIFuture(future)


def later(seconds, do, *args):
    timer = threading.Timer(seconds, do, args)
    timer.start()
    return timer


def test_every_way_of_asking_gives_the_result(pending):
    future, api_future = pending
    later(0.02, future.set_result, 7)

    async def awaited():
        return await api_future

    assert api_future.result() == 7
    assert api_future.result(timeout=0) == 7
    assert api_future.future() is future
    assert asyncio.run(awaited()) == 7
    assert asyncio.run(api_future.result_async(timeout=0)) == 7
    assert asyncio.run(api_future.coroutine()) == 7


def test_every_way_of_asking_raises_what_the_work_raised(pending):
    future, api_future = pending
    later(0.02, future.set_exception, LookupError("lost"))
    with pytest.raises(LookupError, match="lost"):
        api_future.result()
    with pytest.raises(LookupError, match="lost"):
        asyncio.run(api_future.result_async())


def test_many_awaiters_in_one_loop_all_get_the_result(pending):
    future, api_future = pending

    async def main():
        tasks = [asyncio.create_task(api_future.coroutine()) for _ in range(5)]
        later(0.02, future.set_result, "x")
        return await asyncio.gather(*tasks, api_future)

    assert asyncio.run(main()) == ["x"] * 6


def test_threads_and_event_loops_may_all_wait_at_once(pending):
    future, api_future = pending
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(api_future.result) for _ in range(3)]
        waiting += [pool.submit(lambda: asyncio.run(api_future.result_async())) for _ in range(3)]
        time.sleep(0.05)
        future.set_result("x")
        assert [one.result() for one in waiting] == ["x"] * 6


def test_waiting_does_not_block_the_event_loop(pending):
    future, api_future = pending

    async def main():
        task = asyncio.create_task(api_future.coroutine())
        await asyncio.sleep(0)
        future.set_result(1)  # could not run if the task held the loop
        return await task

    assert asyncio.run(main()) == 1


@pytest.mark.parametrize("timeout", [0, 0.02, -1])
def test_a_timeout_leaves_the_work_alone(pending, timeout):
    future, api_future = pending
    with pytest.raises(TimeoutError, match="the work goes on"):
        api_future.result(timeout)
    with pytest.raises(TimeoutError, match="the work goes on"):
        asyncio.run(api_future.result_async(timeout))
    assert future.set_running_or_notify_cancel()  # False if it had been cancelled
    future.set_result(3)
    assert api_future.result() == 3


def test_a_timeout_of_the_work_itself_is_not_taken_for_one_of_the_waiting(pending):
    future, api_future = pending
    future.set_exception(TimeoutError("the disk is slow"))
    with pytest.raises(TimeoutError, match="the disk is slow"):
        api_future.result(timeout=5)
    with pytest.raises(TimeoutError, match="the disk is slow"):
        asyncio.run(api_future.result_async(timeout=5))


def test_cancelling_one_awaiting_task_disturbs_neither_the_work_nor_the_others(pending):
    future, api_future = pending

    complaints = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        quitter = asyncio.create_task(api_future.coroutine())
        stayer = asyncio.create_task(api_future.coroutine())
        await asyncio.sleep(0)
        quitter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await quitter
        assert future.set_running_or_notify_cancel()
        future.set_result(4)
        return await stayer

    assert asyncio.run(main()) == 4
    assert not complaints


def test_work_taken_back_tells_whoever_waits(pending):
    future, api_future = pending
    later(0.02, future.cancel)
    with pytest.raises(concurrent.futures.CancelledError):
        api_future.result(timeout=5)
    with pytest.raises(concurrent.futures.CancelledError):
        asyncio.run(api_future.result_async())


def test_work_may_outlive_the_event_loop_that_waited_for_it(pending, caplog):
    future, api_future = pending
    with pytest.raises(TimeoutError):
        asyncio.run(api_future.result_async(timeout=0.01))
    future.set_result(5)  # calls back into the closed loop
    assert not caplog.records
    assert api_future.result() == 5


def test_a_result_ends_the_waiting_at_once(pending, monkeypatch):
    future, api_future = pending
    monkeypatch.setattr(futures, "_LOOK_UP", 60)
    later(0.05, future.set_result, None)
    started = time.monotonic()
    api_future.result()
    assert time.monotonic() - started < 10


def test_ctrl_c_ends_the_waiting_at_once(pending):
    future, api_future = pending
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        later(0.05, os.kill, os.getpid(), signal.SIGINT)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            api_future.result(timeout=30)
        assert time.monotonic() - started < 5
    finally:
        signal.signal(signal.SIGINT, before)
    assert not future.done()


def test_the_worker_does_not_wait_for_its_own_work():
    answers = []

    def work():
        waiting_for_itself = APIFuture(Future(), threading.current_thread())
        for ask in (waiting_for_itself.result, lambda: asyncio.run(waiting_for_itself.result_async())):
            with pytest.raises(RuntimeError, match="thread that has to do the work"):
                ask()
        done = Future()
        done.set_result(1)
        answers.append(APIFuture(done, threading.current_thread()).result())
        of_another = Future()
        later(0.02, of_another.set_result, 2)
        answers.append(APIFuture(of_another, threading.main_thread()).result())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert answers == [1, 2]
