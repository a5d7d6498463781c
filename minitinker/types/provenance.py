"""Where the tokens of a Datum came from: runs of positions, each taken from one sample or its prompt."""

from dataclasses import dataclass
from typing import TypeAlias

from minitinker.conform import Conforming


@dataclass(frozen=True, kw_only=True)
class _Span(Conforming):
    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sequence_id:
            raise ValueError(f"{type(self).__name__}.sequence_id is empty; it names a SampledSequence")
        for name in ("offset", "length"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{type(self).__name__}.{name} is {getattr(self, name)}; it must be at least 0"
                )


@dataclass(frozen=True, kw_only=True)
class PromptProvenanceSpan(_Span):
    """`length` tokens that stood from `offset` on in the prompt of the sample called `sequence_id`."""


@dataclass(frozen=True, kw_only=True)
class SampledProvenanceSpan(_Span):
    """`length` tokens that stood from `offset` on in the tokens of the sample called `sequence_id`."""


ProvenanceSpan: TypeAlias = PromptProvenanceSpan | SampledProvenanceSpan
ProvenanceSpans: TypeAlias = list[ProvenanceSpan]


def checked_spans(
    name: str, spans: ProvenanceSpans | None, length: int | None = None
) -> ProvenanceSpans | None:
    """A copy. Raises TypeError for what is no span; ValueError where they do not cover exactly `length` positions."""
    if spans is None:
        return None
    if not isinstance(spans, list | tuple):
        raise TypeError(f"{name} is a {type(spans).__name__}; it must be a list of spans")
    for i, span in enumerate(spans):
        if not isinstance(span, PromptProvenanceSpan | SampledProvenanceSpan):
            raise TypeError(
                f"{name}[{i}] is a {type(span).__name__}; it must be a PromptProvenanceSpan or a SampledProvenanceSpan"
            )
    covered = sum(span.length for span in spans)
    if length is not None and covered != length:
        raise ValueError(f"the spans of {name} cover {covered} positions; they must cover all {length}")
    return list(spans)
