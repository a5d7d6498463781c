import threading
import time

import pytest
from op_checks import every_backend
from threadpoolctl import threadpool_info

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
