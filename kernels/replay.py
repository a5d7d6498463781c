"""CUDA graphs: the launches of a function, recorded once and from then on started together.

A step of decoding is hundreds of launches, each of which takes the CPU longer than the GPU. What a graph runs are the
same kernels with the same tiles, so it gives the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray

from .array import DEVICE, INTERPRETED, array, cdiv

SETS = 8  # of objects on which launches depend, with which these are kept
ALIGNMENT = 16  # bytes: where Triton knows a pointer to be a multiple of so many, it loads as many at once


class Replays:
    """Calls functions of rows that are asked for again and again, with other numbers of rows and other values."""

    def __init__(self, device: str | None = None) -> None:
        """device: as in `array`."""
        self._device = device or DEVICE
        # Of each set of objects what was recorded, by numbers of rows and of inputs.
        self._recorded: list[tuple[list[ref[Any]], dict[tuple[int, int], _Graph | None]]] = []
        self._pool: Any = None  # memory of all graphs: only one runs at a time

    def __call__(
        self, of: Sequence[Any], function: Callable[..., Sequence[torch.Tensor]], *inputs: NDArray[Any]
    ) -> Sequence[torch.Tensor]:
        """function(*inputs), each now an array of the backend, (rows, ...); it returns arrays of as many rows, whose
        values hold until the next call.

        of: what else its launches depend on, all told, weights say; what was recorded is used again with the same
        objects alone, for the last SETS of them, of which none is kept alive. The first call with a number of rows runs
        as it is, the second one is recorded. Numbers of rows are rounded up by repeating the last row; so what the
        function does with a row must depend on that row alone, and be the same if it is done twice.
        """
        if INTERPRETED:
            return function(*(array(x, device=self._device) for x in inputs))
        graphs = self._graphs(of)
        count = len(inputs[0])
        rows = round_number(count)
        padded = [np.concatenate([x, x[-1:].repeat(rows - count, axis=0)]) for x in inputs]
        key = rows, len(inputs)
        graph = graphs.get(key)
        if graph is None:
            if key not in graphs:  # what is not compiled yet is now; and it may be the only time
                graphs[key] = None
                return [x[:count] for x in function(*(array(x, device=self._device) for x in padded))]
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = graphs[key] = _record(function, padded, self._device, self._pool)
        return [x[:count] for x in graph.replay(padded)]

    def _graphs(self, of: Sequence[Any]) -> dict[tuple[int, int], "_Graph | None"]:
        """What was recorded with these objects."""
        if self._recorded and _are(self._recorded[-1][0], of):
            return self._recorded[-1][1]
        found = next((one for one in self._recorded if _are(one[0], of)), ([ref(x) for x in of], {}))
        others = [one for one in self._recorded if one is not found and all(x() is not None for x in one[0])]
        self._recorded = [*others[1 - SETS :], found]  # the one used last at the end
        return found[1]


def round_number(rows: int) -> int:
    """The next number of rows for which there is a graph: at most a half more, and above 4 two in each doubling."""
    step = 1 << max(0, rows.bit_length() - 2)
    return cdiv(rows, step) * step


def _are(then: list[ref[Any]], now: Sequence[Any]) -> bool:
    return len(then) == len(now) and all(x() is y for x, y in zip(then, now, strict=True))


@dataclass(frozen=True)
class _Graph:
    """places: where each input begins among the bytes of `inputs`."""

    graph: Any
    inputs: torch.Tensor
    places: list[int]
    outputs: Sequence[torch.Tensor]

    def replay(self, inputs: Sequence[NDArray[Any]]) -> Sequence[torch.Tensor]:
        bytes_ = np.empty(len(self.inputs), np.uint8)
        for place, x in zip(self.places, inputs, strict=True):
            bytes_[place : place + x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        self.inputs.copy_(torch.from_numpy(bytes_))
        self.graph.replay()
        return self.outputs


def _record(
    function: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[NDArray[Any]], device: str, pool: Any
) -> _Graph:
    sizes = [cdiv(x.nbytes, ALIGNMENT) * ALIGNMENT for x in inputs]
    places = [sum(sizes[:i]) for i in range(len(sizes))]
    bytes_ = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    arrays = [
        bytes_[place : place + x.nbytes].view(torch.from_numpy(x).dtype).view(x.shape)
        for place, x in zip(places, inputs, strict=True)
    ]
    graph = torch.cuda.CUDAGraph()
    # What other threads do with the GPU meanwhile is their affair, and none of the graph's.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = function(*arrays)
    return _Graph(graph, bytes_, places, outputs)
