"""A request for samples: what is asked for, of which weights, and with which random numbers."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.stopping import StopRule
from minitinker.tensors import TensorData
from minitinker.types import SampleResponse

if TYPE_CHECKING:
    from minitinker.engine.trainer import Snapshot

ALTERNATIVES = 2**63  # draw j beside a prompt's tokens has the key of a sample ALTERNATIVES + j


@dataclass(eq=False)
class Served:
    """What a SamplingClient samples from; None: the base model itself.

    A snapshot stays what it is. Inflight clients of a run share one of these, and the worker puts in newer
    weights between two steps: requests in work go on with them from their next token, and keep the keys and
    values of the tokens before.
    """

    snapshot: "Snapshot | None"


@dataclass(frozen=True)
class SampleRequest:
    """A checked `sample` call.

    prompt: (prompt,) int64. samples: 0 where only the prompt is of interest. top_logprobs: how many likeliest
    tokens to report in each place of a sample.

    Of the prompt: whether to report the logprobs of its tokens; how many likeliest tokens in each place; of how
    many tokens at its end both (None: all but the first); the logprobs of which other tokens, (prompt - 1, K)
    with -1 for none; how many draws in each place.
    """

    prompt: NDArray[np.int64]
    samples: int
    served: Served
    stop: StopRule
    max_tokens: int
    future: "Future[SampleResponse]"
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    top_prompt_logprobs: int = 0
    last_prompt_tokens: int | None = None
    prompt_targets: TensorData | None = None
    prompt_alternatives: int = 0

    @property
    def snapshot(self) -> "Snapshot | None":
        """The weights at this moment."""
        return self.served.snapshot


class Uniforms:
    """The random numbers of sample j of a request with seed s: Philox with the key (s, j), at counter t for
    the token at position t. They depend on nothing else, in particular not on what else is in the batch.

    That is `np.random.Philox(key=[s, j], counter=t)`, which adds 1 to the counter before it generates.
    """

    AHEAD = 64

    def __init__(self, seed: int, sample: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed % 2**64, sample], np.uint64))
        self._ready: list[float] = []

    def next(self) -> float:
        """The uniform in [0, 1) of the next position, from the first of the four words of its counter."""
        if not self._ready:
            words = self._bits.random_raw(4 * self.AHEAD)[::4]
            self._ready = ((words >> np.uint64(11)) * 2.0**-53).tolist()[::-1]
        return self._ready.pop()
