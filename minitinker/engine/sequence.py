"""What a sampler has in work: requests, and the samples that are drawn for them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.regions import Region
from minitinker.engine.request import SampleRequest, Uniforms
from minitinker.engine.scoring import PromptScores, first_scored
from minitinker.types import SampledSequence, StopReason, TopkLogprobs

Array = Any
Index = NDArray[np.int64]


@dataclass(eq=False)
class Active:
    """A request in work, with its finished samples. number: requests count up as they come."""

    request: SampleRequest
    seed: int
    number: int
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    states: list[Array] = field(default_factory=list)  # of the prompt's chunks, where it is asked about
    scores: PromptScores | None = None


@dataclass(eq=False)
class Sequence:
    """A sample being drawn. done: how many of its tokens, prompt and drawn ones, are in its region."""

    active: Active
    sample: int
    uniforms: Uniforms
    request: SampleRequest = field(init=False)
    region: Region | None = None
    done: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopkLogprobs] = field(default_factory=list)  # of one token each

    def __post_init__(self) -> None:
        self.request = self.active.request

    @property
    def age(self) -> tuple[int, int]:
        """What the order goes by in which sequences are served."""
        return self.active.number, self.sample

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)

    def text(self, start: int, end: int) -> Index:
        """Its tokens from one place to another."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return np.array(self.tokens[start - len(prompt) : end - len(prompt)], np.int64)
        whole = np.concatenate([prompt, np.array(self.tokens, np.int64)]) if self.tokens else prompt
        return whole[start:end]

    @property
    def stop_reason(self) -> StopReason | None:
        """Why its last token is the last, if it is."""
        if self.request.stop.stops(self.tokens):
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_tokens else None

    @property
    def asks_for_bits(self) -> bool:
        """Whether the same shall come out again to the last bit: by a seed, and of what is said about a prompt."""
        request, scored = self.request, self.active.scores is not None
        return request.seed is not None or (not scored and first_scored(request) < len(request.prompt))

    def wanted(self, share: int) -> int:
        """Of how many of its next `share` tokens, the last of them, the final states are needed: to draw from the very
        last, and for what is asked about the prompt."""
        end = self.done + share
        drawn_from = int(end == self.length)
        if self.active.scores is not None:
            return drawn_from
        return max(drawn_from, end - max(self.done, first_scored(self.request)))

    def note_fed(self, share: int, exact: bool) -> None:
        """So many tokens more are in its region. exact: whether with the bits that a seed promises."""
        self.done += share
        region = self.region
        if region is not None:
            region.pure = region.pure and region.is_of(self.request.snapshot)
            region.exact = region.exact and exact
            region.done = min(self.done, len(region.text))
