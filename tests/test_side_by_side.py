import os
import subprocess
import sys
import threading
import time

import pytest
from op_checks import every_backend
from threadpoolctl import threadpool_info

from minitinker import reference

pytestmark = every_backend


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 30])
def test_results_stand_in_the_order_of_the_items(ops, count):
    def later_is_faster(i):
        time.sleep((count - i) * 1e-4)
        return i * i

    assert ops.side_by_side(later_is_faster, range(count)) == [i * i for i in range(count)]


def test_as_many_pieces_as_the_width_run_at_the_same_time(ops):
    width = ops.width()
    assert width >= 1
    meeting = threading.Barrier(width)
    ops.side_by_side(lambda _: meeting.wait(timeout=30), range(width))  # alone, a piece would wait in vain


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_error_of_one_piece_is_raised_and_does_not_stop_the_next_call(ops, count):
    def work(i):
        if i == count - 1:
            raise LookupError(f"item {i}")

    with pytest.raises(LookupError, match=f"item {count - 1}"):
        ops.side_by_side(work, range(count))
    assert ops.side_by_side(str, [1, 2]) == ["1", "2"]


def test_nothing_runs_any_more_once_an_error_is_raised(ops):
    ended = []

    def work(i):
        if i == 0:
            raise LookupError("item 0")
        time.sleep(0.05)
        ended.append(i)

    with pytest.raises(LookupError, match="item 0"):
        ops.side_by_side(work, range(2 * ops.width()))
    so_far = len(ended)
    time.sleep(0.2)
    assert len(ended) == so_far


def test_one_item_runs_in_the_thread_that_asked(ops):
    assert ops.side_by_side(lambda _: threading.current_thread(), ["item"]) == [threading.current_thread()]


def test_on_one_core_products_use_one_core_and_afterwards_all_as_before(ops):
    before = blas_threads()
    with ops.on_one_core():
        within = blas_threads()
    assert ops.width() == 1 or within == [1] * len(before)
    assert blas_threads() == before


def test_each_piece_multiplies_with_one_core_and_afterwards_all_is_as_before(ops):
    if ops.width() == 1:
        pytest.skip("one core, or a backend whose pieces do not share the processor's cores")
    before = blas_threads()
    within = ops.side_by_side(lambda _: blas_threads(), range(4))
    assert within == [[1] * len(before)] * 4
    assert blas_threads() == before
    with pytest.raises(LookupError):
        ops.side_by_side({}.__getitem__, range(2))
    assert blas_threads() == before


def test_the_setting_for_one_core_ends_with_the_last_thread_inside(ops):
    inside, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def stay(until):
        with ops.on_one_core():
            inside.wait()
            until.wait()

    before = blas_threads()
    threads = [threading.Thread(target=stay, args=(event,), daemon=True) for event in leave]
    for thread in threads:
        thread.start()
    inside.wait()
    for event, thread in zip(leave, threads, strict=True):
        assert set(blas_threads()) == ({1} if ops is reference else set(before))  # the kernels need no core
        event.set()
        thread.join()
    assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system lets no thread choose its cores")
def test_pieces_have_cores_of_their_own_and_the_caller_afterwards_all_as_before(ops):
    before = os.sched_getaffinity(0)
    meeting = threading.Barrier(ops.width())

    def cores(_):
        meeting.wait(timeout=30)  # so that no thread does two
        return threading.current_thread(), os.sched_getaffinity(0)

    within = dict(ops.side_by_side(cores, range(ops.width())))
    own = within.pop(threading.current_thread())
    assert os.sched_getaffinity(0) == before
    if ops.width() > 1:
        assert len(own) == 1
        assert own < before
        assert list(within.values()) == [before - own] * (ops.width() - 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system lets no thread choose its cores")
def test_where_no_thread_may_choose_its_cores_pieces_run_all_the_same(ops, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert ops.side_by_side(abs, [-1, -2, -3]) == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where there is fork")
def test_a_forked_process_makes_threads_of_its_own(ops):
    script = """if True:
        import os, warnings
        import {name} as ops
        warnings.simplefilter("ignore")  # forking with threads around is what this is about
        assert ops.side_by_side(abs, [-1, -2, -3]) == [1, 2, 3]
        if os.fork() == 0:
            os._exit(0 if ops.side_by_side(abs, [-1, -2, -3]) == [1, 2, 3] else 1)
        print(os.wait()[1])
    """
    script = script.format(name=ops.__name__)
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout == "0\n"
