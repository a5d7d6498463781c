"""The networks that a sampler's rows go through: one base model with any number of adapters."""

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.fitting import itemsize
from minitinker.engine.trainer import Snapshot
from minitinker.model.adapter import views
from minitinker.model.transformer import EMBEDDING, Network
from minitinker.model.weights import BaseModel

Array = Any

HEAD_BYTES = 64 << 20  # of a tied head up to which a sampler has a copy of it that lies as `lora_weight` does
MERGED_BYTES = 64 << 20  # of a base model that is small enough for a second copy, with an adapter merged in
ROUND = 16  # ranks come in such numbers, filled up with zeros: the reference's products keep their bits then


class Networks:
    """Puts networks together, and keeps what was put together last: steps that follow each other are alike."""

    def __init__(self, ops: ModuleType, base: BaseModel) -> None:
        self._ops, self._config = ops, base.config
        self._weights = base.placed(ops)
        table = self._weights[EMBEDDING]
        if self._config.tie_word_embeddings and not ops.BATCH_INVARIANT and table.nbytes <= HEAD_BYTES:
            self._weights = self._weights | {"lm_head.weight": ops.lora_weight(table, ops.DTYPE)}
        size = base.weights.numbers * itemsize(ops.DTYPE)
        self._mergeable = not ops.BATCH_INVARIANT and size <= MERGED_BYTES
        self._merged: tuple[Snapshot, Network] | None = None
        self._stacked: tuple[list[Snapshot], dict[str, tuple[Array, Array]], Array] = ([], {}, None)

    def of(self, snapshots: list[Snapshot], owners: NDArray[np.int64]) -> Network:
        """The base with the adapters of the rows; owners: (rows,) index into snapshots, -1 for the base."""
        ops, config = self._ops, self._config
        if not snapshots:
            return Network(ops, config, self._weights)
        if self._stacked[0] != snapshots:
            self._stacked = ([], {}, None)  # the old ones are gone before the new ones are there
            self._stacked = (snapshots, *_stack(ops, snapshots))
        _, lora, scale = self._stacked
        alone = ops.BATCH_INVARIANT and len(snapshots) == 1 and not owners.any()
        return Network(ops, config, self._weights, lora, scale, None if alone else ops.array(owners))

    def merged(self, snapshots: list[Snapshot | None]) -> Network | None:
        """The base with the one adapter of all rows, formed into the weights once for many steps; None where there are
        more, or that has no use. It rounds otherwise than `of`, as training does, and takes a third less time to
        decode. The head stays as it is, since it may share its weight with the embedding."""
        ops, snapshot = self._ops, snapshots[0]
        if not self._mergeable or snapshot is None or any(other is not snapshot for other in snapshots):
            return None
        if self._merged is None or self._merged[0] is not snapshot:
            lora, weights = views(snapshot.spec, snapshot.flat), dict(self._weights)
            scale = ops.array(np.array([snapshot.spec.scale], np.float32))
            for name, (a, b) in lora.items():
                if name != "lm_head":  # I W'^T is W' the other way round, as `lora_weight` lays it
                    identity = ops.array(np.eye(a.shape[2], dtype=np.float32))
                    w = weights[f"{name}.weight"]
                    wt, _ = ops.lora_linear_forward(identity, w, None, a, b, scale, None)
                    weights[f"{name}.weight"] = wt.T
            head = {name: ab for name, ab in lora.items() if name == "lm_head"}
            self._merged = snapshot, Network(ops, self._config, weights, head, scale)
        return self._merged[1]


def _stack(ops: ModuleType, snapshots: list[Snapshot]) -> tuple[dict[str, tuple[Array, Array]], Array]:
    """A: (adapters, rank, d_in) and B: (adapters, d_out, rank) of each module, and scale: (adapters,).

    Where ranks differ, or an adapter lacks a module, zeros fill up: they add nothing to the product.
    """
    scale = ops.array(np.array([snapshot.spec.scale for snapshot in snapshots], np.float32))
    single = [views(snapshot.spec, snapshot.flat) for snapshot in snapshots]
    if len(single) == 1 and ops.BATCH_INVARIANT:
        return single[0], scale
    rank = -(-max(snapshot.spec.rank for snapshot in snapshots) // ROUND) * ROUND
    stacked = {}
    for name, (d_out, d_in) in {k: v for s in snapshots for k, v in s.spec.shapes.items()}.items():
        # A^T and B^T lie row by row, as `lora_weight` lays W.
        a = ops.zeros((len(single), d_in, rank), ops.DTYPE).swapaxes(-1, -2)
        b = ops.zeros((len(single), rank, d_out), ops.DTYPE).swapaxes(-1, -2)
        for i, (snapshot, adapters) in enumerate(zip(snapshots, single, strict=True)):
            if name in adapters:
                own = snapshot.spec.rank
                a[i, :own], b[i, :, :own] = adapters[name][0][0], adapters[name][1][0]
        stacked[name] = (a, b)
    return stacked, scale


def distinct(snapshots: Iterable[Snapshot | None]) -> list[Snapshot]:
    """Each adapter once."""
    return list({id(snapshot): snapshot for snapshot in snapshots if snapshot is not None}.values())


def place(snapshots: list[Snapshot], snapshot: Snapshot | None) -> int:
    """Where an adapter stands among `snapshots`; -1 for the base model itself."""
    return next((i for i, other in enumerate(snapshots) if other is snapshot), -1)
