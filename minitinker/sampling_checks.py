"""Whether the arguments of `sample` make sense. Each raises BadRequestError with the name and the value."""

from reprlib import repr as shortened
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.conform import is_whole
from minitinker.errors import BadRequestError
from minitinker.model.config import ModelConfig
from minitinker.tensors import TensorData
from minitinker.types import ModelInput, SamplingParams

MOST_SAMPLES = 4096  # of one request, or in each place of its prompt; they are all drawn side by side


def text_of(prompt: Any) -> list[int] | BadRequestError:
    """The prompt's tokens as they are now, so that what the caller does to it later changes nothing."""
    if not isinstance(prompt, ModelInput):
        return BadRequestError(f"prompt is a {type(prompt).__name__}; it must be a ModelInput")
    try:
        return prompt.to_ints()
    except BadRequestError as error:
        return BadRequestError(f"prompt.{error}")


def check_prompt(text: list[int] | BadRequestError, config: ModelConfig, room: int) -> NDArray[np.int64]:
    """What text_of gave, as (prompt,) int64, with `room` tokens of context left."""
    if isinstance(text, BadRequestError):
        raise text
    most = config.max_position_embeddings - room
    if not 1 <= len(text) <= most:
        raise BadRequestError(f"the prompt has {len(text)} tokens; it must have 1 to {most}")
    for token in text:
        if not 0 <= token < config.vocab_size:
            raise BadRequestError(
                f"the prompt holds the token {token}; the vocabulary is 0 to {config.vocab_size - 1}"
            )
    return np.array(text, np.int64)


def check_seed(seed: int | None) -> int | None:
    if seed is not None and not 0 <= seed < 2**64:
        raise BadRequestError(f"seed is {seed}; it must be at least 0 and below 2^64")
    return seed


def check_max_tokens(params: SamplingParams, prompt_tokens: int, config: ModelConfig) -> int:
    """How many tokens to draw: never more than the context has room for."""
    room = config.max_position_embeddings - prompt_tokens
    if params.max_tokens is None:
        return room
    return min(room, check_whole("max_tokens", params.max_tokens, 1))


def check_last_n(last_n: Any, prompt_tokens: int, include_prompt_logprobs: bool) -> int | None:
    if last_n is None:
        return None
    if not include_prompt_logprobs:
        raise BadRequestError(
            f"prompt_logprobs_last_n is {shortened(last_n)}, but include_prompt_logprobs is not set, which it is about"
        )
    return check_whole("prompt_logprobs_last_n", last_n, 1, prompt_tokens - 1)


def check_alternatives(k: Any) -> int:
    return check_whole("prompt_alt_tokens_k", k, 0, MOST_SAMPLES)


def check_targets(targets: Any, prompt_tokens: int, vocab_size: int) -> TensorData | None:
    """target_prompt_logprobs: (prompt - 1, K) int64, token ids and -1."""
    name = "target_prompt_logprobs"
    if targets is None:
        return None
    if not isinstance(targets, TensorData):
        raise BadRequestError(f"{name} is a {type(targets).__name__}; it must be a TensorData")
    rows, *columns = targets.shape or [-1]
    if targets.dtype != "int64" or rows != prompt_tokens - 1 or len(columns) != 1 or columns[0] > vocab_size:
        raise BadRequestError(
            f"{name} is {targets.dtype} of shape {targets.shape}; it must be int64 of shape [{prompt_tokens - 1}, K], "
            f"a row for each token of the prompt but the first, and K up to {vocab_size}"
        )
    ids = np.array(targets.data, np.int64)
    outside = ids[(ids < -1) | (ids >= vocab_size)]
    if outside.size:
        raise BadRequestError(
            f"{name} holds {outside[0]}; token ids are 0 to {vocab_size - 1}, and -1 asks for nothing"
        )
    if not (ids >= 0).any():
        raise BadRequestError(f"{name} holds no token id; give one at least, or leave it out")
    return targets


def check_temperature(value: float) -> float:
    """0, or a temperature whose quotients are finite: beyond these bounds nothing is drawn that differs."""
    checked = check_number("temperature", value, 0, float("inf"))
    return checked and min(max(checked, 1e-30), 1e30)


def check_whole(name: str, value: Any, least: int, most: float = np.inf) -> int:
    if not is_whole(value) or not least <= int(value) <= most:
        right = f"of at least {least}" + (f" and at most {most}" if np.isfinite(most) else "")
        raise BadRequestError(f"{name} is {shortened(value)}; it must be a whole number {right}")
    return int(value)


def check_number(name: str, value: float, least: float, most: float, open_below: bool = False) -> float:
    inside = (least < value if open_below else least <= value) and value <= most and np.isfinite(value)
    if not inside:
        right = f"{'above' if open_below else 'at least'} {least:g}"
        right += f" and at most {most:g}" if np.isfinite(most) else " and finite"
        raise BadRequestError(f"{name} is {value!r}; it must be {right}")
    return float(value)
