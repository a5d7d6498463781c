from types import SimpleNamespace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from minitinker import reference
from minitinker.engine.cache import FIRST_ROWS, Arena

CONFIG = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=1, head_dim=2)
ROWS = st.integers(1, FIRST_ROWS + 100)


class ArenaAgainstAList(RuleBasedStateMachine):
    """The plain model: a dict from the start of each region to its length and the number written in it."""

    regions = Bundle("regions")

    @initialize()
    def begin(self):
        self.arena = Arena(reference, CONFIG)
        self.taken = {}
        self.written = 0

    @rule(target=regions, rows=ROWS)
    def allocate(self, rows):
        start = self.arena.allocate(rows)
        self.written += 1
        self.taken[start] = (rows, self.written)
        for array in (*self.arena.cache.keys, *self.arena.cache.values):
            array[start : start + rows] = self.written
        return start

    @rule(start=consumes(regions))
    def free(self, start):
        rows, _ = self.taken.pop(start)
        self.arena.free(start, rows)

    @rule(source=regions, other=regions, share=st.floats(0, 1))
    def copy(self, source, other, share):
        """A part of one region into another, whose rest gets the same number, so that a region has but one."""
        (source_rows, number), (rows, _) = self.taken[source], self.taken[other]
        part = int(min(source_rows, rows) * share)
        self.arena.copy(source, other, part)
        for array in (*self.arena.cache.keys, *self.arena.cache.values):
            array[other + part : other + rows] = number
        self.taken[other] = (rows, number)

    @invariant()
    def regions_keep_what_was_written_and_never_overlap(self):
        rows = len(self.arena.cache.keys[0]) if self.arena.cache.keys else 0
        owner = np.zeros(rows, int)
        for start, (length, number) in self.taken.items():
            assert start >= 0
            assert start + length <= rows
            assert not owner[start : start + length].any()
            owner[start : start + length] = number
        for array in (*self.arena.cache.keys, *self.arena.cache.values):
            assert array.shape == (rows, 1, 2)
            assert (array[owner > 0] == owner[owner > 0, None, None]).all()

    def teardown(self):
        """What was freed is one hole again: as many rows as there are fit in without growing."""
        if self.arena.cache.keys:
            for start, (rows, _) in self.taken.items():
                self.arena.free(start, rows)
            before = self.arena.cache.keys[0]
            assert self.arena.allocate(len(before)) == 0
            assert self.arena.cache.keys[0] is before


ArenaAgainstAList.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestArena = ArenaAgainstAList.TestCase


def test_freed_rows_are_used_again_before_the_arena_grows():
    arena = Arena(reference, CONFIG)
    starts = [arena.allocate(FIRST_ROWS // 4) for _ in range(4)]
    arena.free(starts[1], FIRST_ROWS // 4)
    arena.free(starts[2], FIRST_ROWS // 4)
    assert arena.allocate(FIRST_ROWS // 2) == min(starts[1:3])
    assert len(arena.cache.keys[0]) == FIRST_ROWS


def test_an_arena_at_least_doubles_when_it_grows():
    arena = Arena(reference, CONFIG)
    sizes = set()
    for _ in range(4 * FIRST_ROWS):
        arena.allocate(1)
        sizes.add(len(arena.cache.keys[0]))
    assert sorted(sizes) == [FIRST_ROWS, 2 * FIRST_ROWS, 4 * FIRST_ROWS]


def test_an_unused_arena_takes_no_memory():
    assert Arena(reference, CONFIG).cache.keys == []
