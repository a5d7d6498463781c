"""The networks that a sampler's rows go through: one base model with any number of adapters."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any
from weakref import ref

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
WASTE = 4  # times the numbers of the adapters at hand that slots may have for others


class Networks:
    """Puts networks together, and keeps what was put together last: steps that follow each other are alike."""

    def __init__(self, ops: ModuleType, base: BaseModel) -> None:
        self._ops, self._config = ops, base.config
        self._placed = base.placed(ops)
        self._copies = not ops.BATCH_INVARIANT and base.weights.numbers * itemsize(ops.DTYPE) <= COPY_BYTES
        self._merged: tuple[ref[Snapshot], Network] | None = None
        self._slots: Slots | None = None

    def of(
        self, snapshots: list[Snapshot], owners: Index, exact: bool = True
    ) -> tuple[Network, Index | None]:
        """The base with the adapters of rows, but for which row has which; and that, as Network.adapter has it: None
        where one has all, or none.

        owners: (rows,) index into snapshots, -1 for the base. exact: as in Network. Where launches are recorded, the
        network is the same object as long as nothing else is asked for.
        """
        alone = len(snapshots) == 1 and not owners.any()
        if not snapshots:
            return self._with(exact, self._base), None
        if alone and self._copies and not exact:
            return self._in_one(snapshots[0]), None
        kept = self._slots_for(snapshots)
        slots = kept.of(snapshots)
        if alone and self._ops.BATCH_INVARIANT:
            return kept.alone(slots[0]), None
        return self._with(exact, kept.all), np.array([*slots, -1])[owners]

    def forget(self) -> None:
        """Let go of the adapters that were put together."""
        self._slots = self._merged = None

    def _slots_for(self, snapshots: list[Snapshot]) -> Slots:
        """Those there are, or new ones, which take what the old ones took, too, unless that is far more than needed or
        finds no room."""
        if self._slots is None or not self._slots.form.takes(snapshots):
            needed = Form(0, 0, {}).with_these(snapshots)
            form = self._slots.form.with_these(snapshots) if self._slots else needed
            self._slots = None  # the old ones are gone before the new ones are there
            if needed.numbers < form.numbers <= WASTE * needed.numbers:
                with suppress(self._ops.OutOfMemory):
                    self._slots = Slots(self._base, form)
            self._slots = self._slots or Slots(self._base, needed)
        return self._slots

    @staticmethod
    def _with(exact: bool, network: Network) -> Network:
        return network if network.exact == exact else replace(network, exact=exact)

    @cached_property
    def _base(self) -> Network:
        """Without adapters, with weights as they lie best for sampling; formed at the first step, since a trainer needs
        none of it."""
        ops, weights = self._ops, self._placed
        if self._copies:
            return self._laid_out(weights)
        if self._config.tie_word_embeddings and not ops.BATCH_INVARIANT:
            # Copied whatever its size: as the embedding lies, a row's bits would not be its own.
            weights = weights | {HEAD: ops.lora_panels(weights[EMBEDDING])}
        return Network(ops, self._config, weights, exact=True, fused=ops.BATCH_INVARIANT)

    def _laid_out(self, weights: dict[str, Array]) -> Network:
        """A network of a copy of the weights."""
        tied = {} if HEAD in weights else {HEAD: weights[EMBEDDING]}
        fused = fuse(self._config, weights | tied, self._ops)
        for name in [name for name in fused if name.endswith("_proj.weight") or name == HEAD]:
            fused[name] = self._ops.lora_panels(fused[name])
        return Network(self._ops, self._config, fused, exact=True, fused=True)

    def _in_one(self, snapshot: Snapshot) -> Network:
        """The base with an adapter merged into the weights once for many steps. It rounds otherwise, as training does,
        and takes half the time to decode."""
        if self._merged is None or self._merged[0]() is not snapshot:
            self._merged = None  # the old one is gone before the new one is there
            weights, nothing = dict(self._placed), [None] * 5
            if self._config.tie_word_embeddings:
                weights[HEAD] = weights[EMBEDDING]
            for name, (a, b) in views(snapshot.spec, snapshot.flat).items():  # W'^T = W^T + A^T (s B)^T
                w, _ = self._ops.lora_linear_forward(a[0].T, b[0] * snapshot.spec.scale, *nothing)
                w += weights[f"{name}.weight"].T
                weights[f"{name}.weight"] = w.T
            self._merged = ref(snapshot), replace(self._laid_out(weights), exact=False)
        return self._merged[1]


def distinct(snapshots: Iterable[Snapshot | None]) -> list[Snapshot]:
    """Each adapter once."""
    return list({id(snapshot): snapshot for snapshot in snapshots if snapshot is not None}.values())
