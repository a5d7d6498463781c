"""What fits into memory: how many tokens go through the layers at once, and what is kept of them.

The counts follow `transformer.py`: what a layer's ops save for their backward. They are estimates, with SLACK
for what the allocator loses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from minitinker.errors import APIError
from minitinker.model.adapter import AdapterSpec
from minitinker.model.config import ModelConfig
from minitinker.model.packing import filled, micro_batches

SLACK = 1.2
ADDRESSES = 1 << 47  # bytes that a process can have at most


@dataclass(frozen=True)
class Footprint:
    """Bytes that a forward and backward pass takes beyond weights and gradients.

    kept: per token, where every layer's activations wait for the backward. recomputed: per token, where only
    its input does. fixed: logits of a chunk of tokens, with their gradient.
    """

    kept: int
    recomputed: int
    fixed: int

    def tokens(self, free: int, recompute: bool) -> int:
        """How many fit into `free` bytes; at least one, to be tried."""
        return max(1, (free - self.fixed) // (self.recomputed if recompute else self.kept))


def itemsize(dtype: str) -> int:
    """Bytes of a number of a backend's DTYPE."""
    return 2 if dtype == "bfloat16" else 4


def footprint(config: ModelConfig, spec: AdapterSpec, dtype: str, head_bytes: int) -> Footprint:
    """Of a model with an adapter, in activations of `dtype`, with logits of `head_bytes` at once."""
    d, ffn = config.hidden_size, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = 2 * d + (q + 2 * kv) + q  # the layer's and the norm's output; q, k, v; o
    if config.qk_norm:
        attention += q + kv  # q and k before the norm
    mlp = 2 * d + 4 * ffn  # the residual's and the norm's output; gate, up, their sigmoid and product
    layers = config.num_hidden_layers
    adapters = spec.rank * len(spec.shapes) // layers  # x A^T of each adapted linear
    layer = attention + mlp + adapters
    ends = 3 * d  # final states, their norm, its gradient
    backward = layer  # gradients within the layer that is at work
    numbers = (layers * layer + backward + ends, layers * d + layer + backward + ends)
    kept, recomputed = (math.ceil(SLACK * itemsize(dtype) * n) for n in numbers)
    return Footprint(kept, recomputed, fixed=3 * head_bytes)


def plan_passes(
    lengths: Sequence[int],
    needs: Footprint,
    free: int | None,
    most_tokens: int,
    width: int,
    recompute: bool | None,
) -> tuple[list[range], bool]:
    """Consecutive sequences, as indices, in groups that go through the layers together; and whether the backward
    forms a layer's activations again.

    It does where `recompute` says so, and, where that is None, where what the largest `width` groups at once
    would keep does not fit into `free` bytes. A group has about `most_tokens`; where that does not fit either, as
    many sequences as do, and never less than one. free None: unknown, everything fits.
    """
    groups = micro_batches(lengths, width * math.ceil(sum(lengths) / (width * most_tokens)))
    if free is None:
        return groups, bool(recompute)
    largest = width * max(sum(lengths[i] for i in group) for group in groups)
    if recompute is None:
        recompute = largest > needs.tokens(free, recompute=False)
    fitting = needs.tokens(free, recompute)
    if largest > fitting:
        groups = filled(lengths, min(most_tokens, fitting // width))
    return groups, recompute


def check_room(spec: AdapterSpec, device: str, free: int | None) -> None:
    """Raise APIError where an adapter with its gradient and moments is larger than `free` bytes.

    free None: unknown; then only what no machine has is refused.
    """
    size = 4 * 4 * spec.size  # weights, gradient, m and v, in float32
    if size > (ADDRESSES if free is None else free):
        raise out_of_memory(
            f"an adapter of rank {spec.rank}, {size / 1e9:.1f} GB,", device, "a smaller rank may", free
        )


def explained(ops: ModuleType, error: BaseException) -> BaseException:
    """The error, or, where memory ran out in a place that says nothing better, one that tells how much is free."""
    if not isinstance(error, ops.OutOfMemory):
        return error
    return out_of_memory("this call", ops.DEVICE, "a smaller one may", ops.free_memory())


def out_of_memory(work: str, device: str, fitting: str, free: int | None) -> APIError:
    """What to raise where an array found no room: what was tried, and what would have fitted."""
    room = "" if free is None else f", where {free / 1e9:.1f} GB are free"
    return APIError(
        f"out of memory on {device}: {work} did not fit{room}; {fitting}. Nothing was changed by this call."
    )
