"""Which cores the products of a step use, with a clock that the test sets."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from minitinker.engine import cores
from minitinker.engine.cores import MANY, SOME, Cores


class Machine:
    """Where a step takes so many seconds with one core, and with all. Notes which each step used."""

    def __init__(self, monkeypatch):
        self.now, self.on_one, self.used = 0.0, False, []
        monkeypatch.setattr(cores, "perf_counter", lambda: self.now)
        self.cores = Cores(SimpleNamespace(on_one_core=self.on_one_core))

    @contextmanager
    def on_one_core(self):
        assert not self.on_one
        self.on_one = True
        yield
        self.on_one = False

    def steps(self, count, one, all_, multiplications=SOME, alike="decoding"):
        """How many of them used one core."""
        before = len(self.used)
        for _ in range(count):
            with self.cores.step(multiplications, alike):
                self.used.append(self.on_one)
                self.now += one if self.on_one else all_
        return sum(self.used[before:])


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.mark.parametrize(("slower", "tries"), [(1.2, 25), (2, 7), (30, 2)])
def test_the_quicker_way_is_taken_and_the_other_one_tried_the_more_rarely_the_slower_it_is(
    machine, slower, tries
):
    assert 1 <= machine.steps(1000, one=slower, all_=1) <= tries
    machine.cores.rest()
    on_one = machine.steps(1000, one=1, all_=slower, multiplications=2 * SOME)
    assert 1 <= 1000 - on_one <= tries


def test_it_follows_what_becomes_of_the_machine(machine):
    machine.steps(100, one=1.2, all_=1)
    assert machine.steps(100, one=1.3, all_=20) >= 98  # at once
    assert machine.steps(2000, one=1.2, all_=1) < 1200  # after a while
    assert machine.steps(100, one=1.2, all_=1) < 10


def test_one_long_step_does_not_lead_away_from_the_quicker_way_for_long(machine):
    machine.steps(100, one=2, all_=1)
    machine.steps(1, one=1000, all_=1000)
    assert machine.steps(500, one=2, all_=1) < 20


@pytest.mark.parametrize("other", [{"multiplications": 2 * SOME}, {"alike": "decoding with seeds"}])
def test_other_steps_learn_for_themselves(machine, other):
    machine.steps(50, one=2, all_=1)
    assert machine.steps(50, one=1, all_=2, **other) >= 48
    assert machine.steps(50, one=2, all_=1) <= 2


def test_a_clock_that_stands_still_does_no_harm(machine):
    machine.steps(50, one=0, all_=0)
    assert machine.steps(100, one=2, all_=1) < 10


def test_where_the_setting_fails_it_is_made_at_the_next_step(machine):
    works = machine.cores._ops.on_one_core
    machine.cores._ops.on_one_core = None
    with pytest.raises(TypeError):
        machine.steps(1, one=1, all_=2)
    machine.cores._ops.on_one_core = works
    assert machine.steps(1, one=1, all_=2) == 1


@pytest.mark.parametrize(
    ("multiplications", "alike", "on_one"),
    [(SOME - 1, "decoding", 9), (0, None, 9), (MANY - 1, None, 9), (MANY, None, 0)],
)
def test_what_is_not_tried_out_goes_by_its_size(machine, multiplications, alike, on_one):
    assert machine.steps(9, 1, 1, multiplications, alike) == on_one


def test_a_step_that_fails_teaches_nothing_and_at_rest_all_cores_are_free(machine):
    def failing():
        machine.now += 1000
        raise RuntimeError("in vain")

    with pytest.raises(RuntimeError, match="in vain"), machine.cores.step(SOME, "decoding"):
        failing()
    assert machine.on_one
    machine.steps(1, one=1, all_=2)
    assert machine.steps(20, one=1, all_=2) == 19
    machine.cores.rest()
    assert not machine.on_one
