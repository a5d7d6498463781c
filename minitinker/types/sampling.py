"""What sampling takes and gives."""

from dataclasses import dataclass, field
from functools import cached_property
from reprlib import repr as shortened
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from minitinker.conform import Conforming, conform
from minitinker.tensors import TensorData
from minitinker.types.dumping import Dumpable

StopReason: TypeAlias = Literal["length", "stop"]
SamplingClientKind: TypeAlias = Literal["snapshot", "inflight"]

NO_LOGPROB = -99999.0  # with token 0: an empty place in TopkLogprobs


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Dumpable):
    """How to draw tokens.

    Fields:
        max_tokens: None runs to the end of the context.
        seed: the same seed draws the same samples.
        stop: a string, strings or token ids; None stops at the end-of-sequence tokens, [] at nothing.
        temperature: 0 is greedy.
        top_k: -1 is no limit.
        top_p: 1 is no limit.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1


class _OfArrays:
    """Base of dataclasses that hold arrays: equal where all fields are, and NaN equals NaN."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(value, vars(other)[name]) for name, value in self._fields())

    def _fields(self) -> Any:
        return ((name, getattr(self, name)) for name in self.__dataclass_fields__)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class TopkLogprobs(_OfArrays):
    """The k likeliest tokens in each of some places, likeliest first.

    token_ids: (length, k) int32, logprobs: (length, k) float32. A place that was not asked about has token 0 and
    logprob -99999.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        _hold_array(self, "token_ids", np.int32, 2)
        _hold_array(self, "logprobs", np.float32, 2)
        if self.token_ids.shape != self.logprobs.shape:
            shapes = f"{self.token_ids.shape} and {self.logprobs.shape}"
            raise ValueError(
                f"TopkLogprobs.token_ids and logprobs have the shapes {shapes}; they must be the same"
            )

    def to_lists(self) -> list[list[tuple[int, float]] | None]:
        """Per place (token, logprob), likeliest first; None for one that was not asked about."""
        asked = (self.logprobs != NO_LOGPROB).any(axis=-1).tolist()
        pairs = zip(self.token_ids.tolist(), self.logprobs.tolist(), asked, strict=True)
        return [list(zip(tokens, logprobs, strict=True)) if yes else None for tokens, logprobs, yes in pairs]


@dataclass(frozen=True, eq=False)
class SampledSequence(_OfArrays):
    """One sample.

    Fields:
        stop_reason: "stop" at a stop token or string, which the tokens end with; "length" at max_tokens.
        sequence_id: different for every sample.
        tokens_np: (tokens,) int32. A list may be given for this and the next; it becomes an array.
        logprobs_np: (tokens,) float32.
        topk_logprobs_np: (tokens, k), if `topk_sample_logprobs` asked for it.

    `tokens`, `logprobs` and `topk_logprobs` are the same as lists.
    """

    stop_reason: StopReason
    sequence_id: str
    tokens_np: npt.NDArray[np.int32] | None = field(default=None, repr=False)
    logprobs_np: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    topk_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        conform(StopReason, self.stop_reason, "SampledSequence.stop_reason")
        conform(str, self.sequence_id, "SampledSequence.sequence_id")
        _hold_array(self, "tokens_np", np.int32)
        _hold_array(self, "logprobs_np", np.float32)
        conform(TopkLogprobs | None, self.topk_logprobs_np, "SampledSequence.topk_logprobs_np")

    @cached_property
    def tokens(self) -> list[int]:
        """`tokens_np` as a list."""
        return [] if self.tokens_np is None else self.tokens_np.tolist()

    @cached_property
    def logprobs(self) -> list[float] | None:
        """`logprobs_np` as a list, or None."""
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    @cached_property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """Per token the k likeliest (token, logprob) in its place; None if not asked for."""
        return None if self.topk_logprobs_np is None else self.topk_logprobs_np.to_lists()


@dataclass(frozen=True)
class PromptAltTokens(Conforming):
    """Tokens that the model might have put in the prompt's places, drawn with replacement.

    tokens: int64, logprobs: float32, both (prompt - 1, k): row i stands for the prompt's place i + 1.
    """

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True, eq=False)
class SampleResponse(_OfArrays):
    """The samples of one prompt, and what was asked about the prompt itself; what was not is None.

    Fields:
        sequences: as many as were asked for.
        prompt_logprobs_np: (prompt,) float32; NaN for the first token and those before `prompt_logprobs_last_n`.
        topk_prompt_logprobs_np: (prompt, k), empty in the same places.
        target_prompt_logprobs: in the shape and layout of the request's target_prompt_logprobs, 0 where that has -1.
        prompt_cache_hit_tokens: what the hosted service bills less for; 0 here.
        prompt_alt_tokens: draws beside each token of the prompt after the first.

    `prompt_logprobs` and `topk_prompt_logprobs` are the same as lists, with None for what was not computed.
    """

    sequences: list[SampledSequence]
    prompt_logprobs_np: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    topk_prompt_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "sequences", conform(list[SampledSequence], self.sequences, "SampleResponse.sequences")
        )
        _hold_array(self, "prompt_logprobs_np", np.float32)
        for name, kind in {
            "topk_prompt_logprobs_np": TopkLogprobs | None,
            "target_prompt_logprobs": TensorData | None,
            "prompt_cache_hit_tokens": int,
            "prompt_alt_tokens": PromptAltTokens | None,
        }.items():
            object.__setattr__(self, name, conform(kind, getattr(self, name), f"SampleResponse.{name}"))

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        """Per token of the prompt its logprob, None where it was not computed; None if not asked for."""
        if self.prompt_logprobs_np is None:
            return None
        known = ~np.isnan(self.prompt_logprobs_np)
        return [x if yes else None for x, yes in zip(self.prompt_logprobs_np.tolist(), known, strict=True)]

    @cached_property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """Per token of the prompt the k likeliest (token, logprob) in its place; None if not asked for."""
        return None if self.topk_prompt_logprobs_np is None else self.topk_prompt_logprobs_np.to_lists()


def _hold_array(made: Any, name: str, dtype: type, dimensions: int = 1) -> None:
    """Let a field hold an array of this dtype; a list may have been given, with None for NaN.

    Raises TypeError, naming the field, for what makes no such array, or none of the same numbers.
    """
    given = getattr(made, name)
    if given is None and dimensions == 1:
        return
    if isinstance(given, np.ndarray) and given.dtype == dtype and given.ndim == dimensions:
        return  # as a sampler makes them, one for each token
    try:
        plain = np.asarray(given)
        with np.errstate(invalid="ignore"):
            array: npt.NDArray[Any] = np.asarray(given, dtype=dtype)
        if plain.size and dtype is np.int32 and (plain.dtype.kind not in "iu" or (array != plain).any()):
            raise ValueError("these are not whole numbers that int32 holds")
        if array.ndim != dimensions or plain.dtype.kind not in "iufO":
            raise ValueError(f"it has the shape {array.shape} and the dtype {plain.dtype!s:.80}")
    except Exception as error:  # NumPy raises of every kind
        raise TypeError(
            f"{type(made).__name__}.{name} is {shortened(given)}, a {type(given).__name__}; it must be "
            f"{dtype.__name__} of {dimensions} dimension{'s' * (dimensions > 1)}: {error!s:.200}"
        ) from None
    object.__setattr__(made, name, array)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return bool(a == b)
