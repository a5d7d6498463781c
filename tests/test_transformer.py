"""model/transformer.py against transformers and PEFT, and the laws of packed sequences and of the cache."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCAB, from_peft, make_model, relative_errors, to_peft

from minitinker import reference
from minitinker.model.adapter import adapter_spec, views
from minitinker.model.packing import pack, pack_for_cache
from minitinker.model.transformer import (
    KVCache,
    Network,
    head_chunks,
    hidden_states,
    hidden_states_backward,
    logits_backward,
    logits_forward,
    target_logprobs,
    top_logprobs,
)
from minitinker.model.weights import load_base_model

FIXED = settings(derandomize=True, deadline=None, max_examples=15)
LENGTHS = (1, 7, 150, 33, 20)  # 150 is over a block of queries
LOGPROB = 1e-4
GRADIENT = 1e-4  # relative, per A and B

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen3", {"rms_norm_eps": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
]
every_variant = pytest.mark.parametrize(
    ("family", "overrides"), VARIANTS, ids=["-".join([family, *more]) for family, more in VARIANTS]
)


@pytest.fixture(scope="module")
def base():
    return load_base_model(str(make_model("qwen3-tied")[0]))


def network(base, spec=None, flat=None):
    if spec is None:
        return Network(reference, base.config, base.placed(reference))
    scale = np.array([spec.scale], np.float32)
    return Network(reference, base.config, base.placed(reference), views(spec, flat), scale)


def random_adapter(base, seed=0, rank=8, flags=(True, True, True)):
    spec = adapter_spec(base.config, rank, *flags)
    return spec, 0.1 * np.random.default_rng(seed).standard_normal(spec.size, np.float32)


def draw_sequences(lengths, seed=0, vocab=VOCAB):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n) for n in lengths]


def torch_logits(model, tokens):
    return model(input_ids=torch.from_numpy(tokens)[None]).logits[0]


def close(actual, expected, tolerance=1e-5):
    """Equal but for rounding in float32, relative to the largest number."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=0)


@every_variant
def test_logprobs_are_those_of_transformers(family, overrides):
    folder, model = make_model(family, **overrides)
    net, sequences = network(load_base_model(str(folder))), draw_sequences(LENGTHS)
    targets = draw_sequences(LENGTHS, seed=1)
    h, _ = hidden_states(net, pack(sequences))
    ours = np.split(target_logprobs(net, h, np.concatenate(targets)), np.cumsum(LENGTHS)[:-1])
    with torch.no_grad():
        for tokens, wanted, lp in zip(sequences, targets, ours, strict=True):
            everything = torch.log_softmax(torch_logits(model, tokens), -1)
            theirs = everything.gather(-1, torch.from_numpy(wanted)[:, None])[:, 0]
            np.testing.assert_allclose(lp, theirs.numpy(), rtol=0, atol=LOGPROB)


@every_variant
def test_logprobs_and_gradients_with_an_adapter_are_those_of_peft(family, overrides):
    folder, model = make_model(family, **overrides)
    base = load_base_model(str(folder))
    spec, flat = random_adapter(base)
    peft, net, sequences = to_peft(model, spec, flat), network(base, spec, flat), draw_sequences(LENGTHS)
    targets = draw_sequences(LENGTHS, seed=1)
    weights = np.random.default_rng(2).standard_normal(sum(LENGTHS), np.float32)
    ends = np.cumsum(LENGTHS)[:-1]

    ours, grad = logprobs_and_gradient(net, spec, sequences, np.concatenate(targets), weights)
    for tokens, wanted, lp, w in zip(
        sequences, targets, np.split(ours, ends), np.split(weights, ends), strict=True
    ):
        everything = torch.log_softmax(torch_logits(peft, tokens), -1)
        theirs = everything.gather(-1, torch.from_numpy(wanted)[:, None])[:, 0]
        np.testing.assert_allclose(lp, theirs.detach().numpy(), rtol=0, atol=LOGPROB)
        (theirs * torch.from_numpy(w)).sum().backward()
    errors = relative_errors(grad, from_peft(peft, spec, gradients=True), spec)
    assert max(errors.values()) <= GRADIENT, errors


def logprobs_and_gradient(net, spec, sequences, targets, weights):
    """Logprobs: (tokens,), and the gradient of sum(weights * logprobs): (spec.size,)."""
    grad = np.zeros(spec.size, np.float32)
    grads = views(spec, grad)
    h, saved = hidden_states(net, pack(sequences), keep=True)
    logits, saved_head = logits_forward(net, h)
    lp, saved_lp = reference.logprob_forward(logits, targets[:, None])
    dh = logits_backward(net, reference.logprob_backward(weights[:, None], saved_lp), saved_head, grads)
    hidden_states_backward(net, dh, saved, grads)
    return lp[:, 0], grad


@pytest.mark.parametrize(
    "flags",
    [(True, False, False), (False, True, False), (False, False, True)],
    ids=["attn", "mlp", "unembed"],
)
def test_the_gradient_of_a_part_is_the_same_whatever_else_is_adapted(base, flags):
    whole, flat = random_adapter(base)
    part = adapter_spec(base.config, 8, *flags)
    alone = np.zeros(part.size, np.float32)
    for name, pair in views(whole, flat).items():
        for x, y in zip(pair, views(part, alone).get(name, ()), strict=False):
            y[...] = x
        if name not in part.shapes:  # with B zero the rest of the adapter does nothing
            pair[1][...] = 0
    sequences, targets = draw_sequences([9, 4]), np.concatenate(draw_sequences([9, 4], seed=1))
    weights = np.ones(13, np.float32)
    lp, grad = logprobs_and_gradient(network(base, whole, flat), whole, sequences, targets, weights)
    part_lp, part_grad = logprobs_and_gradient(network(base, part, alone), part, sequences, targets, weights)
    close(part_lp, lp)
    for name, pair in views(part, part_grad).items():
        for x, y in zip(pair, views(whole, grad)[name], strict=True):
            close(x, y, 1e-4)


def test_a_new_adapter_changes_nothing(base):
    spec, flat = random_adapter(base)
    for _, b in views(spec, flat).values():
        b[...] = 0
    batch = pack(draw_sequences([5, 9]))
    close(hidden_states(network(base, spec, flat), batch)[0], hidden_states(network(base), batch)[0], 1e-6)


@FIXED
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_packed_sequences_do_not_see_each_other(base, lengths, seed):
    net, sequences = network(base, *random_adapter(base)), draw_sequences(lengths, seed)
    changed = [sequences[0], *draw_sequences(lengths[1:], seed + 100)]
    first = slice(0, lengths[0])
    before, after = (hidden_states(net, pack(x))[0] for x in (sequences, changed))
    np.testing.assert_array_equal(before[first], after[first])
    close(hidden_states(net, pack(sequences[:1]))[0], before[first])


@FIXED
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_gradient_of_packed_sequences_is_the_sum_of_their_own(base, lengths, seed):
    spec, flat = random_adapter(base)
    net, sequences = network(base, spec, flat), draw_sequences(lengths, seed)
    targets = draw_sequences(lengths, seed + 100)
    weights = [np.ones(n, np.float32) for n in lengths]
    _, together = logprobs_and_gradient(
        net, spec, sequences, np.concatenate(targets), np.concatenate(weights)
    )
    apart = sum(
        logprobs_and_gradient(net, spec, [x], y, w)[1]
        for x, y, w in zip(sequences, targets, weights, strict=True)
    )
    assert max(relative_errors(apart, together, spec).values()) <= GRADIENT


@FIXED
@given(n=st.integers(2, 140), at=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99))
def test_a_token_does_not_see_those_after_it(base, n, at, seed):
    net, (tokens,) = network(base), draw_sequences([n], seed)
    seen = 1 + int(at * (n - 1))
    changed = np.concatenate([tokens[:seen], draw_sequences([n - seen], seed + 100)[0]])
    before, after = (hidden_states(net, pack([x]))[0][:seen] for x in (tokens, changed))
    np.testing.assert_array_equal(before, after)


def test_a_token_sees_all_those_before_it(base):
    net, (tokens,) = network(base), draw_sequences([12])
    before = hidden_states(net, pack([tokens]))[0]
    tokens[0] += 1
    assert (np.abs(hidden_states(net, pack([tokens]))[0] - before).max(-1) > 1e-4).all()


@FIXED
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    step=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_going_on_from_a_cache_equals_going_through_at_once(base, lengths, step, seed):
    net, sequences = network(base, *random_adapter(base)), draw_sequences(lengths, seed)
    whole = np.split(hidden_states(net, pack(sequences))[0], np.cumsum(lengths)[:-1])
    shape = (40 * len(lengths), base.config.num_key_value_heads, base.config.head_dim)
    layers = range(base.config.num_hidden_layers)
    cache = KVCache(*([np.full(shape, np.nan, np.float32) for _ in layers] for _ in "kv"))
    for start in range(0, max(lengths), step):  # of each sequence that is so long, its next `step` tokens
        rows = [i for i, n in enumerate(lengths) if n > start]
        parts = [sequences[i][start : start + step] for i in rows]
        done, regions = np.full(len(rows), start), 40 * np.array(rows)
        h, _ = hidden_states(net, pack_for_cache(parts, done, regions), cache)
        for i, found in zip(rows, np.split(h, np.cumsum([len(x) for x in parts])[:-1]), strict=True):
            close(found, whole[i][start : start + step])


@FIXED
@given(adapters=st.lists(st.integers(-1, 1), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_rows_of_many_adapters_go_through_together_as_they_would_alone(base, adapters, seed):
    lengths = [3 + i for i in range(len(adapters))]
    sequences = draw_sequences(lengths, seed)
    pairs = [random_adapter(base, i) for i in range(2)]
    spec = pairs[0][0]
    stacks = [views(spec, flat) for _, flat in pairs]
    lora = {
        name: tuple(np.concatenate([stack[name][i] for stack in stacks]) for i in range(2))
        for name in spec.shapes
    }
    scale = np.full(2, spec.scale, np.float32)
    net = Network(reference, base.config, base.placed(reference), lora, scale, np.repeat(adapters, lengths))
    together = hidden_states(net, pack(sequences))[0]
    logits = logits_forward(net, together)[0]
    for i, rows in enumerate(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])):
        alone = network(base) if adapters[i] < 0 else network(base, *pairs[adapters[i]])
        h = hidden_states(alone, pack([sequences[i]]))[0]
        close(together[rows], h)
        close(logits[rows], logits_forward(alone, h)[0])


def test_keeping_what_the_backward_needs_changes_no_bit(base):
    net, batch = network(base, *random_adapter(base)), pack(draw_sequences([9, 4]))
    kept, saved = hidden_states(net, batch, keep=True)
    dropped, (layers, *_) = hidden_states(net, batch)
    np.testing.assert_array_equal(kept, dropped)
    assert len(saved[0]) == base.config.num_hidden_layers
    assert not layers


def test_forming_activations_again_changes_no_bit_of_the_gradients(base):
    spec, flat = random_adapter(base)
    net, batch = network(base, spec, flat), pack(draw_sequences([9, 4]))
    gradients = []
    for recompute in (False, True):
        h, saved = hidden_states(net, batch, keep=True, recompute=recompute)
        grad = np.zeros(spec.size, np.float32)
        hidden_states_backward(net, np.cos(h), saved, views(spec, grad))
        gradients.append(grad)
    np.testing.assert_array_equal(*gradients)
    assert gradients[0].any()


def test_only_a_layers_input_is_kept_where_its_activations_are_formed_again(base):
    _, (layers, *_) = hidden_states(network(base), pack(draw_sequences([9])), keep=True, recompute=True)
    assert [x.shape for x in layers] == [(9, base.config.hidden_size)] * base.config.num_hidden_layers


def test_the_base_weights_are_never_written_to(base):  # they are read-only, so a write would raise
    before = {name: x.tobytes() for name, x in base.weights.items()}
    spec, flat = random_adapter(base)
    sequences, targets = draw_sequences([9]), draw_sequences([9], 1)[0]
    logprobs_and_gradient(network(base, spec, flat), spec, sequences, targets, np.ones(9, np.float32))
    assert {name: x.tobytes() for name, x in base.weights.items()} == before


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_size_of_the_heads_chunks_changes_nothing(base, monkeypatch, chunk):
    net = network(base)
    h = hidden_states(net, pack(draw_sequences([10, 4])))[0]
    targets = draw_sequences([14], 1)[0]
    before = target_logprobs(net, h, targets), top_logprobs(net, h, 3)
    monkeypatch.setattr(reference, "HEAD_BYTES", chunk * 4 * VOCAB)
    assert [len(range(14)[rows]) for rows in head_chunks(net, 14)][:-1] == [chunk] * (-(-14 // chunk) - 1)
    close(target_logprobs(net, h, targets), before[0], 1e-6)
    for ours, theirs in zip(top_logprobs(net, h, 3), before[1], strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]


@FIXED
@given(tokens=st.integers(0, 50), size=st.integers(1, 20 * 4 * VOCAB))
def test_the_heads_chunks_cover_every_row_once(base, tokens, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "HEAD_BYTES", size)
        chunks = list(head_chunks(network(base), tokens))
    assert [row for rows in chunks for row in range(tokens)[rows]] == list(range(tokens))
    for rows in chunks:
        assert rows.stop > rows.start
        assert (rows.stop - rows.start) * 4 * VOCAB <= max(size, 4 * VOCAB)


@FIXED
@given(k=st.integers(1, 20), n=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_likeliest_tokens_are_those_of_torch(base, k, n, seed):
    net = network(base)
    h = hidden_states(net, pack(draw_sequences([n], seed)))[0]
    expected = torch.log_softmax(torch.from_numpy(logits_forward(net, h)[0]), -1).topk(k)
    found = top_logprobs(net, h, k)
    assert [[token for token, _ in row] for row in found] == expected.indices.tolist()
    np.testing.assert_allclose([[lp for _, lp in row] for row in found], expected.values, rtol=0, atol=1e-5)
