"""Regions with numbers for keys and values, each of which tells of what it was computed."""

from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minitinker import reference
from minitinker.engine import regions as regions_file
from minitinker.engine.regions import SHORTEST, Regions
from minitinker.engine.trainer import Snapshot

CONFIG = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=1, head_dim=2)
WEIGHTS = [None, Snapshot(None, None), Snapshot(None, None)]
TEXT = np.arange(60)


def small(rows):
    return Regions(reference, CONFIG, cache_bytes=rows * Regions(reference, CONFIG, None).arena.row_bytes)


def numbers(text, weights, exact):
    """One for each token, after those before it, under these weights."""
    return [float(hash((*text[: i + 1], weights, exact)) % 2**20) for i in range(len(text))]


class RegionsAgainstWhatWasWritten(RuleBasedStateMachine):
    """The plain model: for each region that is used its text, of which weights, and what was written into it."""

    @initialize(rows=st.sampled_from([90, 200, 1000]), kept=st.sampled_from([2, 100]))
    def begin(self, rows, kept):
        self.regions, self.used, self.refused = small(rows), [], None
        self.most_kept, regions_file.KEPT = regions_file.KEPT, kept

    def row_numbers(self, region, rows):
        arrays = (*self.regions.arena.cache.keys, *self.regions.arena.cache.values)
        found = np.stack([x[region.start : region.start + rows].reshape(rows, 2) for x in arrays])
        assert (found == found[:1, :, :1]).all()
        return found[0, :, 0].tolist()

    @rule(
        same=st.integers(0, 45) | st.just(20),
        other=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        weights=st.integers(0, 2),
        known=st.integers(0, 50) | st.just(50),
        more=st.integers(0, 10),
        exact=st.booleans(),
    )
    def take(self, same, other, weights, known, more, exact):
        text = np.concatenate([TEXT[:same], other]).astype(np.int64)
        known = min(known, len(text) - 1)
        region = self.regions.take(text, len(text) + more, WEIGHTS[weights], known, exact)
        if region is None:
            self.refused = self.regions.changes, len(text), len(text) + more
            return
        assert len(text) <= region.rows <= len(text) + more
        assert region.done == 0 or SHORTEST <= region.done <= known
        assert region.exact or not exact
        written = self.row_numbers(region, region.done)
        allowed = [numbers(text, weights, True)]
        if not region.exact:
            allowed.append(numbers(text, weights, False))
        assert all(number in of_place for number, *of_place in zip(written, *allowed, strict=False))
        self.used.append(SimpleNamespace(region=region, text=text.tolist(), weights=weights, written=written))

    @precondition(lambda self: self.refused)
    @rule()
    def who_found_no_room_finds_none_as_long_as_nothing_changed(self):
        changes, size, rows = self.refused
        if changes == self.regions.changes:
            assert self.regions.take(100 + np.arange(size), rows, None, 0, True) is None

    @precondition(lambda self: self.used)
    @rule(
        which=st.integers(0, 100),
        share=st.integers(1, 10) | st.just(60),
        later=st.integers(0, 5),
        exact=st.booleans(),
    )
    def feed(self, which, share, later, exact):
        one = self.used[which % len(self.used)]
        region, done = one.region, len(one.written)
        one.text += [7] * (done + share - len(one.text))  # drawn tokens
        end = min(done + share, region.rows)
        weights = 1 + one.weights % 2 if later == 0 else one.weights
        one.written += numbers(one.text[:end], weights, exact)[done:]
        region.exact = region.exact and exact
        region.pure = region.pure and region.is_of(WEIGHTS[weights])
        region.done = min(end, len(region.text))
        for array in (*self.regions.arena.cache.keys, *self.regions.arena.cache.values):
            array[region.start : region.start + end] = np.reshape(one.written, (-1, 1, 1))

    @precondition(lambda self: self.used)
    @rule(which=st.integers(0, 100), more=st.integers(0, 20))
    def copy(self, which, more):
        one = self.used[which % len(self.used)]
        done = min(len(one.written), len(one.region.text))
        region = self.regions.reserve(one.region, len(one.region.text) + more)
        if region is not None:
            assert region.done == 0
            self.regions.copy(one.region, [region], done)
            assert region.done == done
            copied = vars(one) | {"region": region, "text": one.text[: len(region.text)]}
            self.used.append(SimpleNamespace(**copied | {"written": one.written[:done]}))

    @precondition(lambda self: self.used)
    @rule(which=st.integers(0, 100), more=st.integers(1, 30))
    def extend(self, which, more):
        one = self.used[which % len(self.used)]
        before = one.region.rows
        grown = self.regions.extend(one.region, len(one.written), before + more)
        assert one.region.rows == before + more * grown

    @precondition(lambda self: self.used)
    @rule(which=st.integers(0, 100), keep=st.booleans())
    def end(self, which, keep):
        one = self.used.pop(which % len(self.used))
        if keep:
            self.regions.keep(one.region, np.array(one.text[: len(one.written)], np.int64))
        else:
            self.regions.give_back(one.region)

    @invariant()
    def each_has_what_was_written_and_rows_of_its_own(self):
        if not hasattr(self, "used"):
            return
        arena = self.regions.arena
        for one in self.used:
            assert self.row_numbers(one.region, len(one.written)) == one.written
        taken = [(r.start, r.start + r.rows) for r in [*(x.region for x in self.used), *self.regions.kept]]
        places = sorted([*taken, *arena._holes])
        assert [start for start, _ in places] == [0, *(end for _, end in places)][: len(places)]
        assert arena.rows == max([0, *(end for _, end in places)]) <= arena.most_rows
        assert len(self.regions.kept) <= regions_file.KEPT

    def teardown(self):
        if hasattr(self, "used"):
            regions_file.KEPT = self.most_kept


TestRegions = RegionsAgainstWhatWasWritten.TestCase
TestRegions.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def keep(regions, text, rows=0):
    """Take a region for a text, fill it, and give it back with what it holds."""
    region = regions.take(np.array(text), max(rows, len(text)), None, 0, True)
    regions.keep(region, np.array(text))


@pytest.mark.parametrize("shared", [SHORTEST - 1, SHORTEST])
def test_the_beginning_that_two_texts_share_is_copied_where_it_is_long_enough(shared):
    regions = small(200)
    keep(regions, range(shared))
    region = regions.take(TEXT[: shared + 1], shared + 1, None, shared, True)
    assert region.done == (shared if shared >= SHORTEST else 0)


def test_a_copy_is_copied_from_like_its_original():
    regions = small(200)
    original = regions.take(TEXT[:30], 30, None, 0, True)
    original.done = 20
    regions.copy(original, [regions.reserve(original, 30)], 20)
    regions.give_back(original)
    assert regions.take(TEXT, 60, None, 59, True).done == 20


def test_what_is_reserved_is_no_source_before_it_has_its_copy():
    regions = small(300)
    original = regions.take(TEXT[:30], 30, None, 0, True)
    original.done = 30
    copies = [regions.reserve(original, 30) for _ in range(2)]
    for array in (*regions.arena.cache.keys, *regions.arena.cache.values):
        array[:30], array[30:] = 1, 2
    regions.give_back(original)
    assert regions.take(TEXT, 60, None, 59, True).done == 0
    regions.copy(original, copies, 30)  # nothing has been written in its place
    for region in copies:
        assert (regions.arena.cache.keys[1][region.start : region.start + 30] == 1).all()
    assert regions.take(TEXT, 60, None, 59, True).done == 30


def test_what_is_not_exact_is_copied_only_where_that_is_not_asked_for():
    regions = small(200)
    original = regions.take(TEXT[:30], 30, None, 0, True)
    original.done, original.exact = 30, False
    regions.copy(original, [regions.reserve(original, 30)], 30)
    for _ in range(2):
        assert regions.take(TEXT[:31], 31, None, 30, True).done == 0
        other = regions.take(TEXT[:31], 31, None, 30, False)
        assert (other.done, other.exact) == (30, False)
        regions.give_back(other)
        if original in regions._used:  # what is copied or kept stays what it was
            regions.keep(original, TEXT[:30])


def test_what_is_of_two_weights_is_neither_copied_nor_kept():
    regions = small(200)
    original = regions.take(TEXT[:30], 30, None, 0, True)
    original.done, original.pure = 30, False
    copy = regions.reserve(original, 30)
    regions.copy(original, [copy], 30)
    assert regions.take(TEXT[:31], 31, None, 30, True).done == 0
    for region in (original, copy):
        regions.keep(region, TEXT[:30])
    assert regions.kept == []


def test_all_that_may_make_room_counts_as_a_change():
    regions = small(100)
    one, two, *others = (regions.take(TEXT[:20], 20, None, 0, True) for _ in range(5))
    counts = [regions.changes]
    for region in others:
        regions.give_back(region)
        counts.append(regions.changes)
    assert regions.extend(one, 20, 30)  # elsewhere, so that its old place is free
    counts.append(regions.changes)
    regions.keep(two, TEXT[:20])
    counts.append(regions.changes)
    assert sorted(set(counts)) == counts


def test_of_too_many_kept_regions_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(regions_file, "KEPT", 2)
    regions = small(200)
    for first in (0, 100, 200):
        keep(regions, range(first, first + 20))
    assert [r.text[0] for r in regions.kept] == [100, 200]


def test_others_give_way_before_the_region_that_is_copied_from():
    regions = small(100)
    keep(regions, range(20), rows=40)
    keep(regions, range(100, 120), rows=40)
    region = regions.take(TEXT[:50], 50, None, 49, True)
    assert region.done == 20
    assert [r.text[0] for r in regions.kept] == [0]


def test_the_region_that_is_copied_from_gives_way_too_where_it_is_in_the_way():
    regions = small(60)
    keep(regions, range(20))
    region = regions.take(TEXT[:50], 50, None, 49, True)
    assert region.done == 0
    assert regions.kept == []


def test_the_region_that_was_used_last_gives_way_last():
    regions = small(110)
    for first in (0, 100, 200):
        keep(regions, range(first, first + 20), rows=30)
    regions.give_back(regions.take(TEXT[:20], 20, None, 19, True))
    for _ in range(2):
        regions.take(np.arange(300, 340), 40, None, 0, True)
    assert [r.text[0] for r in regions.kept] == [0]


def test_a_region_that_is_kept_does_not_keep_its_weights():
    regions, snapshot = small(100), Snapshot(None, None)
    region = regions.take(TEXT[:20], 20, snapshot, 0, True)
    regions.keep(region, TEXT[:20])
    assert regions.take(TEXT[:20], 20, snapshot, 19, True).done == 19
    gone = ref(snapshot)
    del snapshot
    assert gone() is None
    assert regions.take(TEXT[:20], 20, None, 19, True).done == 0  # and it is not taken for the base model's
