"""A sampler under any interleaving of sample, train, save, step and cancel, against each request alone."""

from concurrent.futures import Future

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_row_bits import OPENBLAS
from tiny_models import VOCAB, make_model, make_trainer

from minitinker import AdamParams, Datum, ModelInput, reference
from minitinker.engine import sampler as sampler_file
from minitinker.engine.request import SampleRequest, Served
from minitinker.engine.sampler import Sampler
from minitinker.engine.stopping import StopRule
from minitinker.model.weights import load_base_model

# After none of them does rounding show much: after np.arange(5, 90), say, a float32 forward is up to 1.5e-5 off itself.
PROMPTS = [np.arange(3), np.arange(30), np.concatenate([np.arange(30), [9, 9, 9]]), np.arange(5, 92)]
BASE = None


def base():
    global BASE
    if BASE is None:
        BASE = load_base_model(str(make_model()[0]))
    return BASE


class SamplerAgainstEachRequestAlone(RuleBasedStateMachine):
    @initialize(tokens=st.sampled_from([180, 400, 5000]))
    def begin(self, tokens):
        row_bytes = Sampler(reference, base())._regions.arena.row_bytes
        self.sampler = Sampler(reference, base(), cache_bytes=tokens * row_bytes)
        self.trainer = make_trainer(base(), rank=3, spread=0.1)
        self.snapshots = [None, self.trainer.snapshot()]
        self.open, self.answered = [], []
        self.sizes = sampler_file.MORE_ROWS, reference.CHUNK_TOKENS
        # So that regions grow, and prompts come in pieces.
        sampler_file.MORE_ROWS, reference.CHUNK_TOKENS = 2, 16

    @rule(
        which=st.integers(0, 100),
        prompt=st.sampled_from(PROMPTS),
        samples=st.integers(1, 4),
        seed=st.none() | st.integers(0, 2**32),
        max_tokens=st.integers(1, 25),
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        top_k=st.sampled_from([-1, 5]),
        stop=st.frozensets(st.integers(0, VOCAB - 1), max_size=20),
        prompt_logprobs=st.booleans(),
    )
    def sample(self, which, stop, **fields):
        fields["served"] = Served(self.snapshots[which % len(self.snapshots)])
        fields["stop"] = StopRule(stop, (), str)
        self.ask(fields)

    def ask(self, fields):
        request = SampleRequest(future=Future(), **fields)
        self.open.append((request, fields))
        self.sampler.add(request)

    @rule(
        which=st.integers(0, 100),
        kept=st.integers(-10, 0),
        more=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        seed=st.none() | st.integers(0, 100),
    )
    def go_on_from_an_answer(self, which, kept, more, seed):
        if self.answered:
            fields, tokens = self.answered[which % len(self.answered)]
            text = np.concatenate([fields["prompt"], tokens[: kept or None], more]).astype(np.int64)
            self.ask(fields | {"prompt": text[:150], "seed": seed})

    @rule(seed=st.integers(0, 100))
    def train_and_save(self, seed):
        tokens = np.random.default_rng(seed).integers(0, VOCAB, 9)
        datum = Datum(ModelInput.from_ints(tokens[:-1].tolist()), {"target_tokens": tokens[1:]})
        self.trainer.forward_backward([datum], "cross_entropy", None)
        self.trainer.optim_step(AdamParams(learning_rate=1e-3))
        self.snapshots.append(self.trainer.snapshot())

    @rule(steps=st.integers(1, 15))
    def step(self, steps):
        for _ in range(steps):
            self.sampler.step()

    @rule(which=st.integers(0, 100))
    def cancel(self, which):
        if self.open:
            request, _ = self.open[which % len(self.open)]
            if request.future.cancel():
                self.sampler.step()
                assert all(s.request is not request for s in [*self.sampler._running, *self.sampler._waiting])

    @invariant()
    def what_is_answered_is_what_each_would_get_alone_and_what_forward_says(self):
        for request, fields in [pair for pair in getattr(self, "open", []) if pair[0].future.done()]:
            self.open = [pair for pair in self.open if pair[0] is not request]
            if not request.future.cancelled():
                check(request.future.result(), fields)
                self.answered.append((fields, request.future.result().sequences[0].tokens))

    @invariant()
    def the_earliest_are_served_first(self):
        for line in (self.sampler._running, self.sampler._waiting) if hasattr(self, "sampler") else ():
            assert [s.age for s in line] == sorted(s.age for s in line)

    def teardown(self):
        if hasattr(self, "sampler"):
            for _ in range(2000):
                if not self.sampler.busy:
                    break
                self.sampler.step()
            assert not self.sampler.busy
            self.what_is_answered_is_what_each_would_get_alone_and_what_forward_says()
            assert not self.open
            taken = sum(region.rows for region in self.sampler._regions.kept)
            holes = sum(end - start for start, end in self.sampler._regions.arena._holes)
            sampler_file.MORE_ROWS, reference.CHUNK_TOKENS = self.sizes
            assert taken + holes == self.sampler._regions.arena.rows <= self.sampler._regions.arena.most_rows


def check(response, fields):
    alone = SampleRequest(future=Future(), **fields)
    sampler = Sampler(reference, base())
    sampler.add(alone)
    while sampler.busy:
        sampler.step()
    expected = alone.future.result()
    if fields["seed"] is not None or fields["temperature"] == 0:
        assert [s.tokens for s in response.sequences] == [s.tokens for s in expected.sequences]
    if fields["seed"] is not None and OPENBLAS:
        for sequence, other in zip(response.sequences, expected.sequences, strict=True):
            np.testing.assert_array_equal(sequence.logprobs, other.logprobs)
    prompt, snapshot = fields["prompt"], fields["served"].snapshot
    for sequence in response.sequences:
        if fields["temperature"] == 0.7:
            continue  # forward's are never tempered
        text = np.concatenate([prompt, sequence.tokens])
        said = forward(snapshot, text)
        drawn = said[len(prompt) - 1 :]
        np.testing.assert_allclose(sequence.logprobs, drawn, rtol=1e-5, atol=1e-5)
        if fields["prompt_logprobs"]:
            np.testing.assert_allclose(
                response.prompt_logprobs_np[1:], said[: len(prompt) - 1], rtol=1e-5, atol=1e-5
            )


def forward(snapshot, text):
    """The logprobs that a trainer with these weights gives of the text's tokens after the first."""
    trainer = make_trainer(base(), rank=3)
    if snapshot is None:
        trainer.flat[:] = 0
    else:
        trainer.flat[:] = snapshot.flat
    datum = Datum(ModelInput.from_ints(text[:-1].tolist()), {"target_tokens": text[1:]})
    output = trainer.forward([datum], "cross_entropy", None)
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


TestSampler = SamplerAgainstEachRequestAlone.TestCase
TestSampler.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
