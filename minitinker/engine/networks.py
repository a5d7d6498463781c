"""The networks that a sampler's rows go through: one base model with any number of adapters."""

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.fitting import itemsize
from minitinker.engine.trainer import Snapshot
from minitinker.model.adapter import views
from minitinker.model.transformer import Network
from minitinker.model.weights import BaseModel

Array = Any


class Networks:
    """Puts networks together, and keeps what was put together last: steps that follow each other are alike."""

    def __init__(self, ops: ModuleType, base: BaseModel) -> None:
        self._ops, self._config = ops, base.config
        self._weights = base.placed(ops)
        self._weight_bytes = base.weights.numbers * itemsize(ops.DTYPE)
        self._merged: tuple[Snapshot | None, dict[str, Array]] = (None, {})
        self._stacked: tuple[list[Snapshot], dict[str, tuple[Array, Array]], Array] = ([], {}, None)

    def of(self, snapshots: list[Snapshot], owners: NDArray[np.int64], decoding: bool = False) -> Network:
        """The base with the adapters of the rows; owners: (rows,) index into snapshots, -1 for the base.

        decoding: whether every row is a token that was drawn.
        """
        ops, config = self._ops, self._config
        if not snapshots:
            return Network(ops, config, self._weights)
        one_for_all = not owners.any()
        if decoding and one_for_all and self._weight_bytes <= ops.MERGED_BYTES:
            return self._with_merged(snapshots[0])
        if self._stacked[0] != snapshots:
            self._stacked = (snapshots, *_stack(ops, snapshots))
        _, lora, scale = self._stacked
        alone = len(snapshots) == 1 and one_for_all
        return Network(ops, config, self._weights, lora, scale, None if alone else ops.array(owners))

    def alone(self, snapshot: Snapshot | None) -> Network:
        """The base with one adapter for all rows, or with none."""
        adapter = () if snapshot is None else _stack(self._ops, [snapshot])
        return Network(self._ops, self._config, self._weights, *adapter)

    def _with_merged(self, snapshot: Snapshot) -> Network:
        """The base with one adapter for all rows, formed into the weights of the layers once for many steps.

        It serves steps that only decode, where it spares two of three products. Prompts go through as they do
        in `forward`. The head stays as it is, since it may share its weight with the embedding.
        """
        lora, scale = _stack(self._ops, [snapshot])
        if self._merged[0] is not snapshot:
            weights = dict(self._weights)
            for name, (a, b) in lora.items():
                if name != "lm_head":
                    weights[f"{name}.weight"] = self._ops.lora_merge(weights[f"{name}.weight"], a, b, scale)
            self._merged = (snapshot, weights)
        head = {name: ab for name, ab in lora.items() if name == "lm_head"}
        return Network(self._ops, self._config, self._merged[1], head, scale)


def _stack(ops: ModuleType, snapshots: list[Snapshot]) -> tuple[dict[str, tuple[Array, Array]], Array]:
    """A: (adapters, rank, d_in) and B: (adapters, d_out, rank) of each module, and scale: (adapters,).

    Where ranks differ, or an adapter lacks a module, zeros fill up: they add nothing to the product.
    """
    scale = ops.array(np.array([snapshot.spec.scale for snapshot in snapshots], np.float32))
    single = [views(snapshot.spec, snapshot.flat) for snapshot in snapshots]
    if len(single) == 1:
        return single[0], scale
    rank = max(snapshot.spec.rank for snapshot in snapshots)
    stacked = {}
    for name, (d_out, d_in) in {k: v for s in snapshots for k, v in s.spec.shapes.items()}.items():
        a = ops.zeros((len(single), rank, d_in), ops.DTYPE)
        b = ops.zeros((len(single), d_out, rank), ops.DTYPE)
        for i, (snapshot, adapters) in enumerate(zip(snapshots, single, strict=True)):
            if name in adapters:
                a[i, : snapshot.spec.rank], b[i, :, : snapshot.spec.rank] = (
                    adapters[name][0][0],
                    adapters[name][1][0],
                )
        stacked[name] = (a, b)
    return stacked, scale


def distinct(snapshots: Iterable[Snapshot | None]) -> list[Snapshot]:
    """Each adapter once."""
    return list({id(snapshot): snapshot for snapshot in snapshots if snapshot is not None}.values())


def place(snapshots: list[Snapshot], snapshot: Snapshot | None) -> int:
    """Where an adapter stands among `snapshots`; -1 for the base model itself."""
    return next((i for i, other in enumerate(snapshots) if other is snapshot), -1)
