"""Sampling from one base model with any number of adapters: who takes part in a step, and what becomes of it.

A step feeds every sequence its next tokens: to one that decodes the token drawn last, to others a chunk of their
prompt; all pending requests together. From each that has none left it draws a token. A sequence joins between two
steps and leaves when it ends.

Each has a region for its keys and values. Where there is no room the latest wait: those that have not begun, and
those whose region an earlier one needs to go on. The latter begin again with their tokens as a longer prompt, which
gives the same keys and values.
"""

import math
import secrets
from types import ModuleType
from typing import Any

import numpy as np

from minitinker.engine.decoder import Decoder
from minitinker.engine.fitting import out_of_memory
from minitinker.engine.regions import Regions
from minitinker.engine.request import SampleRequest, Uniforms
from minitinker.engine.scoring import PromptScores, first_scored
from minitinker.engine.sequence import Active, Sequence
from minitinker.errors import APIError, BadRequestError
from minitinker.futures import settle
from minitinker.model.transformer import Network
from minitinker.model.weights import BaseModel
from minitinker.types import SampledSequence, SampleResponse, StopReason, TopkLogprobs

Array = Any

SAMPLES = 1024  # sequences that go through together
MORE_ROWS = 64  # rows of a region beyond what is known of its sequence; they double when they are full


class Sampler:
    """Requests on one base model. All methods run in the worker's thread."""

    def __init__(self, ops: ModuleType, base: BaseModel, cache_bytes: int | None = None) -> None:
        """cache_bytes: of keys and values at most; None: half of the memory that is free now."""
        self._ops, self._base, self._cache_bytes = ops, base, cache_bytes
        self._decoder = Decoder(ops, base)
        self._regions = Regions(ops, base.config, cache_bytes)
        # When somebody last found no room: self._regions.changes, and whose age it was.
        self._full: tuple[int, tuple[int, int]] | None = None
        self._waiting: list[Sequence] = []  # without a region, in the order of age
        self._running: list[Sequence] = []
        self._requests_so_far = self._samples_so_far = 0

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._running)

    def add(self, request: SampleRequest) -> None:
        """Take a request in; its future gets the answer."""
        seed = secrets.randbits(64) if request.seed is None else request.seed
        active = Active(request, seed, self._requests_so_far)
        self._requests_so_far += 1
        self._waiting.append(Sequence(active, 0, Uniforms(seed, 0)))

    def cancel_all(self) -> None:
        """Cancel every request."""
        for sequence in [*self._waiting, *self._running]:
            sequence.request.future.cancel()
        self._forget_answered()
        self.rest()

    def rest(self) -> None:
        """To be called after a step where another one of this sampler does not follow: it may hold matrix products to
        one core."""
        self._decoder.rest()

    def step(self) -> None:
        """One token for every sequence that has been taken in whole. What goes wrong is told to every request
        that was in the step."""
        self._forget_answered()
        failure: BaseException | None = None
        fed: list[tuple[Sequence, int]] = []
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
            self.rest()

    def _fail(self, failure: BaseException, failed: list[Sequence]) -> None:
        """Tell it to those who were in the step, or else first in line; the others begin again in an empty arena."""
        for sequence in list(self._running):
            self._give_up(sequence)
        self._decoder.forget()
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

    def _give_region(self, sequence: Sequence) -> bool:
        """Whether there was one with room for the text and a few tokens more."""
        request, text = sequence.request, sequence.text(0, sequence.length)
        rows = len(text) + min(request.max_tokens - len(sequence.tokens), MORE_ROWS)
        known = len(text) - 1  # the last one's state is what the next token is drawn from
        if sequence.active.scores is None:
            known = min(known, first_scored(request))
        sequence.region = self._regions.take(text, rows, request.snapshot, known, sequence.asks_for_bits)
        if sequence.region is not None:
            sequence.done = sequence.region.done
        return sequence.region is not None

    def _shares(self) -> list[tuple[Sequence, int]]:
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

    def _make_room(self, sequence: Sequence, share: int) -> bool:
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

    def _give_up(self, sequence: Sequence) -> None:
        """Take the region away; the sequence waits in its place in line and begins again."""
        self._give_back(sequence)
        if sequence.active.scores is None:
            sequence.active.states = []
        self._running.remove(sequence)
        self._waiting = sorted([*self._waiting, sequence], key=lambda s: s.age)

    def _give_back(self, sequence: Sequence) -> None:
        region, sequence.region, sequence.done = sequence.region, None, 0
        if region is not None:
            self._regions.give_back(region)

    def _keep(self, sequence: Sequence) -> None:
        """Give the region back with what it holds, for texts that extend it."""
        region, sequence.region = sequence.region, None
        if region is not None:
            self._regions.keep(region, sequence.text(0, sequence.done))

    def _refuse(self, sequence: Sequence) -> None:
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

    # What it does

    def _advance(self, fed: list[tuple[Sequence, int]]) -> None:
        """Feed so many tokens to each sequence, and draw a token from each that has none left."""
        drawing = [s for s, _ in fed]
        if all(s.tokens and s.done + 1 == s.length for s in drawing):
            self._decoder.decode(drawing, self._regions.arena.cache)
        else:
            drawing = self._take_in(fed)
        for sequence in drawing:
            if math.isnan(sequence.logprobs[-1]):
                _fail_for_nan(sequence.active)
            elif (reason := sequence.stop_reason) is not None:
                self._end(sequence, reason)
        self._running = [sequence for sequence in self._running if sequence.region is not None]

    def _take_in(self, fed: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Advance where there are parts of prompts, too. Returns who drew a token."""
        wanted = [sequence.wanted(share) for sequence, share in fed]
        network, h = self._decoder.take_in(fed, wanted, self._regions.arena.cache)
        samples: list[list[Sequence]] = []  # that draw from the same row
        rows: list[int] = []
        end = 0
        for (sequence, _), count in zip(fed, wanted, strict=True):
            own = slice(end, end + count)
            end += count
            if sequence.active.scores is None:
                self._note_states(sequence, h[own], network.part(own))
            if sequence.done == sequence.length:
                samples.append(self._split(sequence))
                rows += [end - 1] * len(samples[-1])
        drawing = [sequence for drawn in samples for sequence in drawn]
        if drawing:
            self._decoder.draw(network, h, rows, drawing)
        for drawn in samples:
            self._copy_prompt(drawn)
        return drawing

    def _note_states(self, sequence: Sequence, h: Array, network: Network) -> None:
        """h: (places, hidden_size), the states wanted of the tokens just fed, which went through `network`, for what is
        asked about the prompt."""
        active, request = sequence.active, sequence.request
        if sequence.done > first_scored(request):
            active.states.append(h)
        if sequence.done == len(request.prompt):
            states, active.states = active.states, []
            active.scores = PromptScores()
            if states:
                active.scores = self._decoder.score(states, request, active.seed, network)
            if not active.scores.finite:
                _fail_for_nan(active)

    def _split(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that draw from this one's last row: itself, and right after the prompt every other sample of
        its request for which there is room."""
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
            other = Sequence(active, j, Uniforms(active.seed, j))
            if len(drawing) == j and len(self._running) < SAMPLES and self._reserve(sequence, other):
                self._running.append(other)
                drawing.append(other)
            else:
                self._waiting.append(other)
        self._running.sort(key=lambda s: s.age)
        self._waiting.sort(key=lambda s: s.age)
        return drawing

    def _reserve(self, first: Sequence, other: Sequence) -> bool:
        """Give another sample of the request a region for a copy of the prompt's keys and values, if it needs one and
        there is room; whether it can go on."""
        if other.request.max_tokens == 1:
            return True
        if first.region is not None:
            rows = first.done + min(other.request.max_tokens, MORE_ROWS)
            other.region = self._regions.reserve(first.region, rows)
        return other.region is not None

    def _copy_prompt(self, samples: list[Sequence]) -> None:
        """Give the samples that go on after their first token what the first of them has of the prompt, and take back
        the regions of the others."""
        copies = []
        for other in samples[1:]:
            if other.stop_reason:
                self._give_back(other)
            elif other.region is not None:
                other.done = samples[0].done
                copies.append(other.region)
        if copies and samples[0].region is not None:
            self._regions.copy(samples[0].region, copies, samples[0].done)

    # Ends

    def _end(self, sequence: Sequence, reason: StopReason) -> None:
        """Hand the sequence in, and answer the request if it was its last sample."""
        active, request = sequence.active, sequence.request
        self._samples_so_far += 1
        active.sequences[sequence.sample] = SampledSequence(
            stop_reason=reason,
            sequence_id=f"sequence-{self._samples_so_far}",
            tokens_np=np.array(sequence.tokens, np.int32),
            logprobs_np=np.array(sequence.logprobs, np.float32),
            topk_logprobs_np=_joined(sequence.top) if sequence.top else None,
        )
        self._keep(sequence)
        if len(active.sequences) == request.samples:
            self._answer(active)

    def _answer(self, active: Active) -> None:
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


def _fail_for_nan(active: Active) -> None:
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
