"""The arena of keys and values that a sampler decodes from: a contiguous region of rows for each sequence."""

from types import ModuleType
from typing import Any

from minitinker.model.config import ModelConfig
from minitinker.model.transformer import KVCache

FIRST_ROWS = 1024


class Arena:
    """Rows of a KVCache, handed out in regions; the arrays double when no hole is large enough."""

    def __init__(self, ops: ModuleType, config: ModelConfig) -> None:
        self._ops, self._config = ops, config
        self._rows = 0
        self._holes: list[tuple[int, int]] = []  # (start, end), in order, never touching
        self.cache = KVCache([], [])

    def allocate(self, rows: int) -> int:
        """The start of a free region of `rows` rows, now taken."""
        for i, (start, end) in enumerate(self._holes):
            if end - start >= rows:
                self._holes[i : i + 1] = [(start + rows, end)] if end - start > rows else []
                return start
        self._grow(max(self._rows, rows, FIRST_ROWS))
        return self.allocate(rows)

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

    def _grow(self, more: int) -> None:
        """Add at least `more` rows behind the others."""
        self.cache = KVCache(
            [self._grown(i, self.cache.keys, more) for i in range(self._config.num_hidden_layers)],
            [self._grown(i, self.cache.values, more) for i in range(self._config.num_hidden_layers)],
        )
        self.free(self._rows, more)
        self._rows += more

    def _grown(self, layer: int, arrays: list[Any], more: int) -> Any:
        shape = (self._rows + more, self._config.num_key_value_heads, self._config.head_dim)
        grown = self._ops.zeros(shape, self._ops.DTYPE)
        if arrays:
            grown[: self._rows] = arrays[layer]
        return grown
