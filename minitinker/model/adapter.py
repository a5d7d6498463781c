"""The LoRA adapter: which linears it stands on, its A and B, and how they begin.

All A and B are views into one flat float32 buffer, in the order of `linear_shapes`; gradients and Adam's
moments have the same layout, so that one call steps everything.
"""

from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as shortened

import numpy as np
from numpy.typing import NDArray

from minitinker.conform import is_whole
from minitinker.errors import BadRequestError
from minitinker.model.config import ModelConfig, linear_shapes

Array = NDArray[np.float32]

MOST_RANK = 1 << 20  # more than any linear has rows or columns
ALPHA = 32  # the adapter's product enters as W + (ALPHA / rank) B A


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is, but not its numbers.

    rank: columns of B and rows of A. shapes: module name -> (d_out, d_in) of each adapted linear.
    """

    rank: int
    shapes: dict[str, tuple[int, int]]
    alpha: float = ALPHA

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @cached_property  # a sampler asks in every step
    def size(self) -> int:
        """Numbers in all A and B."""
        return sum(self.rank * (d_out + d_in) for d_out, d_in in self.shapes.values())

    @property
    def modules(self) -> dict[str, bool]:
        """train_attn, train_mlp, train_unembed, as the adapter was asked for."""
        return {flag: any(_flag_of(name) == flag for name in self.shapes) for flag in FLAGS}


FLAGS = ("train_attn", "train_mlp", "train_unembed")


def adapter_spec(
    config: ModelConfig, rank: int, train_attn: bool, train_mlp: bool, train_unembed: bool
) -> AdapterSpec:
    """An adapter of `rank` on the linears asked for. Raises BadRequestError if there is nothing to train."""
    if not is_whole(rank) or not 1 <= int(rank) <= MOST_RANK:
        raise BadRequestError(f"rank is {shortened(rank)}; it must be a whole number from 1 to {MOST_RANK}")
    wanted = {"train_attn": train_attn, "train_mlp": train_mlp, "train_unembed": train_unembed}
    shapes = {name: shape for name, shape in linear_shapes(config).items() if wanted[_flag_of(name)]}
    if not shapes:
        raise BadRequestError(
            "train_attn, train_mlp and train_unembed are all False; there is nothing to train"
        )
    return AdapterSpec(int(rank), shapes)


def check_seed(seed: int | None) -> None:
    """Raise BadRequestError for a seed that is no whole number of at least 0."""
    if seed is not None and (not is_whole(seed) or int(seed) < 0):
        raise BadRequestError(f"seed is {shortened(seed)}; it must be None or a whole number of at least 0")


def _flag_of(module: str) -> str:
    if ".self_attn." in module:
        return "train_attn"
    return "train_mlp" if ".mlp." in module else "train_unembed"


def initial_weights(spec: AdapterSpec, seed: int | None) -> Array:
    """A uniform in +-1 / sqrt(d_in) (what PEFT's Kaiming initialisation comes to), B zero: flat (size,).

    The same seed gives the same numbers on every backend; None draws a new seed from the system. Raises
    BadRequestError for a seed that is no whole number of at least 0.
    """
    check_seed(seed)
    flat = np.zeros(spec.size, np.float32)
    random = np.random.Generator(np.random.Philox(None if seed is None else int(seed)))
    for a, _ in views(spec, flat).values():
        bound = 1 / np.sqrt(a.shape[-1])
        a[...] = random.uniform(-bound, bound, a.shape)
    return flat


def views(spec: AdapterSpec, flat: Array) -> dict[str, tuple[Array, Array]]:
    """Module name -> (A: (1, rank, d_in), B: (1, d_out, rank)), views into flat: (size,).

    The leading 1 is the stack of adapters that `lora_linear` takes.
    """
    found, start = {}, 0
    for name, (d_out, d_in) in spec.shapes.items():
        middle, end = start + spec.rank * d_in, start + spec.rank * (d_in + d_out)
        found[name] = (
            flat[start:middle].reshape(1, spec.rank, d_in),
            flat[middle:end].reshape(1, d_out, spec.rank),
        )
        start = end
    return found
