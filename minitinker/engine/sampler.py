"""Sampling from one base model with any number of adapters: all pending requests decode together.

A step feeds every sequence its next tokens, a new one its whole prompt and the others the token drawn last,
in one packed pass, and draws a token for each. A request joins at the next step and leaves when it ends.
"""

import math
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.cache import Arena
from minitinker.engine.fitting import itemsize, out_of_memory
from minitinker.engine.networks import Networks, distinct, place
from minitinker.engine.request import SampleRequest, Uniforms
from minitinker.engine.scoring import PromptScores, score_prompt, top_of
from minitinker.errors import APIError, BadRequestError
from minitinker.futures import settle
from minitinker.model.packing import pack_for_cache
from minitinker.model.transformer import hidden_states, logits_forward
from minitinker.model.weights import BaseModel
from minitinker.types import SampledSequence, SampleResponse, TopkLogprobs

Array = Any

SMALL = 1 << 14  # tokens x hidden_size of a step below which its products are too small to share among cores
PROMPT_TOKENS = 2048  # of prompts that one step takes in, and
SAMPLES = 1024  # of sequences that decode together; both give way to a single request that is larger
MORE_ROWS = 64  # cache rows a sequence gets beyond its prompt at first; they double when they are full


@dataclass
class _Sequence:
    """A sample being drawn. feed: the tokens that the next step puts in, done: those in the cache already."""

    request: "_Active"
    sample: int
    uniforms: Uniforms
    start: int
    rows: int
    done: int
    feed: NDArray[np.int64]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopkLogprobs] = field(default_factory=list)  # of one token each


@dataclass
class _Active:
    """A request in work, with its finished samples."""

    request: SampleRequest
    seed: int
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    scores: PromptScores = field(default_factory=PromptScores)


class Sampler:
    """Requests on one base model. All methods run in the worker's thread."""

    def __init__(self, ops: ModuleType, base: BaseModel) -> None:
        self._ops, self._base = ops, base
        self._networks = Networks(ops, base)
        self._arena = Arena(ops, base.config)
        self._waiting: list[SampleRequest] = []
        self._running: list[_Sequence] = []
        self._counted = 0
        self._one_core, self._on_one_core = ExitStack(), False  # entered while small steps follow each other

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._running)

    def add(self, request: SampleRequest) -> None:
        """Take a request in; its future gets the answer."""
        self._waiting.append(request)

    def cancel_all(self) -> None:
        """Cancel every request."""
        for request in self._requests():
            request.future.cancel()
        self._forget_cancelled()

    def step(self) -> None:
        """One token for every sequence. What goes wrong is told to every request that was in the step."""
        self._forget_cancelled()
        waiting = self._admitted()
        requests = [*{id(s.request): s.request.request for s in self._running}.values(), *waiting]
        if not requests:
            return
        failure: BaseException | None = None
        try:
            new = [self._begin(request) for request in waiting]
            self._running = self._advance([*self._running, *new])
            if not self.busy:
                self._one_core.close()
        except self._ops.OutOfMemory:
            failure = MemoryError()
        except BaseException as error:
            failure = error
        if failure is not None:
            self._running, self._arena = [], Arena(self._ops, self._base.config)
            self._one_core.close()
            if isinstance(failure, MemoryError):  # told here, where the failed step's arrays are gone
                failure = self._out_of_memory(requests)
            for request in requests:
                if not request.future.done():
                    settle(request.future, error=failure)

    def _out_of_memory(self, requests: list[SampleRequest]) -> APIError:
        config, free = self._base.config, self._ops.free_memory()
        samples = sum(request.samples for request in requests)
        row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        tokens = (free or 0) // (row * itemsize(self._ops.DTYPE))
        fitting = "fewer at once may" if free is None else f"about {tokens} tokens in all would have"
        return out_of_memory(f"{samples} samples at once", self._ops.DEVICE, fitting, free)

    def _admitted(self) -> list[SampleRequest]:
        """Take from those who wait as many as go through at once: at least one, if nothing else is running."""
        admitted: list[SampleRequest] = []
        tokens, samples = 0, len(self._running)
        for request in self._waiting:
            tokens, samples = tokens + len(request.prompt), samples + request.samples
            if (admitted or self._running) and (tokens > PROMPT_TOKENS or samples > SAMPLES):
                break
            admitted.append(request)
        self._waiting = self._waiting[len(admitted) :]
        return admitted

    def _advance(self, fed: list[_Sequence]) -> list[_Sequence]:
        """Feed the sequences, draw a token for each, and return those that go on."""
        for sequence in fed:
            self._make_room(sequence)
        batch = pack_for_cache(
            [s.feed for s in fed], np.array([s.done for s in fed]), np.array([s.start for s in fed])
        )
        snapshots = distinct([s.request.request.snapshot for s in fed])
        owner = [place(snapshots, s.request.request.snapshot) for s in fed]
        owners = np.repeat(np.array(owner), batch.q_lengths)
        net = self._networks.of(snapshots, owners, decoding=all(s.tokens for s in fed))
        if len(batch.tokens) * self._base.config.hidden_size >= SMALL:
            self._one_core.close()
        elif not self._on_one_core:
            self._on_one_core = True
            self._one_core.enter_context(self._ops.on_one_core())
            self._one_core.callback(setattr, self, "_on_one_core", False)
        h, _ = hidden_states(net, batch, self._arena.cache)
        ends = batch.q_starts + batch.q_lengths
        for i, sequence in enumerate(fed):
            if sequence.done == 0:
                self._score_prompt(sequence.request, h[batch.q_starts[i] : ends[i]])
            sequence.done += len(sequence.feed)
        drawing: list[_Sequence] = []
        rows: list[int] = []
        for sequence, end in zip(fed, ends, strict=True):
            for drawn in self._split(sequence):
                drawing.append(drawn)
                rows.append(end - 1)
        if drawing:
            owners = np.array([place(snapshots, s.request.request.snapshot) for s in drawing])
            last = self._ops.embedding(self._ops.array(np.array(rows)), h)
            logits, _ = logits_forward(self._networks.of(snapshots, owners), last)
            self._draw(drawing, logits)
        return [sequence for sequence in self._without_nan(drawing) if not self._ended(sequence)]

    def _begin(self, request: SampleRequest) -> _Sequence:
        seed = secrets.randbits(64) if request.seed is None else request.seed
        return self._sequence(_Active(request, seed), 0, request.prompt)

    def _sequence(self, active: _Active, sample: int, feed: NDArray[np.int64]) -> _Sequence:
        """A sequence with a region for the prompt and a few tokens more."""
        request = active.request
        rows = len(request.prompt) + min(request.max_tokens, MORE_ROWS)
        start = self._arena.allocate(rows)
        return _Sequence(active, sample, Uniforms(active.seed, sample), start, rows, 0, feed)

    def _split(self, sequence: _Sequence) -> list[_Sequence]:
        """The sequences that draw from this one's last row.

        That is itself, or, right after the prompt, every sample of its request, each with a copy of the
        prompt's keys and values.
        """
        request = sequence.request.request
        if sequence.tokens:
            return [sequence]
        if request.samples == 0 or request.future.done():
            self._end(sequence)
            return []
        others = [self._sequence(sequence.request, j, sequence.feed) for j in range(1, request.samples)]
        for other in others:
            self._arena.copy(sequence.start, other.start, sequence.done)
            other.done = sequence.done
        return [sequence, *others]

    def _draw(self, sequences: list[_Sequence], logits: Array) -> None:
        requests = [s.request.request for s in sequences]
        options = (
            [s.uniforms.next() for s in sequences],
            [r.temperature for r in requests],
            [r.top_k for r in requests],
            [r.top_p for r in requests],
        )
        tokens, logprobs = self._ops.sample(logits, *(self._ops.array(np.array(x)) for x in options))
        for sequence, token, logprob in zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.feed = np.array([token])
        asked = [i for i, request in enumerate(requests) if request.top_logprobs]
        if asked:
            self._add_likeliest([sequences[i] for i in asked], logits[asked])

    def _add_likeliest(self, sequences: list[_Sequence], logits: Array) -> None:
        """What the place of the token just drawn might have held. logits: (sequences, vocab)."""
        requests = [s.request.request for s in sequences]
        temperature = np.array([r.temperature for r in requests])
        top = top_of(self._ops, logits, temperature, max(r.top_logprobs for r in requests))
        for i, (sequence, request) in enumerate(zip(sequences, requests, strict=True)):
            k = request.top_logprobs
            sequence.top.append(TopkLogprobs(top.token_ids[i : i + 1, :k], top.logprobs[i : i + 1, :k]))

    def _without_nan(self, sequences: list[_Sequence]) -> list[_Sequence]:
        """Fail the requests whose weights give no numbers, and only these; the sequences of the others."""
        bad = {id(s.request): s.request for s in sequences if math.isnan(s.logprobs[-1])}
        for active in bad.values():
            _fail_for_nan(active)
        for sequence in sequences:
            if id(sequence.request) in bad:
                self._arena.free(sequence.start, sequence.rows)
        return [sequence for sequence in sequences if id(sequence.request) not in bad]

    def _ended(self, sequence: _Sequence) -> bool:
        """Whether this was the sequence's last token; if so, it is handed in."""
        request = sequence.request.request
        stopped = request.stop.stops(sequence.tokens)
        if not stopped and len(sequence.tokens) < request.max_tokens:
            return False
        self._counted += 1
        sequence.request.sequences[sequence.sample] = SampledSequence(
            stop_reason="stop" if stopped else "length",
            sequence_id=f"sequence-{self._counted}",
            tokens_np=np.array(sequence.tokens, np.int32),
            logprobs_np=np.array(sequence.logprobs, np.float32),
            topk_logprobs_np=_joined(sequence.top) if sequence.top else None,
        )
        self._end(sequence)
        return True

    def _end(self, sequence: _Sequence) -> None:
        """Give the region back, and answer the request if this was its last sample."""
        self._arena.free(sequence.start, sequence.rows)
        active = sequence.request
        if len(active.sequences) == active.request.samples and not active.request.future.done():
            scores = active.scores
            response = SampleResponse(
                sequences=[active.sequences[j] for j in range(active.request.samples)],
                prompt_logprobs_np=scores.logprobs,
                topk_prompt_logprobs_np=scores.top,
                target_prompt_logprobs=scores.targets,
                prompt_alt_tokens=scores.alternatives,
            )
            settle(active.request.future, response)

    def _score_prompt(self, active: _Active, h: Array) -> None:
        """What was asked about the prompt itself, from its states h: (prompt, hidden_size)."""
        net = self._networks.alone(active.request.snapshot)
        active.scores = score_prompt(net, h, active.request, active.seed)
        if not active.scores.finite:
            _fail_for_nan(active)

    def _make_room(self, sequence: _Sequence) -> None:
        """Move the sequence to a region twice as large if its own cannot take what is fed next."""
        if sequence.done + len(sequence.feed) <= sequence.rows:
            return
        rows = 2 * sequence.rows
        start = self._arena.allocate(rows)
        self._arena.copy(sequence.start, start, sequence.done)
        self._arena.free(sequence.start, sequence.rows)
        sequence.start, sequence.rows = start, rows

    def _requests(self) -> list[SampleRequest]:
        """Every request that has no answer yet."""
        running = {id(s.request): s.request.request for s in self._running}
        return [*self._waiting, *running.values()]

    def _forget_cancelled(self) -> None:
        gone = [request for request in self._requests() if request.future.cancelled()]
        for request in gone:
            request.future.set_running_or_notify_cancel()  # so that concurrent.futures.wait hears of it
        left = {id(request) for request in gone}
        self._waiting = [request for request in self._waiting if id(request) not in left]
        for sequence in self._running:
            if id(sequence.request.request) in left:
                self._arena.free(sequence.start, sequence.rows)
        self._running = [s for s in self._running if id(s.request.request) not in left]


def _fail_for_nan(active: _Active) -> None:
    cause = "the weights of this client give logits that are not finite; was the learning rate too high?"
    settle(active.request.future, error=BadRequestError(cause))


def _joined(places: list[TopkLogprobs]) -> TopkLogprobs:
    """One place below the other."""
    return TopkLogprobs(
        np.concatenate([place.token_ids for place in places]),
        np.concatenate([place.logprobs for place in places]),
    )
