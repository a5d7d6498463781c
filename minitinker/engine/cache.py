"""The arena of keys and values that a sampler decodes from: a contiguous region of rows for each sequence."""

from types import ModuleType
from typing import Any

import numpy as np

from minitinker.engine.fitting import itemsize
from minitinker.model.config import ModelConfig
from minitinker.model.transformer import KVCache

FIRST_ROWS = 1024
WHERE_UNKNOWN = 1 << 30  # bytes at most, where neither the user nor the system says how many there may be


class Arena:
    """Rows of a KVCache, handed out in regions; the arrays double when no hole is large enough, up to a limit."""

    def __init__(self, ops: ModuleType, config: ModelConfig, most_bytes: int | None = None) -> None:
        """most_bytes: of all keys and values; None: half of what is free now."""
        self._ops, self._config = ops, config
        self.row_bytes = (
            2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize(ops.DTYPE)
        )
        if most_bytes is None:
            free = ops.free_memory()
            most_bytes = WHERE_UNKNOWN if free is None else free // 2
        self.most_rows = max(1, most_bytes // self.row_bytes)
        self.rows = 0
        self._holes: list[tuple[int, int]] = []  # (start, end), in order, never touching
        self.cache = KVCache([], [])

    def allocate(self, rows: int, most_rows: int | None = None) -> int | None:
        """The start of a free region of `rows` rows, now taken; None if there is none and the arena may not grow.

        most_rows: up to how many it may grow for this region, where that is fewer than its limit.
        """
        for i, (start, end) in enumerate(self._holes):
            if end - start >= rows:
                self._holes[i : i + 1] = [(start + rows, end)] if end - start > rows else []
                return start
        most = self.most_rows if most_rows is None else min(most_rows, self.most_rows)
        at_end = self.rows - self._holes[-1][0] if self._holes and self._holes[-1][1] == self.rows else 0
        if self.rows + rows - at_end > most or not self._grow(
            min(max(self.rows, rows, FIRST_ROWS), most - self.rows), rows - at_end
        ):
            return None
        return self.allocate(rows, most_rows)

    def extend(self, start: int, rows: int, more_rows: int) -> bool:
        """Make a region of `rows` rows one of `more_rows`, where it lies; whether that much is free behind it."""
        for i, (hole, end) in enumerate(self._holes):
            if hole == start + rows and end >= start + more_rows:
                self._holes[i : i + 1] = [(start + more_rows, end)] if end > start + more_rows else []
                return True
        return False

    def free(self, start: int, rows: int) -> None:
        """Give a region back."""
        holes = sorted([*self._holes, (start, start + rows)])
        self._holes = holes[:1]
        for hole in holes[1:]:
            if self._holes[-1][1] == hole[0]:
                self._holes[-1] = (self._holes[-1][0], hole[1])
            else:
                self._holes.append(hole)

    def copy(self, source: int, target: int, rows: int) -> None:
        """Copy the keys and values of `rows` rows from one region into another."""
        for array in (*self.cache.keys, *self.cache.values):
            array[target : target + rows] = array[source : source + rows]

    def copy_to_many(self, source: int, targets: list[int], rows: int) -> None:
        """The same into several regions, which takes no more launches than into one."""
        rows_from = self._ops.array(source + np.arange(rows))
        rows_to = self._ops.array(np.add.outer(targets, np.arange(rows)))
        for array in (*self.cache.keys, *self.cache.values):
            array[rows_to] = array[rows_from]

    def _grow(self, wished: int, needed: int) -> bool:
        """Add `wished` rows behind the others, or, where memory does not suffice, `needed`; whether that was done."""
        for more in (wished, needed):
            rows = self.rows + more
            try:
                # One array after the other, so that no more than one is there twice; after a failure some are longer.
                for arrays in (self.cache.keys, self.cache.values):
                    for layer in range(self._config.num_hidden_layers):
                        self._lengthen(arrays, layer, rows)
            except self._ops.OutOfMemory:
                continue
            self.free(self.rows, more)
            self.rows = rows
            return True
        return False

    def _lengthen(self, arrays: list[Any], layer: int, rows: int) -> None:
        if layer < len(arrays) and len(arrays[layer]) >= rows:
            return
        shape = (rows, self._config.num_key_value_heads, self._config.head_dim)
        longer = self._ops.zeros(shape, self._ops.DTYPE)
        if layer < len(arrays):
            longer[: len(arrays[layer])] = arrays[layer]
            arrays[layer] = longer
        else:
            arrays.append(longer)
