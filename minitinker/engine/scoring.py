"""What a sampler reports beside the tokens it draws: of the prompt, and of the other tokens it might have drawn.

Logprobs of a prompt are the model's, as `forward` has them, whatever the temperature.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.request import ALTERNATIVES, SampleRequest, Uniforms
from minitinker.model.transformer import Network, head_chunks, logits_forward, target_logprobs, top_logprobs
from minitinker.tensors import TensorData
from minitinker.types import PromptAltTokens, TopkLogprobs
from minitinker.types.sampling import NO_LOGPROB

Array = Any


@dataclass(frozen=True)
class PromptScores:
    """What was asked about a prompt, as a SampleResponse holds it. finite: whether the weights gave numbers."""

    logprobs: NDArray[np.float32] | None = None
    top: TopkLogprobs | None = None
    targets: TensorData | None = None
    alternatives: PromptAltTokens | None = None
    finite: bool = True


def first_scored(request: SampleRequest) -> int:
    """The first place of the prompt whose state `score_prompt` needs; the prompt's length if it needs none."""
    size = len(request.prompt)
    if request.prompt_targets is not None or request.prompt_alternatives:
        return 0
    if request.prompt_logprobs or request.top_prompt_logprobs:
        return size - 1 - _last(request)
    return size


def _last(request: SampleRequest) -> int:
    """Of how many tokens at the prompt's end logprobs are asked."""
    return len(request.prompt) - 1 if request.last_prompt_tokens is None else request.last_prompt_tokens


def score_prompt(net: Network, h: Array, request: SampleRequest, seed: int) -> PromptScores:
    """h: the final states of the request's prompt from `first_scored` on, (places, hidden_size). The state of place i
    predicts the token at i + 1."""
    size, last = len(request.prompt), _last(request)
    logprobs = top = targets = alternatives = None
    scored, found = h[len(h) - 1 - last : len(h) - 1], []
    if request.prompt_logprobs:
        found.append(target_logprobs(net, scored, request.prompt[size - last :]))
        logprobs = np.concatenate([np.full(size - last, np.nan, np.float32), found[-1]])
    if request.top_prompt_logprobs:
        top = _after(size - last, top_logprobs(net, scored, request.top_prompt_logprobs), request)
        found.append(top.logprobs)
    if request.prompt_targets is not None:
        targets = _score_targets(net, h[:-1], request.prompt_targets)
        found.append(targets.to_numpy())
    if request.prompt_alternatives:
        alternatives = _draw_alternatives(net, h[:-1], request, seed)
        found.append(alternatives.logprobs.to_numpy())
    return PromptScores(
        logprobs, top, targets, alternatives, finite=not any(np.isnan(x).any() for x in found)
    )


def top_of(ops: ModuleType, logits: Array, temperature: NDArray[np.float64], k: int) -> TopkLogprobs:
    """The k likeliest tokens of each row. logits: (rows, vocab), temperature: (rows,).

    Their logprobs are of the tempered distribution before it is cut: to the bit what `sample` would report.
    """
    tokens = np.argsort(-ops.to_numpy(logits), axis=-1, kind="stable")[:, :k]
    logprobs = ops.to_numpy(ops.tempered_logprob(logits, ops.array(tokens), ops.array(temperature)))
    return TopkLogprobs(tokens.astype(np.int32), logprobs.astype(np.float32))


def _after(unscored: int, places: list[list[tuple[int, float]]], request: SampleRequest) -> TopkLogprobs:
    """The likeliest tokens of the scored places, behind as many empty places."""
    shape = (unscored + len(places), request.top_prompt_logprobs)
    tokens, logprobs = np.zeros(shape, np.int32), np.full(shape, NO_LOGPROB, np.float32)
    for i, place in enumerate(places, unscored):
        tokens[i], logprobs[i] = [token for token, _ in place], [logprob for _, logprob in place]
    return TopkLogprobs(tokens, logprobs)


def _score_targets(net: Network, h: Array, asked: TensorData) -> TensorData:
    """h: (prompt - 1, hidden_size), asked: (prompt - 1, K) int64, -1 for nothing -> logprobs in asked's layout."""
    targets = asked.to_numpy(pad_value=-1)
    logprobs = np.zeros(targets.shape, np.float32)
    ops = net.ops
    for rows in head_chunks(net, len(h)):
        if (targets[rows] >= 0).any():
            logits, _ = logits_forward(net.part(rows), h[rows])
            found, _ = ops.logprob_forward(logits, ops.array(np.maximum(targets[rows], 0)))
            logprobs[rows] = np.where(targets[rows] >= 0, ops.to_numpy(found), 0)
    return TensorData.from_numpy(logprobs).with_layout_of(asked)


def _draw_alternatives(net: Network, h: Array, request: SampleRequest, seed: int) -> PromptAltTokens:
    """h: (prompt - 1, hidden_size). Draws with replacement from the whole tempered distribution of each place.

    Draw j at row i takes the uniform of position i of sample ALTERNATIVES + j.
    """
    ops, draws = net.ops, request.prompt_alternatives
    streams = [Uniforms(seed, ALTERNATIVES + j) for j in range(draws)]
    uniforms = np.array([[stream.next() for stream in streams] for _ in range(len(h))]).reshape(-1, draws)
    tokens, logprobs = np.zeros(uniforms.shape, np.int64), np.zeros(uniforms.shape, np.float32)
    for rows in head_chunks(net, len(h)):
        logits, _ = logits_forward(net.part(rows), h[rows])
        count = len(uniforms[rows])
        options = (np.full(count, request.temperature), np.full(count, -1), np.full(count, 1.0))
        whole = [ops.array(option) for option in options]
        for j in range(draws):
            drawn, _ = ops.sample(logits, ops.array(uniforms[rows, j]), *whole)
            tokens[rows, j] = ops.to_numpy(drawn)
        logprobs[rows] = ops.to_numpy(ops.logprob_forward(logits, ops.array(tokens[rows]))[0])
    return PromptAltTokens(TensorData.from_numpy(tokens), TensorData.from_numpy(logprobs))
