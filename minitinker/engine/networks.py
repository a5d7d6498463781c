"""The networks that a sampler's rows go through: one base model with any number of adapters."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.fitting import itemsize
from minitinker.engine.slots import Form, Slots
from minitinker.engine.trainer import Snapshot
from minitinker.model.adapter import views
from minitinker.model.fused import fuse
from minitinker.model.transformer import EMBEDDING, Network
from minitinker.model.weights import BaseModel

Array = Any
Index = NDArray[np.int64]

HEAD = "lm_head.weight"
# Of a base model that is small enough for a second copy, laid out for few rows, and a third with an adapter merged in.
COPY_BYTES = 256 << 20
ROUND = 16  # ranks come in such numbers, filled up with zeros: the reference's products keep their bits then


class Networks:
    """Puts networks together, and keeps what was put together last: steps that follow each other are alike."""

    def __init__(self, ops: ModuleType, base: BaseModel) -> None:
        self._ops, self._config = ops, base.config
        self._placed = base.placed(ops)
        self._copies = not ops.BATCH_INVARIANT and base.weights.numbers * itemsize(ops.DTYPE) <= COPY_BYTES
        self._merged: tuple[Snapshot | None, Network] | None = None
        self._shared: tuple[list[Snapshot], Network] | None = None
        self._slots: Slots | None = None

    def of(
        self, snapshots: list[Snapshot], owners: Index, exact: bool = True
    ) -> tuple[Network, Index | None]:
        """The base with the adapters of rows, but for which row has which; and that, as Network.adapter has it: None
        where one has all, or none.

        owners: (rows,) index into snapshots, -1 for the base. exact: as in Network. As long as nothing else is asked
        for, the network is the same object.
        """
        if self._ops.BATCH_INVARIANT:
            return self._in_slots(snapshots, owners)
        merged = None if exact else self._in_one(snapshots, owners)
        if merged:
            return merged, None
        if self._shared is None or self._shared[0] != snapshots:
            self._shared = None  # the old ones are gone before the new ones are there
            stacked = _stack(self._ops, snapshots) if snapshots else ({}, None)
            self._shared = snapshots, Network(self._ops, self._config, self._weights, *stacked)
        if self._shared[1].exact != exact:
            self._shared = snapshots, replace(self._shared[1], exact=exact)
        return self._shared[1], owners if snapshots else None

    @cached_property
    def _weights(self) -> dict[str, Array]:
        """The base's, as they lie best for sampling; formed at the first step, since a trainer needs none of it.

        A tied head is copied whatever its size: as the embedding lies, a row's bits would not be its own.
        """
        ops, linears = self._ops, {}
        if self._copies:
            for name, w in self._placed.items():
                if name.endswith("_proj.weight") or name == HEAD:
                    linears[name] = w
        if self._config.tie_word_embeddings:
            linears[HEAD] = self._placed[EMBEDDING]
        return self._placed | {name: ops.lora_panels(w) for name, w in linears.items()}

    def _in_one(self, snapshots: list[Snapshot], owners: Index) -> Network | None:
        """A network for `fused_states` with the one adapter of all rows, or none, merged into the weights once for many
        steps; None where there are more, or that has no use. It rounds otherwise, as training does, and takes half the
        time to decode."""
        if not self._copies or len(snapshots) > 1 or (snapshots and owners.any()):
            return None
        ops, snapshot = self._ops, snapshots[0] if snapshots else None
        if self._merged is None or self._merged[0] is not snapshot:
            self._merged = None  # the old one is gone before the new one is there
            weights = dict(self._placed)
            nothing = [None] * 5
            if self._config.tie_word_embeddings:
                weights[HEAD] = weights[EMBEDDING]
            if snapshot is not None:
                for name, (a, b) in views(snapshot.spec, snapshot.flat).items():  # W'^T = W^T + A^T (s B)^T
                    w, _ = ops.lora_linear_forward(a[0].T, b[0] * snapshot.spec.scale, *nothing)
                    w += weights[f"{name}.weight"].T
                    weights[f"{name}.weight"] = w.T
            weights = fuse(self._config, weights, ops)
            for name in [name for name in weights if name.endswith("_proj.weight") or name == HEAD]:
                weights[name] = ops.lora_panels(weights[name])
            self._merged = snapshot, Network(ops, self._config, weights, fused=True)
        return self._merged[1]

    def _in_slots(self, snapshots: list[Snapshot], owners: Index) -> tuple[Network, Index | None]:
        """As `of` gives it, where the launches of steps are recorded."""
        if not snapshots:
            return self._base, None
        if self._slots is None or not self._slots.form.takes(snapshots):
            form = (self._slots.form if self._slots else Form(0, 0, {})).for_these_too(snapshots)
            self._slots = None  # the old ones are gone before the new ones are there
            self._slots = Slots(self._base, form)
        slots = self._slots.of(snapshots)
        if len(snapshots) == 1 and not owners.any():
            return self._slots.alone[slots[0]], None
        return self._slots.all, np.array([*slots, -1])[owners]

    @cached_property
    def _base(self) -> Network:
        """Without adapters, where the launches of steps are recorded."""
        return Network(self._ops, self._config, self._placed, exact=True, fused=True)


def _stack(ops: ModuleType, snapshots: list[Snapshot]) -> tuple[dict[str, tuple[Array, Array]], Array]:
    """A: (adapters, rank, d_in) and B: (adapters, d_out, rank) of each module, and scale: (adapters,).

    Where ranks differ, or an adapter lacks a module, zeros fill up: they add nothing to the product.
    """
    scale = ops.array(np.array([snapshot.spec.scale for snapshot in snapshots], np.float32))
    single = [views(snapshot.spec, snapshot.flat) for snapshot in snapshots]
    rank = -(-max(snapshot.spec.rank for snapshot in snapshots) // ROUND) * ROUND
    stacked = {}
    for name, (d_out, d_in) in {k: v for s in snapshots for k, v in s.spec.shapes.items()}.items():
        # A^T and B^T lie row by row, as `lora_weight` lays W.
        a, b = (
            ops.zeros((len(single), *shape), ops.DTYPE).swapaxes(-1, -2)
            for shape in ((d_in, rank), (rank, d_out))
        )
        for i, (snapshot, adapters) in enumerate(zip(snapshots, single, strict=True)):
            if name in adapters:
                own = snapshot.spec.rank
                a[i, :own], b[i, :, :own] = adapters[name][0][0], adapters[name][1][0]
        stacked[name] = (a, b)
    return stacked, scale


def distinct(snapshots: Iterable[Snapshot | None]) -> list[Snapshot]:
    """Each adapter once."""
    return list({id(snapshot): snapshot for snapshot in snapshots if snapshot is not None}.values())
