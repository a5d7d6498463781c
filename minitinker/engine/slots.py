"""The adapters of a sampler's steps, put together where steps that were recorded find them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

from minitinker.engine.trainer import Snapshot
from minitinker.model.adapter import AdapterSpec, views
from minitinker.model.fused import joined, rows_of
from minitinker.model.transformer import Network

Array = Any

ROUND = 16  # ranks come in such numbers, filled up with zeros: products keep their bits then


@dataclass(frozen=True)
class Form:
    """How many adapters there is room for, up to which rank, and on which modules: name -> (d_out, d_in)."""

    count: int
    rank: int
    shapes: Mapping[str, tuple[int, int]]

    def takes(self, snapshots: list[Snapshot]) -> bool:
        return len(snapshots) <= self.count and all(
            snapshot.spec.rank <= self.rank and snapshot.spec.shapes.keys() <= self.shapes.keys()
            for snapshot in snapshots
        )

    @property
    def numbers(self) -> int:
        """In A and B of all of them, about."""
        return self.count * AdapterSpec(self.rank, dict(self.shapes)).size

    def with_these(self, snapshots: list[Snapshot]) -> "Form":
        """One that takes these adapters, too."""
        count, rank, shapes = self.count, self.rank, dict(self.shapes)
        while count < len(snapshots):
            count = max(1, 2 * count)
        for snapshot in snapshots:
            rank, shapes = max(rank, snapshot.spec.rank), shapes | snapshot.spec.shapes
        return Form(count, -(-rank // ROUND) * ROUND, shapes)


class Slots:
    """Networks of one base, whose adapters lie in arrays that stay the same: an adapter that is asked for takes the
    slot of the one that was not for the longest time. What a lower rank or fewer modules leave is zero, which adds
    nothing to the product.

    all: the network with the adapters of all slots.
    """

    def __init__(self, base: Network, form: Form) -> None:
        self.form = form
        ops, shapes, linears = base.ops, dict(form.shapes), dict.fromkeys(form.shapes, 1)
        # Of each module: in whose A and B it has its own, after how many others in A, and in which rows of B.
        self._places = {name: (name, 0, slice(None)) for name in shapes}
        for name, parts in (joined(base.config) if base.fused else {}).items():
            if parts.keys() & shapes.keys():
                d_in = next(shapes[part][1] for part in parts if part in shapes)
                shapes[name], linears[name] = (sum(parts.values()), d_in), len(parts)
                for i, (part, rows) in enumerate(rows_of(parts).items()):
                    self._places[part] = name, i, rows
                    shapes.pop(part, None)

        def zeros(rows: int, columns: int) -> Array:
            if ops.BATCH_INVARIANT:
                return ops.zeros((form.count, rows, columns), ops.DTYPE)
            # A^T and B^T lie row by row, as `lora_weight` lays W.
            return ops.zeros((form.count, columns, rows), ops.DTYPE).swapaxes(-1, -2)

        self._lora = {
            name: (zeros(linears[name] * form.rank, d_in), zeros(d_out, form.rank))
            for name, (d_out, d_in) in shapes.items()
        }
        self._scale = ops.zeros((form.count,))
        self.all = replace(base, lora=self._lora, scale=self._scale)
        self._alone: dict[int, Network] = {}
        # What is in which slot, the one asked for last at the end. An adapter is not kept alive.
        self._held: dict[int, ref[Snapshot] | None] = dict.fromkeys(range(form.count))
        self._slot_of: dict[int, int] = {}

    def of(self, snapshots: list[Snapshot]) -> list[int]:
        """The slots of these adapters, which are there from now on. The form must take them."""
        slots = [self._find(snapshot) for snapshot in snapshots]
        free: Iterator[int] = iter(())
        if None in slots:  # first those of adapters that are gone
            free = iter(sorted((i for i in self._held if i not in slots), key=self._is_held))
        found = [next(free) if slot is None else slot for slot in slots]
        for i, slot, snapshot in zip(found, slots, snapshots, strict=True):
            if slot is None:
                self._write(i, snapshot)
            del self._held[i]
            self._held[i] = ref(snapshot)
        return found

    def alone(self, slot: int) -> Network:
        """The network with the adapter of one slot: the same object each time."""
        if slot not in self._alone:
            i = slice(slot, slot + 1)
            lora = {name: (a[i], b[i]) for name, (a, b) in self._lora.items()}
            self._alone[slot] = replace(self.all, lora=lora, scale=self._scale[i])
        return self._alone[slot]

    def _is_held(self, slot: int) -> bool:
        held = self._held[slot]
        return held is not None and held() is not None

    def _find(self, snapshot: Snapshot) -> int | None:
        slot = self._slot_of.get(id(snapshot))
        held = None if slot is None else self._held[slot]
        return slot if held is not None and held() is snapshot else None

    def _write(self, slot: int, snapshot: Snapshot) -> None:
        self._held[slot] = None  # should this fail half way
        self._slot_of = {key: i for key, i in self._slot_of.items() if i != slot} | {id(snapshot): slot}
        spec = snapshot.spec
        if spec.rank < self.form.rank or len(spec.shapes) < len(self.form.shapes):
            for a, b in self._lora.values():
                a[slot], b[slot] = 0, 0
        for name, (a, b) in views(spec, snapshot.flat).items():
            whole, nth, rows = self._places[name]
            first = nth * self.form.rank
            into_a, into_b = self._lora[whole]
            into_a[slot, first : first + spec.rank] = a[0]
            into_b[slot, rows, : spec.rank] = b[0]
        self._scale[slot] = spec.scale
