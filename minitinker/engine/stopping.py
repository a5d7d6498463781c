"""When a sample ends: at a stop token, or when its text holds a stop string."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

from minitinker.errors import BadRequestError

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class StopRule:
    """Stop tokens and stop strings. decode: token ids to text, special tokens included."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    decode: Decode

    def stops(self, tokens: Sequence[int]) -> bool:
        """Whether the last of `tokens` ends the sample. To be asked after each token."""
        if tokens[-1] in self.tokens:
            return True
        if not self.strings:
            return False
        # A string that the last token completes lies within as many tokens as it has bytes, each holding at
        # least one; a few more, since a character cut in two at the front decodes as a replacement character.
        reach = max(len(string.encode()) for string in self.strings) + 4
        text = self.decode(tokens[-reach:])
        return any(string in text for string in self.strings)


def stop_rule(stop: Any, eos: Sequence[int], decode: Decode, vocab_size: int) -> StopRule:
    """The rule of SamplingParams.stop: a string, strings or token ids, beside the model's end tokens `eos`.

    None: the end tokens alone. An empty list: nothing, not even these. Raises BadRequestError for others.
    """
    if stop is None:
        return StopRule(frozenset(eos), (), decode)
    parts: list[Any] = [stop] if isinstance(stop, str) else list(stop)
    if not parts:
        return StopRule(frozenset(), (), decode)
    if all(_is_text(part) for part in parts):
        return StopRule(frozenset(eos), tuple(parts), decode)
    if all(isinstance(part, int) and 0 <= part < vocab_size for part in parts):
        return StopRule(frozenset(parts) | frozenset(eos), (), decode)
    raise BadRequestError(
        f"SamplingParams.stop is {shortened(stop)}; it must be a string, a list of strings, all of them Unicode "
        f"and none empty, or a list of token ids in 0 to {vocab_size - 1}"
    )


def _is_text(part: object) -> bool:
    """Whether it is a string that a text may hold: not empty, and no half of a surrogate pair in it."""
    return isinstance(part, str) and part != "" and not any("\ud800" <= letter <= "\udfff" for letter in part)
