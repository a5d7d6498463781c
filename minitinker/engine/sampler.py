"""Sampling from one base model with any number of adapters: all pending requests decode together.

A step feeds every sequence its next tokens in one packed pass: to one that decodes the token drawn last, to others
a chunk of their prompt. From each that has none left it draws a token. A sequence joins between two steps and
leaves when it ends.

Each has a region for its keys and values. Where there is no room the latest wait: those that have not begun, and
those whose region an earlier one needs to go on. The latter begin again with their tokens as a longer prompt, which
gives the same keys and values.
"""

import math
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.fitting import out_of_memory
from minitinker.engine.networks import Networks, distinct, place
from minitinker.engine.regions import Region, Regions
from minitinker.engine.request import SampleRequest, Uniforms
from minitinker.engine.scoring import PromptScores, first_scored, score_prompt, top_of
from minitinker.engine.trainer import Snapshot
from minitinker.errors import APIError, BadRequestError
from minitinker.futures import settle
from minitinker.model.fused import fused_states
from minitinker.model.packing import micro_batches, pack_for_cache
from minitinker.model.transformer import Network, decoding_places, hidden_states, logits_forward
from minitinker.model.weights import BaseModel
from minitinker.types import SampledSequence, SampleResponse, TopkLogprobs

Array = Any
Index = NDArray[np.int64]

SMALL = 1 << 14  # tokens x hidden_size of a step below which its products are too small to share among cores
MANY = 1 << 23  # numbers in a step's adapters from which on they do share: reading these takes longest
SAMPLES = 1024  # sequences that go through together
MORE_ROWS = 64  # rows of a region beyond what is known of its sequence; they double when they are full


@dataclass(eq=False)
class _Active:
    """A request in work, with its finished samples. number: requests count up as they come."""

    request: SampleRequest
    seed: int
    number: int
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    states: list[Array] = field(default_factory=list)  # of the prompt's chunks, where it is asked about
    scores: PromptScores | None = None


@dataclass(eq=False)
class _Sequence:
    """A sample being drawn. done: how many of its tokens, prompt and drawn ones, are in its region."""

    active: _Active
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


class Sampler:
    """Requests on one base model. All methods run in the worker's thread."""

    def __init__(self, ops: ModuleType, base: BaseModel, cache_bytes: int | None = None) -> None:
        """cache_bytes: of keys and values at most; None: half of the memory that is free now."""
        self._ops, self._base, self._cache_bytes = ops, base, cache_bytes
        self._networks = Networks(ops, base)
        self._replays = ops.Replays()
        self._regions = Regions(ops, base.config, cache_bytes)
        # When somebody last found no room: self._regions.changes, and whose age it was.
        self._full: tuple[int, tuple[int, int]] | None = None
        self._waiting: list[_Sequence] = []  # without a region, in the order of age
        self._running: list[_Sequence] = []
        self._requests_so_far = self._samples_so_far = 0
        self._one_core, self._on_one_core = ExitStack(), False  # entered while small steps follow each other

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._running)

    def add(self, request: SampleRequest) -> None:
        """Take a request in; its future gets the answer."""
        seed = secrets.randbits(64) if request.seed is None else request.seed
        active = _Active(request, seed, self._requests_so_far)
        self._requests_so_far += 1
        self._waiting.append(_Sequence(active, 0, Uniforms(seed, 0)))

    def cancel_all(self) -> None:
        """Cancel every request."""
        for sequence in [*self._waiting, *self._running]:
            sequence.request.future.cancel()
        self._forget_answered()
        self._one_core.close()

    def step(self) -> None:
        """One token for every sequence that has been taken in whole. What goes wrong is told to every request
        that was in the step."""
        self._forget_answered()
        failure: BaseException | None = None
        fed: list[tuple[_Sequence, int]] = []
        try:
            self._admit()
            fed = self._shares()
            if fed:
                self._advance(fed)
        except self._ops.OutOfMemory:
            failure = MemoryError()
        except BaseException as error:
            failure = error
        if failure is not None:
            self._fail(failure, [sequence for sequence, _ in fed] or self._waiting[:1])
            self._forget_answered()
        if failure is not None or not self._running:
            self._one_core.close()

    def _fail(self, failure: BaseException, failed: list[_Sequence]) -> None:
        """Tell it to those who were in the step, or else first in line; the others begin again in an empty arena."""
        for sequence in list(self._running):
            self._give_up(sequence)
        self._replays = self._ops.Replays()
        self._regions = Regions(self._ops, self._base.config, self._cache_bytes)
        self._full = None
        if isinstance(failure, MemoryError):  # told here, where the failed step's arrays are gone
            failure = self._out_of_memory(len(failed))
        for sequence in failed:
            if not sequence.request.future.done():
                settle(sequence.request.future, error=failure)

    def _out_of_memory(self, samples: int) -> APIError:
        free = self._ops.free_memory()
        fitting = "fewer at once may"
        if free is not None:
            fitting = f"about {free // self._regions.arena.row_bytes} tokens in all would have"
        return out_of_memory(f"{samples} samples at once", self._ops.DEVICE, fitting, free)

    # Who takes part in a step

    def _admit(self) -> None:
        """Give regions to those who wait, in their order, until one finds no room."""
        while self._waiting and len(self._running) < SAMPLES:
            sequence = self._waiting[0]
            if self._full == (self._regions.changes, sequence.age):
                return
            if self._give_region(sequence):
                self._running.append(sequence)
                self._running.sort(key=lambda s: s.age)  # one that gave way comes back before later ones
            elif self._running:
                self._full = self._regions.changes, sequence.age
                return
            else:
                self._refuse(sequence)
            self._waiting.pop(0)

    def _give_region(self, sequence: _Sequence) -> bool:
        """Whether there was one with room for the text and a few tokens more."""
        request, text = sequence.request, sequence.text(0, sequence.length)
        rows = len(text) + min(request.max_tokens - len(sequence.tokens), MORE_ROWS)
        known = len(text) - 1  # the last one's state is what the next token is drawn from
        if sequence.active.scores is None:
            known = min(known, first_scored(request))
        sequence.region = self._regions.take(text, rows, request.snapshot, known, _asks_for_bits(sequence))
        if sequence.region is not None:
            sequence.done = sequence.region.done
        return sequence.region is not None

    def _shares(self) -> list[tuple[_Sequence, int]]:
        """How many tokens each running sequence is fed: one where it decodes, of prompts as many as a step takes,
        the earliest first. Regions that are too small for that become larger, or their sequence waits."""
        missing = [s.length - s.done for s in self._running]
        left = self._ops.CHUNK_TOKENS if 1 in missing else self._ops.MICRO_BATCH_TOKENS
        shares = []
        for sequence, tokens in list(zip(self._running, missing, strict=True)):
            share = 1 if tokens == 1 else min(tokens, left)
            if share > 0 and self._make_room(sequence, share):
                shares.append((sequence, share))
                left -= 0 if tokens == 1 else share
        return [(sequence, share) for sequence, share in shares if sequence.region is not None]

    def _make_room(self, sequence: _Sequence, share: int) -> bool:
        """Whether the region can take `share` tokens more, if need be after it became larger. Where there is no room
        for that, the latest sequence gives its own up, which may be this one."""
        region, needed = sequence.region, sequence.done + share
        if region is None or needed <= region.rows:
            return region is not None
        whole = len(sequence.request.prompt) + sequence.request.max_tokens
        while True:
            for rows in (max(needed, min(2 * region.rows, whole)), needed):
                if self._regions.extend(region, sequence.done, rows):
                    return True
            latest = self._running[-1]
            self._give_up(latest)
            if latest is sequence:
                return False

    def _give_up(self, sequence: _Sequence) -> None:
        """Take the region away; the sequence waits in its place in line and begins again."""
        self._give_back(sequence)
        if sequence.active.scores is None:
            sequence.active.states = []
        self._running.remove(sequence)
        self._waiting = sorted([*self._waiting, sequence], key=lambda s: s.age)

    def _give_back(self, sequence: _Sequence) -> None:
        region, sequence.region, sequence.done = sequence.region, None, 0
        if region is not None:
            self._regions.give_back(region)

    def _keep(self, sequence: _Sequence) -> None:
        """Give the region back with what it holds, for texts that extend it."""
        region, sequence.region = sequence.region, None
        if region is not None:
            self._regions.keep(region, sequence.text(0, sequence.done))

    def _refuse(self, sequence: _Sequence) -> None:
        """Fail a request whose samples are too long for the arena, one at a time."""
        arena = self._regions.arena
        settle(
            sequence.request.future,
            error=BadRequestError(
                f"a sample that has {sequence.length} tokens, prompt included, does not fit into the cache of keys "
                f"and values, which holds {arena.most_rows} tokens in {arena.most_rows * arena.row_bytes:,} bytes: "
                "ask for fewer tokens or give ServiceClient more cache_bytes"
            ),
        )

    # What a step computes

    def _advance(self, fed: list[tuple[_Sequence, int]]) -> None:
        """Feed so many tokens to each sequence, and draw a token from each that has none left."""
        decode = all(s.tokens and s.done + 1 == s.length for s, _ in fed)
        for sequence in self._decode([s for s, _ in fed]) if decode else self._take_in(fed):
            if math.isnan(sequence.logprobs[-1]):
                _fail_for_nan(sequence.active)
            else:
                self._end_if_over(sequence)
        self._running = [sequence for sequence in self._running if sequence.region is not None]

    def _decode(self, sequences: list[_Sequence]) -> list[_Sequence]:
        """Where each is fed the token drawn last: the step that is repeated, so the backend may record it."""
        snapshots, owners = self._owners(sequences)
        parts, exact, merged = self._route(sequences, [1] * len(sequences), snapshots)
        network = merged or self._networks.shared(snapshots, exact)
        rows = None if merged else self._networks.rows(snapshots, owners)
        cache = self._regions.arena.cache

        def draw(tokens: Array, done: Array, regions: Array, *others: Array) -> tuple[Array, ...]:
            net = network if rows is None else replace(network, adapter=others[-1])
            places = decoding_places(net, tokens, done, regions)
            h = fused_states(net, places, cache) if merged else hidden_states(net, places, cache)[0]
            logits, _ = logits_forward(net, h)
            return logits, *self._ops.sample(logits, *others[:4])

        inputs = (
            np.array([s.tokens[-1] for s in sequences]),
            np.array([s.done for s in sequences]),
            np.array([s.region.start for s in sequences if s.region is not None]),
            *_options(sequences),
            *([] if rows is None else [rows]),
        )
        depends_on = [network, *cache.keys, *cache.values]
        drawn = self._ops.side_by_side(
            lambda part: self._replays(depends_on, draw, *(x[part.start : part.stop] for x in inputs)), parts
        )
        for part, (logits, tokens, logprobs) in zip(parts, drawn, strict=True):
            self._note_drawn(sequences[part.start : part.stop], logits, tokens, logprobs)
        for sequence in sequences:
            self._note_region(sequence, 1, exact)
            sequence.done += 1
        return sequences

    def _take_in(self, fed: list[tuple[_Sequence, int]]) -> list[_Sequence]:
        """Where there are parts of prompts, too. Returns who drew a token."""
        sequences, shares = [s for s, _ in fed], [share for _, share in fed]
        snapshots, owners = self._owners(sequences)
        network, h = self._states(fed, snapshots, np.repeat(owners, shares))
        drawing: list[_Sequence] = []
        rows: list[int] = []
        end = 0
        for sequence, share in fed:
            end += share
            self._note_region(sequence, share, network.exact)
            if sequence.active.scores is None:
                self._note_states(sequence, h[end - share : end], snapshots)
            sequence.done += share
            if sequence.done == sequence.length:
                drawn = self._split(sequence)
                drawing += drawn
                rows += [end - 1] * len(drawn)
        if drawing:
            of_these = self._ops.array(np.array(rows))
            logits, _ = logits_forward(network.part(of_these), self._ops.embedding(of_these, h))
            options = [self._ops.array(x) for x in _options(drawing)]
            self._note_drawn(drawing, logits, *self._ops.sample(logits, *options))
        return drawing

    @staticmethod
    def _owners(sequences: list[_Sequence]) -> tuple[list[Snapshot], Index]:
        """The adapters of the sequences, and which of them is each one's; -1 for the base."""
        snapshots = distinct([s.request.snapshot for s in sequences])
        return snapshots, np.array([place(snapshots, s.request.snapshot) for s in sequences])

    def _route(
        self, sequences: list[_Sequence], shares: list[int], snapshots: list[Snapshot]
    ) -> tuple[list[range], bool, Network | None]:
        """How so many tokens of each sequence go through: in which parts, side by side; whether with a seed's bits; and
        through which merged network, if not through the one of all snapshots."""
        parts, ops = [range(len(sequences))], self._ops
        large = sum(shares) * self._base.config.hidden_size >= SMALL
        large = large or (len(snapshots) > 1 and sum(snapshot.spec.size for snapshot in snapshots) >= MANY)
        if large:
            parts = micro_batches(shares, ops.width())
        if large and len(parts) == 1:
            self._one_core.close()
        elif not self._on_one_core:
            self._on_one_core = True
            self._one_core.enter_context(ops.on_one_core())
            self._one_core.callback(setattr, self, "_on_one_core", False)
        exact = ops.BATCH_INVARIANT or any(_asks_for_bits(s) for s in sequences)
        merged = None if exact else self._networks.merged([s.request.snapshot for s in sequences])
        return parts, exact, merged

    def _states(
        self, fed: list[tuple[_Sequence, int]], snapshots: list[Snapshot], owners: Index
    ) -> tuple[Network, Array]:
        """The network of all tokens fed, and their final states, (tokens, hidden_size). owners: (tokens,), as in
        Networks.of."""
        cache = self._regions.arena.cache
        parts, exact, merged = self._route([s for s, _ in fed], [share for _, share in fed], snapshots)
        network = merged or self._networks.of(snapshots, owners, exact)

        def pass_through(part: range) -> Array:
            own = [fed[i] for i in part]
            batch = pack_for_cache(
                [s.text(s.done, s.done + share) for s, share in own],
                np.array([s.done for s, _ in own]),
                np.array([s.region.start for s, _ in own if s.region is not None]),
            )
            first = sum(share for _, share in fed[: part.start])
            rows = slice(first, first + len(batch.tokens))
            if merged:
                return fused_states(merged, batch, cache)
            return hidden_states(network.part(rows), batch, cache)[0]

        return network, self._in_one(self._ops.side_by_side(pass_through, parts))

    @staticmethod
    def _note_region(sequence: _Sequence, share: int, exact: bool) -> None:
        """Of the tokens just fed, how many are of the region's text, by the same weights and with a seed's bits."""
        region = sequence.region
        if region is not None:
            region.pure = region.pure and region.is_of(sequence.request.snapshot)
            region.exact = region.exact and exact
            region.done = min(sequence.done + share, len(region.text))

    def _note_states(self, sequence: _Sequence, h: Array, snapshots: list[Snapshot]) -> None:
        """h: (tokens, hidden_size), the states of the tokens just fed, for what is asked about the prompt."""
        active, request = sequence.active, sequence.request
        end, first = sequence.done + len(h), first_scored(request)
        if end > first:
            active.states.append(h[max(first - sequence.done, 0) :])
        if end == len(request.prompt):
            states, active.states = active.states, []
            active.scores = PromptScores()
            if states:
                owners = np.full(end - first, place(snapshots, request.snapshot))
                net = self._networks.of(snapshots, owners)
                active.scores = score_prompt(net, self._in_one(states), request, active.seed)
            if not active.scores.finite:
                _fail_for_nan(active)

    def _in_one(self, parts: list[Array]) -> Array:
        """Rows under each other."""
        if len(parts) == 1:
            return parts[0]
        whole = self._ops.zeros((sum(len(part) for part in parts), parts[0].shape[1]), self._ops.DTYPE)
        first = 0
        for part in parts:
            whole[first : first + len(part)] = part
            first += len(part)
        return whole

    def _split(self, sequence: _Sequence) -> list[_Sequence]:
        """The sequences that draw from this one's last row: itself, and right after the prompt every other sample of
        its request for which there is room, each with a copy of the prompt's keys and values."""
        active, request = sequence.active, sequence.request
        if sequence.sample > 0 or sequence.tokens:
            return [sequence]
        if request.future.done():
            return []
        if request.samples == 0:
            self._answer(active)
            self._keep(sequence)
            return []
        drawing = [sequence]
        for j in range(1, request.samples):
            other = _Sequence(active, j, Uniforms(active.seed, j))
            if len(drawing) == j and len(self._running) < SAMPLES and self._copy_region(sequence, other):
                self._running.append(other)
                drawing.append(other)
            else:
                self._waiting.append(other)
        self._running.sort(key=lambda s: s.age)
        self._waiting.sort(key=lambda s: s.age)
        return drawing

    def _copy_region(self, source: _Sequence, target: _Sequence) -> bool:
        """Give a sample of the same request a copy of the prompt's keys and values, if there is room."""
        rows = source.done + min(target.request.max_tokens, MORE_ROWS)
        if source.region is not None:
            target.region, target.done = self._regions.copy(source.region, source.done, rows), source.done
        return target.region is not None

    def _note_drawn(self, sequences: list[_Sequence], logits: Array, tokens: Array, logprobs: Array) -> None:
        """logits: (sequences, vocab), tokens and logprobs: (sequences,), from `ops.sample`."""
        for sequence, token, logprob in zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
        asked = [i for i, sequence in enumerate(sequences) if sequence.request.top_logprobs]
        if asked:
            self._add_likeliest([sequences[i] for i in asked], logits[asked])

    def _add_likeliest(self, sequences: list[_Sequence], logits: Array) -> None:
        """What the place of the token just drawn might have held. logits: (sequences, vocab)."""
        requests = [s.request for s in sequences]
        temperature = np.array([r.temperature for r in requests])
        top = top_of(self._ops, logits, temperature, max(r.top_logprobs for r in requests))
        for i, (sequence, request) in enumerate(zip(sequences, requests, strict=True)):
            k = request.top_logprobs
            sequence.top.append(TopkLogprobs(top.token_ids[i : i + 1, :k], top.logprobs[i : i + 1, :k]))

    # Ends

    def _end_if_over(self, sequence: _Sequence) -> None:
        """Hand the sequence in if this was its last token, and answer the request if it was its last sample."""
        active, request = sequence.active, sequence.request
        stopped = request.stop.stops(sequence.tokens)
        if not stopped and len(sequence.tokens) < request.max_tokens:
            return
        self._samples_so_far += 1
        active.sequences[sequence.sample] = SampledSequence(
            stop_reason="stop" if stopped else "length",
            sequence_id=f"sequence-{self._samples_so_far}",
            tokens_np=np.array(sequence.tokens, np.int32),
            logprobs_np=np.array(sequence.logprobs, np.float32),
            topk_logprobs_np=_joined(sequence.top) if sequence.top else None,
        )
        self._keep(sequence)
        if len(active.sequences) == request.samples:
            self._answer(active)

    def _answer(self, active: _Active) -> None:
        scores = active.scores or PromptScores()
        response = SampleResponse(
            sequences=[active.sequences[j] for j in range(active.request.samples)],
            prompt_logprobs_np=scores.logprobs,
            topk_prompt_logprobs_np=scores.top,
            target_prompt_logprobs=scores.targets,
            prompt_alt_tokens=scores.alternatives,
        )
        settle(active.request.future, response)

    def _forget_answered(self) -> None:
        """Give back the places of requests that were cancelled or failed."""
        everyone = [*self._waiting, *self._running]
        # Each is asked once, since it may be cancelled at any moment.
        gone = {active for active in {s.active for s in everyone} if active.request.future.done()}
        if not gone:
            return
        for sequence in everyone:
            if sequence.active in gone:
                self._give_back(sequence)
        for active in gone:
            if active.request.future.cancelled():
                settle(active.request.future)  # so that concurrent.futures.wait hears of it
        self._waiting = [s for s in self._waiting if s.active not in gone]
        self._running = [s for s in self._running if s.active not in gone]


def _asks_for_bits(sequence: _Sequence) -> bool:
    """Whether the same shall come out again to the last bit: by a seed, and of what is said about a prompt."""
    request, scored = sequence.request, sequence.active.scores is not None
    return request.seed is not None or (not scored and first_scored(request) < len(request.prompt))


def _options(sequences: list[_Sequence]) -> list[NDArray[Any]]:
    """What `ops.sample` is told beside the logits, (sequences,) each."""
    requests = [s.request for s in sequences]
    return [
        np.array([s.uniforms.next() for s in sequences]),
        np.array([r.temperature for r in requests]),
        np.array([r.top_k for r in requests]),
        np.array([r.top_p for r in requests]),
    ]


def _fail_for_nan(active: _Active) -> None:
    """Fail the request whose weights give no numbers, and only this one."""
    cause = "the weights of this client give logits that are not finite; was the learning rate too high?"
    if not active.request.future.done():
        settle(active.request.future, error=BadRequestError(cause))


def _joined(places: list[TopkLogprobs]) -> TopkLogprobs:
    """One place below the other."""
    return TopkLogprobs(
        np.concatenate([place.token_ids for place in places]),
        np.concatenate([place.logprobs for place in places]),
    )
