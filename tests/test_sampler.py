import weakref
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_row_bits import ROUNDING
from threadpoolctl import threadpool_info
from tiny_models import VOCAB, make_model, make_trainer, to_peft

from minitinker import APIError, BadRequestError, reference
from minitinker.engine import networks
from minitinker.engine import sampler as sampler_file
from minitinker.engine.cache import Arena
from minitinker.engine.request import SampleRequest, Served, Uniforms
from minitinker.engine.sampler import Sampler
from minitinker.engine.scoring import PromptScores
from minitinker.engine.sequence import Active, Sequence
from minitinker.engine.slots import Slots
from minitinker.engine.stopping import StopRule
from minitinker.engine.trainer import Snapshot
from minitinker.model.fused import sampled_states
from minitinker.model.packing import pack_for_cache
from minitinker.model.weights import load_base_model

NEVER = StopRule(frozenset(), (), str)
CONTEXT = 256


@pytest.fixture(scope="module")
def model():
    """The base as our BaseModel and as transformers has it."""
    folder, torch_model = make_model()
    return load_base_model(str(folder)), torch_model


@pytest.fixture(scope="module")
def snapshots(model):
    """Adapters of different rank on different linears, and the base model itself."""
    base, _ = model
    trainers = [
        make_trainer(base, rank=4, spread=0.08),
        make_trainer(base, rank=1, spread=0.08, seed=1, train_attn=False),
        make_trainer(base, rank=7, spread=0.08, seed=2, train_mlp=False, train_unembed=False),
        make_trainer(base, rank=4, spread=0.08, seed=3),
    ]
    return [*(trainer.snapshot() for trainer in trainers), None]


@pytest.fixture
def sampler(model):
    return Sampler(reference, model[0])


def request(prompt=(5, 6, 7), samples=1, snapshot=None, **fields):
    given_fields = {"served": Served(snapshot), "stop": NEVER, "max_tokens": 12, "seed": 1} | fields
    return SampleRequest(np.array(prompt, np.int64), samples, future=Future(), **given_fields)


def finish(sampler, *requests):
    """Step to the end."""
    while sampler.busy:
        sampler.step()
    return [one.future.result(timeout=0) for one in requests]


def answers(sampler, *requests):
    """Add them all and step to the end."""
    for one in requests:
        sampler.add(one)
    return finish(sampler, *requests)


def answer(sampler, *args, **fields):
    return answers(sampler, request(*args, **fields))[0]


def tokens(response):
    return [sequence.tokens for sequence in response.sequences]


def assert_same(actual, expected):
    """The same tokens; the same logprobs, to the bit where the reference's products have bits of their own."""
    assert tokens(actual) == tokens(expected)
    for one, other in zip(actual.sequences, expected.sequences, strict=True):
        assert one.stop_reason == other.stop_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=ROUNDING)
    assert (actual.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    if actual.prompt_logprobs:
        np.testing.assert_allclose(
            actual.prompt_logprobs_np, expected.prompt_logprobs_np, rtol=0, atol=ROUNDING
        )
    assert (actual.topk_prompt_logprobs is None) == (expected.topk_prompt_logprobs is None)
    for one, other in zip(
        actual.topk_prompt_logprobs or [], expected.topk_prompt_logprobs or [], strict=True
    ):
        assert (one is None) == (other is None)
        for (token, logprob), (other_token, other_logprob) in zip(one or [], other or [], strict=True):
            assert token == other_token
            assert logprob == pytest.approx(other_logprob, abs=1e-5)


def rows(sampler):
    """Rows of the sampler's arena."""
    return len(sampler._regions.arena.cache.keys[0])


# Random numbers


@given(seed=st.integers(-(2**63), 2**64 - 1), sample=st.integers(0, 2**32), position=st.integers(0, 200))
def test_the_uniform_of_a_position_is_philox_with_key_seed_and_sample_at_that_counter(seed, sample, position):
    uniforms = Uniforms(seed, sample)
    for _ in range(position):
        uniforms.next()
    philox = np.random.Philox(key=np.array([seed % 2**64, sample], np.uint64), counter=[position, 0, 0, 0])
    assert uniforms.next() == np.random.Generator(philox).random()


def test_tokens_are_what_the_documented_law_draws_from_transformers_logits(model, sampler):
    temperature, seed, prompt = 0.8, 11, [3, 200, 17]
    response = answer(sampler, prompt, samples=3, seed=seed, temperature=temperature, max_tokens=10)
    for j, sequence in enumerate(response.sequences):
        with torch.no_grad():
            logits = model[1](torch.tensor([prompt + sequence.tokens])).logits[0].double().numpy()
        for t, token in enumerate(sequence.tokens):
            z = logits[len(prompt) - 1 + t] / temperature
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            philox = np.random.Philox(key=[seed, j], counter=[t, 0, 0, 0])
            u = np.random.Generator(philox).random()
            assert token == int((p.cumsum() > u * p.sum()).argmax())
            assert sequence.logprobs[t] == pytest.approx(np.log(p[token]), abs=1e-4)


def test_a_seed_repeats_its_samples_and_others_differ(sampler):
    first, again, other = (answer(sampler, samples=3, seed=seed) for seed in (4, 4, 5))
    assert_same(again, first)
    assert all(a != b for a, b in zip(tokens(first), tokens(other), strict=True))
    assert len({tuple(sequence) for sequence in tokens(first)}) == 3


def test_sample_j_does_not_depend_on_how_many_are_drawn(sampler):
    few, many = answer(sampler, samples=2), answer(sampler, samples=9)
    assert tokens(many)[:2] == tokens(few)


def test_without_a_seed_no_two_requests_draw_the_same(sampler):
    first, second = answers(sampler, request(seed=None), request(seed=None))
    assert tokens(first) != tokens(second)


# Batches


@pytest.mark.parametrize(
    "copied", [0, networks.COPY_BYTES]
)  # a base model that is too large for it, or is not
def test_a_request_gets_the_same_alone_and_among_others_with_other_adapters(
    model, snapshots, copied, monkeypatch
):
    monkeypatch.setattr(reference, "HEAD_BYTES", 3 * 4 * VOCAB)  # three rows go through the head at once
    monkeypatch.setattr(networks, "COPY_BYTES", copied)
    sampler = Sampler(reference, model[0])
    rng = np.random.default_rng(0)

    asked = [
        {
            "prompt": rng.integers(0, VOCAB, 1 + 5 * i % 23),
            "samples": 1 + i % 3,
            "snapshot": snapshots[i % len(snapshots)],
            "seed": i,
            "max_tokens": 3 + 7 * i % 20,
            "temperature": [1.0, 0.0, 0.7][i % 3],
            "top_k": [-1, 5][i % 2],
            "top_p": [1.0, 0.9][i // 2 % 2],
            "prompt_logprobs": i % 2 == 0,
            "top_prompt_logprobs": i % 4,
        }
        for i in range(15)
    ]
    alone = [answer(Sampler(reference, model[0]), **fields) for fields in asked]
    requests = [request(**fields) for fields in asked]
    for one in requests[:8]:
        sampler.add(one)
    for one in requests[8:]:  # these join one by one, while others are halfway
        sampler.step()
        sampler.add(one)
    finish(sampler)
    for one, expected in zip(requests, alone, strict=True):
        assert_same(one.future.result(timeout=0), expected)


def test_the_adapters_of_a_batch_are_put_together_once_also_for_what_is_asked_about_prompts(
    sampler, snapshots, monkeypatch
):
    written, write = [], Slots._write
    monkeypatch.setattr(Slots, "_write", lambda self, *of: written.append(of) or write(self, *of))
    for i, snapshot in enumerate(snapshots[:3]):
        sampler.add(request(range(5 + i), samples=1, snapshot=snapshot, max_tokens=4, prompt_logprobs=True))
    finish(sampler)
    assert len(written) == 3 - snapshots[:3].count(None)


def test_samples_that_end_with_their_first_token_take_no_room_beside_the_prompts(model):
    sampler = Sampler(
        reference, model[0], cache_bytes=50 * Sampler(reference, model[0])._regions.arena.row_bytes
    )
    (found,) = answers(sampler, request(range(40), samples=5, max_tokens=1))
    (alone,) = answers(Sampler(reference, model[0]), request(range(40), samples=5, max_tokens=1))
    assert_same(found, alone)
    assert len(sampler._regions.arena.cache.keys[0]) <= 50
    most = StopRule(frozenset(range(VOCAB * 3 // 4)), (), None)
    (found,) = answers(sampler, request(range(9), samples=5, max_tokens=20, stop=most))
    (alone,) = answers(Sampler(reference, model[0]), request(range(9), samples=5, max_tokens=20, stop=most))
    assert_same(found, alone)
    assert {sequence.stop_reason for sequence in found.sequences} == {"stop"}
    assert {len(sequence.tokens) for sequence in found.sequences} > {1}


def test_what_an_adapter_holds_that_no_row_has_warns_nobody(model, snapshots):
    flat = np.full_like(snapshots[0].flat, 1e30)
    bad = Snapshot(snapshots[0].spec, flat)
    sampler = Sampler(reference, model[0])
    for of in (snapshots[0], bad, snapshots[1]):
        sampler.add(request(range(9), snapshot=of, max_tokens=3))
    with np.errstate(all="ignore"):
        finish(sampler)
    with np.errstate(all="raise"):
        found = answers(sampler, *(request(range(9), snapshot=of, max_tokens=3) for of in snapshots[:2]))
    for one, of in zip(found, snapshots, strict=False):
        assert_same(
            one, answers(Sampler(reference, model[0]), request(range(9), snapshot=of, max_tokens=3))[0]
        )


@pytest.mark.parametrize(
    ("limits", "used"),
    [
        ({"decoder.TOKENS": 1 << 60, "cores.SOME": 1 << 60, "cores.MANY": 1 << 60}, "one"),
        ({"decoder.TOKENS": 1 << 60, "cores.SOME": 0, "cores.MANY": 0}, "all"),
        ({"decoder.TOKENS": 1, "decoder.STATES": 0}, "one for each part"),
    ],
)
def test_a_seed_draws_the_same_however_a_step_uses_the_cores(model, snapshots, limits, used, monkeypatch):
    fields = [{"prompt": range(i, 20 + 3 * i), "seed": i, "snapshot": snapshots[i]} for i in range(5)]
    fields[4]["prompt_logprobs"] = True
    expected = answers(Sampler(reference, model[0]), *(request(**own) for own in fields))
    for name, value in limits.items():
        monkeypatch.setattr(f"minitinker.engine.{name}", value)
    sampler, requests, seen = Sampler(reference, model[0]), [request(**own) for own in fields], set()
    shared = reference.side_by_side

    def noted(function, parts):
        alone = all(pool["num_threads"] == 1 for pool in threadpool_info() if pool["user_api"] == "blas")
        seen.add("one for each part" if len(parts) > 1 else "one" if alone else "all")
        return shared(function, parts)

    monkeypatch.setattr(reference, "side_by_side", noted)
    for one, other in zip(answers(sampler, *requests), expected, strict=True):
        assert_same(one, other)
    if reference.width() > 1:
        assert used in seen


def test_a_merged_network_is_the_base_with_the_adapter_and_makes_room_for_the_next(model, snapshots):
    nets = networks.Networks(reference, model[0])
    batch = pack_for_cache([[9, 8, 7, 100]], np.array([0]), np.array([0]))
    arena = Arena(reference, model[0].config)
    arena.allocate(4)
    previous = None
    for snapshot in snapshots:
        alone, owners = ([snapshot], np.zeros(4, np.int64)) if snapshot else ([], np.full(4, -1))
        merged, rows = nets.of(alone, owners, exact=False)
        assert rows is None
        assert snapshot is None or previous is None or previous() is None
        assert snapshot is None or nets.of(alone, owners[:1], exact=False)[0] is merged
        beside, rows = nets.of(alone, owners, exact=True)
        expected = sampled_states(replace(beside, adapter=rows), batch, arena.cache)
        np.testing.assert_allclose(sampled_states(merged, batch, arena.cache), expected, atol=1e-4)
        previous = weakref.ref(merged) if snapshot else previous
        del merged
    for together, owners in ((snapshots[1:3], [0, 1]), (snapshots[1:2], [-1, 0])):
        network, rows = nets.of(together, np.array(owners), exact=False)
        assert set(network.lora)
        assert [r < 0 for r in rows] == [o < 0 for o in owners]


def test_newer_weights_find_the_room_of_the_older_ones(sampler, snapshots, monkeypatch):
    asked = request(snapshot=snapshots[0], seed=None)
    sampler.add(asked)
    for _ in range(3):
        sampler.step()
    older, laid_out = weakref.ref(sampler._decoder._batch.network), networks.Networks._laid_out
    alive = []

    def noted(nets, weights):
        alive.append(older() is not None)
        return laid_out(nets, weights)

    monkeypatch.setattr(networks.Networks, "_laid_out", noted)
    asked.served.snapshot = snapshots[3]
    finish(sampler, asked)
    assert alive == [False]


@pytest.mark.parametrize("seed", [None, 1])
def test_an_idle_sampler_keeps_no_adapter_alive(model, sampler, seed):
    snapshot = make_trainer(model[0], rank=2).snapshot()
    gone = weakref.ref(snapshot)
    answer(sampler, snapshot=snapshot, seed=seed)
    del snapshot
    assert gone() is None


@pytest.mark.parametrize("which", range(5))
def test_greedy_tokens_equal_those_of_transformers_with_peft(model, sampler, snapshots, which):
    _, torch_model = model
    snapshot, prompt = snapshots[which], [9, 8, 7, 100]
    if snapshot is not None:
        torch_model = to_peft(torch_model, snapshot.spec, snapshot.flat)
    generated = torch_model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=None,
        pad_token_id=0,
    )
    response = answer(sampler, prompt, snapshot=snapshot, temperature=0.0, max_tokens=20)
    assert tokens(response) == [generated[0, len(prompt) :].tolist()]


def test_a_sequence_may_outgrow_its_region_beside_others(model, sampler):
    short = [request((i,), max_tokens=10, seed=i) for i in range(3)]
    long = request((1, 2), max_tokens=CONTEXT - 2, seed=9, samples=2)
    answers(sampler, *short, long)
    whole = tokens(long.future.result(timeout=0))
    for j in range(2):
        with torch.no_grad():
            logits = model[1](torch.tensor([[1, 2, *whole[j]]])).logits[0].double()
        expected = torch.log_softmax(logits, -1)[1:-1].gather(-1, torch.tensor(whole[j])[:, None])[:, 0]
        actual = long.future.result(timeout=0).sequences[j].logprobs
        np.testing.assert_allclose(actual, expected.numpy(), atol=1e-4)


# Ends


def test_a_sample_ends_with_what_stopped_it_or_at_max_tokens(sampler):
    free = answer(sampler, max_tokens=12).sequences[0]
    assert free.stop_reason == "length"
    stop = StopRule(frozenset({free.tokens[4]}), (), str)
    at = free.tokens.index(free.tokens[4])
    stopped = answer(sampler, max_tokens=12, stop=stop).sequences[0]
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free.tokens[: at + 1]
    assert stopped.logprobs == pytest.approx(free.logprobs[: at + 1], abs=1e-5)
    just = answer(sampler, max_tokens=at + 1, stop=stop).sequences[0]
    assert just.stop_reason == "stop"


def test_each_sequence_has_an_id_of_its_own(sampler):
    responses = answers(sampler, request(samples=3), request(samples=2))
    ids = [sequence.sequence_id for response in responses for sequence in response.sequences]
    assert len(set(ids)) == 5


def test_a_request_of_no_samples_is_about_its_prompt_alone(sampler):
    asked = {"samples": 0, "max_tokens": 0, "prompt_logprobs": True, "top_prompt_logprobs": 2}
    response = answer(sampler, (1, 2, 3), **asked)
    assert response.sequences == []
    assert len(response.prompt_logprobs) == len(response.topk_prompt_logprobs) == 3


# The cache


def small(base, tokens):
    """A sampler whose arena holds so many tokens."""
    return Sampler(reference, base, cache_bytes=tokens * Sampler(reference, base)._regions.arena.row_bytes)


def test_what_finds_no_room_waits_and_comes_out_the_same(model, snapshots):
    asked = [
        {
            "prompt": range(i, i + 20),
            "samples": 1 + i % 4,
            "seed": i,
            "max_tokens": 30,
            "snapshot": snapshots[i % 5],
            "prompt_logprobs": i % 2 == 0,
        }
        for i in range(8)
    ]
    alone = [answer(Sampler(reference, model[0]), **fields) for fields in asked]
    tight = small(model[0], 110)  # two whole samples
    for response, expected in zip(
        answers(tight, *(request(**fields) for fields in asked)), alone, strict=True
    ):
        assert_same(response, expected)
    assert rows(tight) <= 110


@pytest.mark.parametrize("tokens", [50, 70])
def test_samples_that_wait_for_room_come_before_later_requests(model, tokens):
    tight = small(model[0], tokens)  # the later one waits, or runs beside the first sample
    first, later = request(range(40), samples=3, max_tokens=4), request(max_tokens=20)
    for one in (first, later):
        tight.add(one)
    lines = []
    while not first.future.done():
        tight.step()
        lines += [[s.age for s in line] for line in (tight._running, tight._waiting)]
    assert not later.future.done()
    assert max(len(line) for line in lines) > 1
    assert lines == [sorted(line) for line in lines]


def test_a_sample_that_can_never_fit_is_told_so_and_others_go_on(model):
    tight = small(model[0], 100)
    longer, fits, too_long = request(range(101)), request(), request(max_tokens=200)
    for one in (longer, fits, too_long):
        tight.add(one)
    while tight.busy:
        tight.step()
    for one in (longer, too_long):
        with pytest.raises(BadRequestError, match=r"does not fit into the cache .* holds 100 tokens"):
            one.future.result(timeout=0)
    assert_same(fits.future.result(timeout=0), answer(Sampler(reference, model[0])))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks_beside_others_that_decode_gives_the_same(
    model, sampler, snapshots, chunk, monkeypatch
):
    long = {"prompt": range(150), "samples": 2, "snapshot": snapshots[0], "prompt_logprobs": True}
    long |= {"top_prompt_logprobs": 2, "last_prompt_tokens": 40}
    expected = answer(Sampler(reference, model[0]), **long)
    monkeypatch.setattr(reference, "CHUNK_TOKENS", chunk)
    decoding, late = request(max_tokens=200), request(**long)
    sampler.add(decoding)
    sampler.step()
    sampler.add(late)
    steps = 0
    while late.future.done() is False:
        before = len(sampler._running[0].tokens)
        sampler.step()
        steps += 1
        if not decoding.future.done():
            assert len(sampler._running[0].tokens) == before + 1  # who decodes is not held up
    assert steps >= 150 // chunk
    assert_same(late.future.result(timeout=0), expected)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, (0, 0, 1)),
        ({"prompt_logprobs": True, "last_prompt_tokens": 3}, (0, 2, 2)),
        ({"samples": 0, "top_prompt_logprobs": 1}, (4, 4, 2)),
        ({"prompt_alternatives": 1}, (4, 4, 2)),
    ],
)
def test_the_last_layer_computes_only_the_states_that_are_needed(model, fields, needed):
    ops, computed = SimpleNamespace(**vars(reference)), []
    ops.MICRO_BATCH_TOKENS = 4
    ops.swiglu_forward = lambda gate, up: computed.append(len(gate)) or reference.swiglu_forward(gate, up)
    sampler = Sampler(ops, model[0])
    sampler.add(request(range(10), max_tokens=1, **fields))
    for fed, wanted in zip((4, 4, 2), needed, strict=True):
        computed.clear()
        sampler.step()
        assert sum(computed) == (model[0].config.num_hidden_layers - 1) * fed + wanted
    assert not sampler.busy


def test_a_prompt_that_was_scored_is_not_when_a_sample_begins_anew():
    active = Active(request(range(10), prompt_alternatives=1), 1, 0)
    sequence = Sequence(active, 1, Uniforms(1, 1))
    assert (sequence.wanted(4), sequence.wanted(10)) == (4, 10)
    active.scores = PromptScores()
    assert (sequence.wanted(4), sequence.wanted(10)) == (0, 1)


def counting(base):
    """A sampler, and a list of how many tokens go through at once, which grows with every step."""
    fed = []
    ops = SimpleNamespace(**vars(reference))
    ops.embedding = lambda tokens, table: fed.append(len(tokens)) or reference.embedding(tokens, table)
    return Sampler(ops, base), fed


def test_a_prompt_that_extends_an_earlier_text_computes_the_rest_alone(model, snapshots):
    sampler, fed = counting(model[0])
    first = answer(sampler, range(40), snapshot=snapshots[0])
    longer = [*range(40), *tokens(first)[0], 7, 8, 9]
    fresh = answer(Sampler(reference, model[0]), longer, snapshot=snapshots[0])
    fed.clear()
    assert_same(answer(sampler, longer, snapshot=snapshots[0]), fresh)
    assert fed[0] == 4  # the last token that was drawn, and three new ones
    fed.clear()
    answer(sampler, longer, snapshot=snapshots[3])
    assert fed[0] == len(longer)  # other weights, other keys and values


def test_a_seed_takes_nothing_over_from_a_sample_that_had_none(model, snapshots):
    sampler, fed = counting(model[0])
    first = answer(sampler, range(40), snapshot=snapshots[0], seed=None)
    longer = [*range(40), *tokens(first)[0], 7]
    fed.clear()
    again = answer(sampler, longer, snapshot=snapshots[0])
    assert fed[0] == len(longer)
    assert_same(again, answer(Sampler(reference, model[0]), longer, snapshot=snapshots[0]))


def test_nothing_is_taken_over_from_a_sample_whose_weights_changed_on_the_way(model, snapshots):
    sampler, fed = counting(model[0])
    inflight = request(range(40), served=Served(snapshots[0]))
    sampler.add(inflight)
    sampler.step()
    inflight.served.snapshot = snapshots[3]
    longer = [*range(40), *tokens(finish(sampler, inflight)[0])[0], 7]
    for snapshot in (snapshots[0], snapshots[3]):
        fed.clear()
        answer(sampler, longer, snapshot=snapshot)
        assert fed[0] == len(longer)


def test_a_prompt_that_gives_way_halfway_is_scored_as_if_it_had_not(model, snapshots, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(sampler_file, "MORE_ROWS", 2)
    scored = {"prompt": range(60), "max_tokens": 1, "prompt_alternatives": 2, "snapshot": snapshots[0]}
    expected = answer(Sampler(reference, model[0]), **scored)
    tight = small(model[0], 70)
    growing, late = request(max_tokens=50), request(**scored)
    tight.add(growing)
    tight.step()
    tight.add(late)
    tight.step()
    assert len(tight._running) == 2
    while len(tight._running) == 2:
        tight.step()
    assert not growing.future.done()
    actual = finish(tight, late)[0]
    assert_same(actual, expected)
    logprobs = [response.prompt_alt_tokens.logprobs.to_numpy() for response in (actual, expected)]
    np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-5)


# What goes wrong


def test_a_cancelled_request_gives_up_its_place_and_the_others_go_on(sampler):
    expected = answer(sampler, seed=3)
    sizes = set()
    for _ in range(5):
        kept, dropped, waiting = request(seed=3), request(range(200), samples=4, max_tokens=50), request()
        sampler.add(kept)
        sampler.add(dropped)
        sampler.step()
        sampler.step()
        sampler.add(waiting)
        assert dropped.future.cancel()
        assert waiting.future.cancel()
        sampler.step()
        assert not wait([dropped.future, waiting.future], timeout=0).not_done
        assert_same(finish(sampler, kept)[0], expected)
        sizes.add(rows(sampler))
    assert len(sizes) == 1


class CancelledAtTheSecondLook(Future):
    """One that is cancelled by another thread just after `done` was asked for the first time."""

    def done(self):
        before = super().done()
        self.cancel()
        return before


def test_a_request_cancelled_while_its_samples_are_looked_at_leaves_nothing_behind(sampler):
    asked = request(samples=3)
    sampler.add(asked)
    sampler.step()
    asked.future.__class__ = CancelledAtTheSecondLook
    sampler.step()
    sampler.step()
    assert not sampler.busy
    assert not wait([asked.future], timeout=0).not_done
    assert sampler._regions._used == []


def test_a_cancelled_request_gives_its_place_up_whatever_its_callbacks_raise(sampler):
    def leave(_):
        raise SystemExit

    asked = request()
    asked.future.add_done_callback(leave)
    sampler.add(asked)
    sampler.step()
    with pytest.raises(SystemExit):
        asked.future.cancel()
    sampler.step()
    assert not sampler.busy


def test_who_stood_behind_a_cancelled_request_without_room_begins_at_once(model):
    tight = small(model[0], 60)
    running, first, second = request(range(20)), request(range(20, 40)), request()
    for one in (running, first, second):
        tight.add(one)
    tight.step()
    tight.step()
    assert [s.request for s in tight._running] == [
        running
    ]  # the first has no room, and the second its turn after
    first.future.cancel()
    tight.step()
    assert [s.request for s in tight._running] == [running, second]


def test_cancelling_everything_gives_matrix_products_their_cores_back(model):
    inside = []

    @contextmanager
    def on_one_core():
        inside.append(1)
        yield
        inside.pop()

    sampler = Sampler(SimpleNamespace(**vars(reference) | {"on_one_core": on_one_core}), model[0])
    sampler.add(request())
    sampler.step()
    assert inside
    sampler.cancel_all()
    assert not inside


def test_cancelling_everything_leaves_nothing_to_do(sampler):
    running, waiting = request(samples=2), request()
    sampler.add(running)
    sampler.step()
    sampler.add(waiting)
    sampler.cancel_all()
    assert not sampler.busy
    assert not wait([running.future, waiting.future], timeout=0).not_done
    assert running.future.cancelled()
    assert waiting.future.cancelled()


def test_an_error_in_a_step_answers_everyone_in_it_and_the_sampler_lives_on(model):
    ops = SimpleNamespace(**vars(reference))
    sampler = Sampler(ops, model[0])
    expected = answer(sampler, samples=2)
    running, cancelled, new = request(max_tokens=50, samples=2), request(), request()
    for one in (running, cancelled):
        sampler.add(one)
    sampler.step()
    sampler.add(new)
    cancelled.future.cancel()
    ops.sample = lambda *_: 1 / 0
    sampler.step()
    for one in (running, new):
        with pytest.raises(ZeroDivisionError):
            one.future.result(timeout=0)
    assert not sampler.busy
    ops.sample = reference.sample
    assert_same(answer(sampler, samples=2), expected)


def test_an_error_before_the_first_step_of_a_request_is_its_answer(sampler, monkeypatch):
    def no_room(rows, most_rows):
        raise RuntimeError(f"no room for {rows} rows")

    monkeypatch.setattr(sampler._regions.arena, "allocate", no_room)
    refused = request()
    sampler.add(refused)
    sampler.step()
    with pytest.raises(RuntimeError, match="no room for 15 rows"):
        refused.future.result(timeout=0)
    assert len(tokens(answer(sampler))[0]) == 12


def test_memory_that_runs_out_is_told_with_what_would_have_fitted_and_the_sampler_goes_on(model):
    def no_room(*inputs):
        raise MemoryError

    ops = SimpleNamespace(**vars(reference))
    sampler = Sampler(ops, model[0])
    ops.sample, ops.free_memory = no_room, lambda: 10**9
    refused = request(samples=3)
    sampler.add(refused)
    sampler.step()
    ops.sample = reference.sample
    with pytest.raises(
        APIError, match=r"\d samples at once did not fit, where 1.0 GB are free; about \d+ tokens"
    ):
        refused.future.result(timeout=0)
    assert len(tokens(answer(sampler))[0]) == 12


def test_a_step_that_fails_is_told_only_to_those_in_it(model):
    ops = SimpleNamespace(**vars(reference))
    sampler = Sampler(ops, model[0])
    ops.MICRO_BATCH_TOKENS = 3  # one of these prompts at a time
    first, second = request(), request()
    for one in (first, second):
        sampler.add(one)
    ops.sample = lambda *_: 1 / 0
    sampler.step()
    with pytest.raises(ZeroDivisionError):
        first.future.result(timeout=0)
    assert not second.future.done()
    ops.sample = reference.sample
    while sampler.busy:
        sampler.step()
    assert len(second.future.result(timeout=0).sequences[0].tokens) == 12


def test_who_waited_for_room_begins_after_a_step_that_failed(model):
    ops = SimpleNamespace(**vars(reference))
    sampler = Sampler(ops, model[0], cache_bytes=40 * Sampler(reference, model[0])._regions.arena.row_bytes)
    failed, waiting = request(range(20)), request(range(20, 40))
    for one in (failed, waiting):
        sampler.add(one)
    sampler.step()
    ops.sample = lambda *_: 1 / 0
    sampler.step()
    assert failed.future.done()
    ops.sample = reference.sample
    for _ in range(12):
        sampler.step()
    assert waiting.future.done()


def test_a_sampler_with_nothing_to_do_does_nothing(sampler):
    assert not sampler.busy
    sampler.step()
    assert not sampler.busy
