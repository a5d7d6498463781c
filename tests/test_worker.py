import gc
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, wait

import pytest

from minitinker.engine import worker as worker_module
from minitinker.engine.worker import Worker
from minitinker.errors import TinkerError


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close(finish=False)


@pytest.fixture
def held(worker):
    """An event that the worker's thread waits for, so that what a test submits stays in the queue."""
    go_on = threading.Event()
    worker.submit(go_on.wait)
    yield go_on
    go_on.set()


class CountingSampler:
    """Is busy for so many steps, and writes them down."""

    def __init__(self, steps, log):
        self.left, self.log, self.cancelled = steps, log, False

    @property
    def busy(self):
        return self.left > 0

    def step(self):
        self.left -= 1
        self.log.append("step")

    def rest(self):
        pass

    def cancel_all(self):
        self.cancelled, self.left = True, 0


def test_jobs_run_in_the_order_they_were_asked_for(worker):
    log = []
    for i in range(100):
        last = worker.submit(lambda i=i: log.append(i))
    last.result(timeout=10)
    assert log == list(range(100))


def test_all_jobs_run_in_the_one_thread(worker):
    threads = {worker.submit(threading.current_thread).result(timeout=10) for _ in range(3)}
    assert threads == {worker.thread}


def test_submitting_does_not_wait(worker, held):
    future = worker.submit(lambda: 1)
    assert not future.done()
    held.set()
    assert future.result(timeout=10) == 1


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_a_job_raises_reaches_who_asked_and_the_next_job_runs(worker, error):
    def job():
        raise error

    failed, after = worker.submit(job), worker.submit(lambda: "ran")
    assert failed.exception(timeout=10) is error
    assert after.result(timeout=10) == "ran"


def test_a_cancelled_job_does_not_run(worker, held):
    log = []
    future = worker.submit(lambda: log.append(1))
    assert future.cancel()
    held.set()
    assert wait([future], timeout=10).done
    assert worker.submit(lambda: list(log)).result(timeout=10) == []


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (-1, ["step", "job", "step", "job", "step", "job", "job"]),  # each job takes longer than that
        (60, ["job", "job", "job", "job", "step", "step", "step"]),  # all jobs together take less
    ],
)
def test_jobs_and_samplers_take_turns(monkeypatch, turn, expected):
    monkeypatch.setattr(worker_module, "TURN", turn)
    worker, log, begin = Worker(), [], threading.Event()
    worker.submit(begin.wait)
    worker.add_sampler(CountingSampler(3, log))
    for _ in range(4):
        worker.submit(lambda: log.append("job"))
    begin.set()
    worker.close(finish=True)
    assert log == expected


def test_what_is_asked_together_after_a_pause_is_in_one_step(monkeypatch):
    clock, go_on, log = [0.0], threading.Event(), []
    monkeypatch.setattr(worker_module, "LOOK_UP", 30)
    monkeypatch.setattr(worker_module.time, "monotonic", lambda: clock[0])
    worker, sampler = Worker(), CountingSampler(0, log)
    worker.submit(lambda: worker.add_sampler(sampler)).result(timeout=10)
    time.sleep(0.1)  # now it waits for the next one, and looks at the clock no more
    clock[0] = 60.0

    def ask():
        go_on.wait()
        sampler.left = 2
        log.append("ask")

    asked = [worker.submit(ask), worker.submit(ask)]
    go_on.set()
    wait(asked)
    worker.close(finish=True)
    assert log == ["ask", "ask", "step", "step"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([3], ["rest", "job", "step", "step", "step"]),
        ([1, 3], ["rest", "rest", "job", "step", "rest", "step", "rest", "step", "step"]),
    ],
)
def test_a_sampler_rests_before_jobs_and_steps_of_others(monkeypatch, steps, expected):
    class Resting(CountingSampler):
        def rest(self):
            self.log.append("rest")

    monkeypatch.setattr(worker_module, "TURN", 60)
    worker, log, begin = Worker(), [], threading.Event()
    worker.submit(begin.wait)
    worker.submit(lambda: [worker.add_sampler(Resting(each, log)) for each in steps])
    worker.submit(lambda: log.append("job"))
    begin.set()
    worker.close(finish=True)
    assert log == expected


def test_closing_finishes_the_jobs_and_the_samples(worker, held):
    log = []
    sampler = CountingSampler(50, log)
    worker.submit(lambda: worker.add_sampler(sampler))
    future = worker.submit(lambda: 7)
    threading.Timer(0.05, held.set).start()
    worker.close(finish=True)
    assert future.result(timeout=0) == 7
    assert len(log) == 50
    assert not worker.thread.is_alive()


def test_dropping_cancels_what_has_not_begun_and_tells_those_who_wait(worker, held):
    sampler = CountingSampler(10**9, [])
    worker.add_sampler(sampler)
    futures = [worker.submit(lambda: 7) for _ in range(3)]
    futures[1].cancel()
    threading.Timer(0.05, held.set).start()
    worker.close(finish=False)
    assert not wait(futures, timeout=0).not_done
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    assert sampler.cancelled
    assert not worker.thread.is_alive()


def test_what_the_last_job_adds_to_a_sampler_is_dropped_too(worker, held):
    sampler = CountingSampler(0, [])
    worker.add_sampler(sampler)
    begun = threading.Event()

    def add():
        begun.set()
        while not worker._dropping:
            time.sleep(0.001)
        sampler.left = 10**9

    worker.submit(add)
    held.set()
    assert begun.wait(timeout=10)
    worker.close(finish=False)
    assert sampler.cancelled


def test_a_closing_that_finishes_may_still_be_cut_short(worker, held):
    sampler = CountingSampler(10**9, [])
    worker.add_sampler(sampler)
    held.set()
    finishing = threading.Thread(target=worker.close, kwargs={"finish": True})
    finishing.start()
    worker.close(finish=False)
    finishing.join(timeout=10)
    assert not finishing.is_alive()


def test_a_closed_worker_takes_no_jobs(worker):
    worker.close(finish=True)
    with pytest.raises(TinkerError, match="closed; make a new one"):
        worker.submit(lambda: None)


def test_closing_twice_changes_nothing(worker):
    worker.close(finish=True)
    worker.close(finish=True)
    worker.close(finish=False)


def test_a_job_may_close_its_own_worker(worker):
    def close():
        worker.close(finish=True)
        return "closed"

    first, second = worker.submit(close), worker.submit(lambda: "ran")
    assert first.result(timeout=10) == "closed"
    assert second.result(timeout=10) == "ran"
    worker.thread.join(timeout=10)
    assert not worker.thread.is_alive()


def test_a_job_and_its_result_are_let_go_when_it_is_done(worker):
    class Heavy:
        pass

    heavy = Heavy()
    gone = threading.Event()
    weakref.finalize(heavy, gone.set)
    worker.submit(lambda heavy=heavy: heavy).result(timeout=10)
    del heavy
    assert gone.wait(timeout=10)


def test_a_callback_that_exits_does_not_take_the_worker_along(worker):
    first = Future()
    submitted = worker.submit(first.result)
    submitted.add_done_callback(lambda _: sys.exit("out of a callback"))
    first.set_result(1)
    assert submitted.result(5) == 1
    assert worker.submit(lambda: 2).result(5) == 2


def test_the_error_of_a_job_does_not_keep_what_the_job_had_made():
    worker, made = Worker(), []

    class Large:
        pass

    def fail():
        large = Large()
        made.append(weakref.ref(large))
        raise ValueError("no")

    error = worker.submit(fail).exception(timeout=30)
    assert "no" in str(error)
    gc.collect()
    assert made[0]() is None
    worker.close(finish=True)


def test_what_a_job_raised_is_told_as_the_worker_explains_it():
    worker = Worker(lambda error: ValueError(f"explained: {error}"))
    with pytest.raises(ValueError, match="explained: division"):
        worker.submit(lambda: 1 / 0).result(timeout=30)
    worker.close(finish=True)
