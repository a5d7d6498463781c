"""The regions of an arena in which a sampler's sequences have their keys and values, and whose text is in which.

Regions of sequences that ended are kept as long as there is room, the one used last at the end, since a prompt that
extends their text need not be computed again.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.cache import Arena
from minitinker.engine.trainer import Snapshot
from minitinker.model.config import ModelConfig

Index = NDArray[np.int64]

KEPT = 256  # regions of sequences that ended, and
KEPT_BYTES = 256 << 20  # bytes of the arena, up to which these stay rather than make room
SHORTEST = 16  # tokens of a text that are worth being copied from another region


@dataclass(eq=False)
class Region:
    """Rows of the arena with the keys and values of a text's first `done` tokens. pure: whether all are of the
    weights `snapshot`, and not, as an inflight client's may be, of later ones. exact: whether they have the bits that
    a seed promises. A region that is kept does not keep the weights: without them nobody asks for it."""

    start: int
    rows: int
    text: Index
    snapshot: "ref[Snapshot] | None"
    done: int
    pure: bool = True
    exact: bool = True

    def is_of(self, snapshot: Snapshot | None) -> bool:
        """Whether its weights are these."""
        if snapshot is None or self.snapshot is None:
            return snapshot is None and self.snapshot is None
        return self.snapshot() is snapshot

    @cached_property
    def head(self) -> bytes:
        """What to compare first."""
        return self.text[:SHORTEST].tobytes()


class Regions:
    """Gives regions out and takes them back. changes: counts what may make room."""

    def __init__(self, ops: ModuleType, config: ModelConfig, cache_bytes: int | None) -> None:
        """cache_bytes: as in Arena."""
        self.arena = Arena(ops, config, cache_bytes)
        self.kept: list[Region] = []
        self.changes = 0
        self._used: list[Region] = []

    def take(
        self, text: Index, rows: int, snapshot: Snapshot | None, known: int, exact: bool
    ) -> Region | None:
        """A region of `rows` rows, or where there cannot be so many as the text needs, None where there is no room.

        It holds what another one has of the text's beginning under the same weights, at most `known` tokens; where
        `exact`, only from one that is.
        """
        rows = max(len(text), min(rows, self.arena.most_rows))
        size, source = self._find(text, snapshot, known, exact)
        start = self._allocate(rows, spared=source)
        if start is None and source in self.kept:  # where it stands in the way itself
            size, source = 0, None
            start = self._allocate(rows)
        if start is None:
            return None
        if source is not None:
            self.arena.copy(source.start, start, size)
        region = Region(start, rows, text, _weak(snapshot), size, exact=source is None or source.exact)
        self._used.append(region)
        return region

    def reserve(self, region: Region, rows: int) -> Region | None:
        """Another region for the same text, with nothing in it yet; None where there is no room."""
        start = self._allocate(rows)
        if start is None:
            return None
        self._used.append(replace(region, start=start, rows=rows, done=0))
        return self._used[-1]

    def copy(self, region: Region, others: list[Region], done: int) -> None:
        """Give regions that were reserved the first `done` keys and values of this one."""
        self.arena.copy_to_many(region.start, [other.start for other in others], done)
        for other in others:
            other.done = min(done, len(other.text))

    def extend(self, region: Region, done: int, rows: int) -> bool:
        """Give a region, of which `done` rows are in use, more rows, where it lies or elsewhere; whether there was
        room."""
        if not self.arena.extend(region.start, region.rows, rows):
            start = self._allocate(rows)
            if start is None:
                return False
            self.arena.copy(region.start, start, done)
            self.arena.free(region.start, region.rows)
            self.changes += 1  # the holes lie otherwise now
            region.start = start
        region.rows = rows
        return True

    def give_back(self, region: Region) -> None:
        """Free its rows."""
        self._used.remove(region)
        self.arena.free(region.start, region.rows)
        self.changes += 1

    def keep(self, region: Region, text: Index) -> None:
        """Take back a region that holds all of a text, which is known from now on, as long as there is room."""
        if not region.pure or len(text) < SHORTEST:
            self.give_back(region)
            return
        self._used.remove(region)
        self.kept.append(replace(region, text=text, done=len(text)))
        self.changes += 1
        if len(self.kept) > KEPT:
            oldest = self.kept.pop(0)
            self.arena.free(oldest.start, oldest.rows)

    def _find(
        self, text: Index, snapshot: Snapshot | None, most: int, exact: bool
    ) -> tuple[int, Region | None]:
        """How much of the text's beginning a region holds under the same weights, up to `most`, and that region."""
        best, source = SHORTEST - 1, None
        if most <= best:
            return 0, None
        head = text[:SHORTEST].tobytes()
        for region in [*self.kept, *self._used]:
            fits = region.pure and region.is_of(snapshot) and (region.exact or not exact)
            if fits and region.done > best and region.head == head:
                size = min(most, region.done)
                same = region.text[:size] == text[:size]
                length = size if same.all() else int(same.argmin())
                if length > best:
                    best, source = length, region
        if source is None:
            return 0, None
        if source in self.kept:  # the one used last stands at the end
            self.kept.remove(source)
            self.kept.append(source)
        return best, source

    def _allocate(self, rows: int, spared: Region | None = None) -> int | None:
        """The start of so many rows of the arena, for which kept regions give way, except `spared`."""
        modest = KEPT_BYTES // self.arena.row_bytes
        start = self.arena.allocate(rows, modest)
        for region in list(self.kept):
            if start is None and region is not spared:
                self.kept.remove(region)
                self.arena.free(region.start, region.rows)
                start = self.arena.allocate(rows, modest)
        return self.arena.allocate(rows) if start is None else start


def _weak(snapshot: Snapshot | None) -> "ref[Snapshot] | None":
    return None if snapshot is None else ref(snapshot)
