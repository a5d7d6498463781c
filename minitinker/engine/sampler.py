"""Sampling from one base model with any number of adapters: all pending requests decode together.

A step feeds every sequence its next tokens, a new one its whole prompt and the others the token drawn last,
in one packed pass, and draws a token for each. A request joins at the next step and leaves when it ends.
"""

import math
import secrets
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.cache import Arena
from minitinker.engine.fitting import itemsize, out_of_memory
from minitinker.engine.stopping import StopRule
from minitinker.engine.trainer import Snapshot
from minitinker.errors import APIError, BadRequestError
from minitinker.futures import settle
from minitinker.model.adapter import views
from minitinker.model.packing import pack_for_cache
from minitinker.model.transformer import Network, hidden_states, logits_forward, target_logprobs, top_logprobs
from minitinker.model.weights import BaseModel
from minitinker.types import SampledSequence, SampleResponse

Array = Any

SMALL = 1 << 14  # tokens x hidden_size of a step below which its products are too small to share among cores
PROMPT_TOKENS = 2048  # of prompts that one step takes in, and
SAMPLES = 1024  # of sequences that decode together; both give way to a single request that is larger
MORE_ROWS = 64  # cache rows a sequence gets beyond its prompt at first; they double when they are full


@dataclass(frozen=True)
class SampleRequest:
    """A checked `sample` call.

    prompt: (tokens,) int64. samples: 0 where only the prompt is of interest. snapshot: None for the base model
    itself. top_prompt_logprobs: how many likeliest tokens to report in each place of the prompt.
    """

    prompt: NDArray[np.int64]
    samples: int
    snapshot: Snapshot | None
    stop: StopRule
    max_tokens: int
    future: "Future[SampleResponse]"
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    prompt_logprobs: bool = False
    top_prompt_logprobs: int = 0


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


@dataclass
class _Active:
    """A request in work, with its finished samples."""

    request: SampleRequest
    seed: int
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    prompt_logprobs: list[float | None] | None = None
    top_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None


class Sampler:
    """Requests on one base model. All methods run in the worker's thread."""

    def __init__(self, ops: ModuleType, base: BaseModel) -> None:
        self._ops, self._base = ops, base
        self._weights = base.placed(ops)
        self._weight_bytes = base.weights.numbers * itemsize(ops.DTYPE)
        self._arena = Arena(ops, base.config)
        self._waiting: list[SampleRequest] = []
        self._running: list[_Sequence] = []
        self._counted = 0
        self._one_core, self._on_one_core = ExitStack(), False  # entered while small steps follow each other
        self._merged: tuple[Snapshot | None, dict[str, Array]] = (None, {})
        self._stacked: tuple[list[Snapshot], dict[str, tuple[Array, Array]], Array] = ([], {}, None)

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
        requests, waiting = self._requests(), self._admitted()
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
        snapshots = _distinct([s.request.request.snapshot for s in fed])
        owner = [_index(snapshots, s.request.request.snapshot) for s in fed]
        owners = np.repeat(np.array(owner), batch.q_lengths)
        if (
            all(s.tokens for s in fed)
            and snapshots
            and not any(owners)
            and self._weight_bytes <= self._ops.MERGED_BYTES
        ):
            net = self._merged_network(snapshots[0])
        else:
            net = self._network(snapshots, owners)
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
                self._read_prompt(sequence, h[batch.q_starts[i] : ends[i]])
            sequence.done += len(sequence.feed)
        drawing: list[_Sequence] = []
        rows: list[int] = []
        for sequence, end in zip(fed, ends, strict=True):
            for drawn in self._split(sequence):
                drawing.append(drawn)
                rows.append(end - 1)
        if drawing:
            owners = np.array([_index(snapshots, s.request.request.snapshot) for s in drawing])
            last = self._ops.embedding(self._ops.array(np.array(rows)), h)
            logits, _ = logits_forward(self._network(snapshots, owners), last)
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
        if request.samples == 0:
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

    def _without_nan(self, sequences: list[_Sequence]) -> list[_Sequence]:
        """Fail the requests whose weights give no numbers, and only these; the sequences of the others."""
        bad = {id(s.request): s.request.request for s in sequences if math.isnan(s.logprobs[-1])}
        for request in bad.values():
            cause = (
                "the weights of this client give logits that are not finite; was the learning rate too high?"
            )
            settle(request.future, error=BadRequestError(cause))
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
            tokens=sequence.tokens,
            logprobs=sequence.logprobs,
        )
        self._end(sequence)
        return True

    def _end(self, sequence: _Sequence) -> None:
        """Give the region back, and answer the request if this was its last sample."""
        self._arena.free(sequence.start, sequence.rows)
        active = sequence.request
        if len(active.sequences) == active.request.samples:
            sequences = [active.sequences[j] for j in range(active.request.samples)]
            response = SampleResponse(sequences, active.prompt_logprobs, active.top_prompt_logprobs)
            settle(active.request.future, response)

    def _read_prompt(self, sequence: _Sequence, h: Array) -> None:
        """What was asked about the prompt itself, from its states h: (prompt, hidden_size)."""
        active = sequence.request
        request = active.request
        adapter = () if request.snapshot is None else _stack(self._ops, [request.snapshot])
        net = Network(self._ops, self._base.config, self._weights, *adapter)
        if request.prompt_logprobs:
            logprobs = target_logprobs(net, h[:-1], request.prompt[1:])
            active.prompt_logprobs = [None, *logprobs.tolist()]
        if request.top_prompt_logprobs:
            top = top_logprobs(net, h[:-1], request.top_prompt_logprobs)
            active.top_prompt_logprobs = [None, *top]

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

    def _network(self, snapshots: list[Snapshot], owners: NDArray[np.int64]) -> Network:
        """The base with the adapters of the rows; owners: (rows,) index into snapshots, -1 for the base."""
        ops, config = self._ops, self._base.config
        if not snapshots:
            return Network(ops, config, self._weights)
        if self._stacked[0] != snapshots:
            self._stacked = (snapshots, *_stack(ops, snapshots))
        _, lora, scale = self._stacked
        one_for_all = len(snapshots) == 1 and bool((owners == 0).all())
        return Network(ops, config, self._weights, lora, scale, None if one_for_all else ops.array(owners))

    def _merged_network(self, snapshot: Snapshot) -> Network:
        """The base with one adapter for all rows, formed into the weights of the layers once for many steps.

        It serves steps that only decode, where it spares two of three products. Prompts go through as they do
        in `forward`. The head stays as it is, since it may share its weight with the embedding.
        """
        lora, scale = _stack(self._ops, [snapshot])
        if self._merged[0] is not snapshot:
            weights = dict(self._weights)
            for name, (a, b) in lora.items():
                if name != "lm_head":
                    weights[f"{name}.weight"] = self._ops.lora_merge(weights[f"{name}.weight"], a, b, scale)
            self._merged = (snapshot, weights)
        head = {name: ab for name, ab in lora.items() if name == "lm_head"}
        return Network(self._ops, self._base.config, self._merged[1], head, scale)


def _stack(ops: ModuleType, snapshots: list[Snapshot]) -> tuple[dict[str, tuple[Array, Array]], Array]:
    """A: (adapters, rank, d_in) and B: (adapters, d_out, rank) of each module, and scale: (adapters,).

    Where ranks differ, or an adapter lacks a module, zeros fill up: they add nothing to the product.
    """
    scale = ops.array(np.array([snapshot.spec.scale for snapshot in snapshots], np.float32))
    single = [views(snapshot.spec, snapshot.flat) for snapshot in snapshots]
    if len(single) == 1:
        return single[0], scale
    rank = max(snapshot.spec.rank for snapshot in snapshots)
    stacked = {}
    for name, (d_out, d_in) in {k: v for s in snapshots for k, v in s.spec.shapes.items()}.items():
        a = ops.zeros((len(single), rank, d_in), ops.DTYPE)
        b = ops.zeros((len(single), d_out, rank), ops.DTYPE)
        for i, (snapshot, adapters) in enumerate(zip(snapshots, single, strict=True)):
            if name in adapters:
                a[i, : snapshot.spec.rank], b[i, :, : snapshot.spec.rank] = (
                    adapters[name][0][0],
                    adapters[name][1][0],
                )
        stacked[name] = (a, b)
    return stacked, scale


def _distinct(snapshots: Iterable[Snapshot | None]) -> list[Snapshot]:
    return list({id(snapshot): snapshot for snapshot in snapshots if snapshot is not None}.values())


def _index(snapshots: list[Snapshot], snapshot: Snapshot | None) -> int:
    return next((i for i, other in enumerate(snapshots) if other is snapshot), -1)
