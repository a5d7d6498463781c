"""What a sampler's step computes: tokens of many sequences go through the model, and the next ones are drawn."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.cores import Cores
from minitinker.engine.networks import Networks, distinct
from minitinker.engine.request import SampleRequest
from minitinker.engine.scoring import PromptScores, score_prompt, top_of
from minitinker.engine.sequence import Sequence
from minitinker.engine.trainer import Snapshot
from minitinker.model.fused import sampled_states
from minitinker.model.packing import micro_batches, pack_for_cache
from minitinker.model.transformer import KVCache, Network, decoding_places, logits_forward
from minitinker.model.weights import BaseModel
from minitinker.types import TopkLogprobs

Array = Any
Index = NDArray[np.int64]

# Each core takes some of the sequences where a step has so many tokens and so many numbers in their states, which is
# much that is no product; or where their adapters have so many numbers, of which each is read for few tokens.
TOKENS, STATES = 32, 1 << 14
ADAPTERS = 1 << 23


@dataclass(frozen=True)
class Batch:
    """What steps that decode the same sequences have in common. own: the adapter of each. rows: which of the network's
    adapters each has, as in Network.adapter. parts, exact: as from `Decoder._route`. options: temperature, top_k and
    top_p, (sequences,) each."""

    sequences: list[Sequence]
    own: list[Snapshot | None]
    network: Network
    rows: Index | None
    parts: list[range]
    exact: bool
    options: list[NDArray[Any]]


class Decoder:
    """Computes steps on one base model, whatever the adapters of the sequences."""

    def __init__(self, ops: ModuleType, base: BaseModel) -> None:
        self._ops, self._hidden_size = ops, base.config.hidden_size
        self._numbers = base.weights.numbers
        self._networks = Networks(ops, base)
        self._replays = ops.Replays()
        self._cores = Cores(ops)
        self._batch: Batch | None = None  # of the step before, if that decoded

    def rest(self) -> None:
        """To be called where no step follows, since others' matrix products need all cores, and adapters that nobody
        samples from any more can go."""
        self._batch = None
        self._cores.rest()

    def forget(self) -> None:
        """Let go of what is kept of earlier steps."""
        self._replays, self._batch = self._ops.Replays(), None
        self._networks.forget()

    def decode(self, sequences: list[Sequence], cache: KVCache) -> None:
        """Feed each the token drawn last, and draw the next: the step that is repeated, so the backend may record
        it."""
        batch = self._batch_of(sequences)
        network, rows, parts = batch.network, batch.rows, batch.parts

        def draw(tokens: Array, done: Array, regions: Array, *others: Array) -> tuple[Array, ...]:
            net = network if rows is None else replace(network, adapter=others[-1])
            places = decoding_places(net, tokens, done, regions)
            logits, _ = logits_forward(net, sampled_states(net, places, cache))
            return logits, *self._ops.sample(logits, *others[:4])

        inputs = (
            np.array([s.tokens[-1] for s in sequences]),
            np.array([s.done for s in sequences]),
            np.array([s.region.start for s in sequences if s.region is not None]),
            _uniforms(sequences),
            *batch.options,
            *([] if rows is None else [rows]),
        )
        depends_on = [network, *cache.keys, *cache.values]
        alike = batch.exact, bool(network.lora)
        drawn = self._on_cores(
            lambda part: self._replays(depends_on, draw, *(x[part.start : part.stop] for x in inputs)),
            parts,
            len(sequences),
            alike,
        )
        for part, (logits, tokens, logprobs) in zip(parts, drawn, strict=True):
            self._note_drawn(sequences[part.start : part.stop], logits, tokens, logprobs)
        for sequence in sequences:
            sequence.note_fed(1, batch.exact)

    def take_in(
        self, fed: list[tuple[Sequence, int]], wanted: list[int], cache: KVCache
    ) -> tuple[Network, Array]:
        """Feed so many of its next tokens to each. wanted: of how many of these, the last, the final states are needed.
        Returns the network of those, and their states, (sum of wanted, hidden_size), those of one sequence below those
        of the other."""
        self._batch = None  # nothing holds on to adapters that make room for others
        sequences, shares = [s for s, _ in fed], [share for _, share in fed]
        snapshots, owners = _owners([s.request.snapshot for s in sequences])
        parts, exact = self._route(sequences, shares, snapshots)
        network, adapter = self._networks.of(snapshots, owners, exact)

        def of_tokens(counts: list[int]) -> Network:
            if adapter is None:
                return network
            return replace(network, adapter=self._ops.array(np.repeat(adapter, counts)))

        whole = of_tokens(shares)

        def pass_through(part: range) -> Array:
            own = [fed[i] for i in part]
            batch = pack_for_cache(
                [s.text(s.done, s.done + share) for s, share in own],
                np.array([s.done for s, _ in own]),
                np.array([s.region.start for s, _ in own if s.region is not None]),
                np.array(wanted[part.start : part.stop]),
            )
            first = sum(shares[: part.start])
            rows = slice(first, first + len(batch.tokens))
            return sampled_states(whole.part(rows), batch, cache)

        h = self._in_one(self._on_cores(pass_through, parts, sum(shares)))
        for sequence, share in fed:
            sequence.note_fed(share, exact)
        return of_tokens(wanted), h

    def draw(self, network: Network, h: Array, rows: list[int], sequences: list[Sequence]) -> None:
        """Draw the next token of each sequence from one of the rows of h: (tokens, hidden_size)."""
        of_these = self._ops.array(np.array(rows))
        logits, _ = logits_forward(network.part(of_these), self._ops.embedding(of_these, h))
        options = [self._ops.array(x) for x in (_uniforms(sequences), *_options(sequences))]
        self._note_drawn(sequences, logits, *self._ops.sample(logits, *options))

    def score(self, states: list[Array], request: SampleRequest, seed: int, network: Network) -> PromptScores:
        """What is asked about a prompt. states: of its tokens in order, (tokens, hidden_size) each. network: that of
        some of them."""
        h = self._in_one(states)
        net = network.part(self._ops.array(np.zeros(len(h), np.int64)))
        return score_prompt(net, h, request, seed)

    def _batch_of(self, sequences: list[Sequence]) -> Batch:
        """The one of the step before, where nothing has changed."""
        batch, own = self._batch, [s.request.snapshot for s in sequences]
        if batch is None or batch.sequences != sequences or batch.own != own:
            self._batch = batch = None  # the old network is gone before the new one is there
            snapshots, owners = _owners(own)
            parts, exact = self._route(sequences, [1] * len(sequences), snapshots)
            network, rows = self._networks.of(snapshots, owners, exact)
            batch = Batch(sequences, own, network, rows, parts, exact, _options(sequences))
            self._batch = batch
        return batch

    def _route(
        self, sequences: list[Sequence], shares: list[int], snapshots: list[Snapshot]
    ) -> tuple[list[range], bool]:
        """How so many tokens of each sequence go through: in which parts, side by side; and whether with a seed's
        bits."""
        ops, tokens = self._ops, sum(shares)
        apart = tokens >= TOKENS and tokens * self._hidden_size >= STATES
        apart = apart or (
            len(snapshots) > 1 and sum(snapshot.spec.size for snapshot in snapshots) >= ADAPTERS
        )
        parts = micro_batches(shares, ops.width()) if apart else [range(len(sequences))]
        return parts, ops.BATCH_INVARIANT or any(s.asks_for_bits for s in sequences)

    def _on_cores(
        self, function: Callable[[range], Any], parts: list[range], tokens: int, alike: Hashable = None
    ) -> list[Any]:
        """function of each part, side by side; where one part has all the tokens, BLAS may share its products. alike:
        as in `Cores.step`."""
        multiplications = tokens * self._numbers if len(parts) == 1 else 0
        with self._cores.step(multiplications, alike):
            return self._ops.side_by_side(function, parts)  # type: ignore[no-any-return]

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

    def _note_drawn(self, sequences: list[Sequence], logits: Array, tokens: Array, logprobs: Array) -> None:
        """logits: (sequences, vocab), tokens and logprobs: (sequences,), from `ops.sample`."""
        for sequence, token, logprob in zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
        asked = [i for i, sequence in enumerate(sequences) if sequence.request.top_logprobs]
        if asked:
            self._add_likeliest([sequences[i] for i in asked], logits[asked])

    def _add_likeliest(self, sequences: list[Sequence], logits: Array) -> None:
        """What the place of the token just drawn might have held. logits: (sequences, vocab)."""
        requests = [s.request for s in sequences]
        temperature = np.array([r.temperature for r in requests])
        top = top_of(self._ops, logits, temperature, max(r.top_logprobs for r in requests))
        for i, (sequence, request) in enumerate(zip(sequences, requests, strict=True)):
            k = request.top_logprobs
            sequence.top.append(TopkLogprobs(top.token_ids[i : i + 1, :k], top.logprobs[i : i + 1, :k]))


def _owners(own: list[Snapshot | None]) -> tuple[list[Snapshot], Index]:
    """Of the adapter that each sequence has: all there are, and which of them is each one's; -1 for the base."""
    snapshots = distinct(own)
    places = {id(snapshot): i for i, snapshot in enumerate(snapshots)}
    return snapshots, np.array([places.get(id(snapshot), -1) for snapshot in own])


def _uniforms(sequences: list[Sequence]) -> NDArray[Any]:
    """What `ops.sample` draws with next: (sequences,)."""
    return np.array([s.uniforms.next() for s in sequences])


def _options(sequences: list[Sequence]) -> list[NDArray[Any]]:
    """What `ops.sample` is told beside logits and uniforms: temperature, top_k and top_p, (sequences,) each."""
    requests = [s.request for s in sequences]
    return [
        np.array([r.temperature for r in requests]),
        np.array([r.top_k for r in requests]),
        np.array([r.top_p for r in requests]),
    ]
