import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import COMPILED, TOLERANCE, check_close, dtypes, every_backend, law, seeds

from minitinker import kernels

pytestmark = every_backend

vocabs = st.integers(1, 12)
temperatures = st.sampled_from([0.0, 0.3, 1.0, 2.5])
limits = st.integers(-1, 14)  # top_k: none, some, all and more than there are
masses = st.sampled_from([0.01, 0.3, 0.5, 0.75, 0.9, 1.0])  # top_p
rows_of_settings = st.lists(st.tuples(temperatures, limits, masses), min_size=1, max_size=8)

LAST_UNIFORM = math.nextafter(1, 0)


def draw(ops, logits, uniforms, temperature=1.0, top_k=-1, top_p=1.0):
    """The op, with each setting for all rows or one a row: (tokens, logprobs)."""
    rows = len(logits)
    settings = [
        np.broadcast_to(np.asarray(x, dtype), rows).copy()
        for x, dtype in [(temperature, np.float64), (top_k, np.int64), (top_p, np.float64)]
    ]
    answer = ops.sample(*(ops.array(x) for x in [logits, np.asarray(uniforms, np.float64), *settings]))
    return tuple(ops.to_numpy(x) for x in answer)


def grid(ops):
    """Uniforms at equal distances: 1000, or as many as do not take the interpreter of the kernels minutes."""
    points = 25 if ops is kernels and not COMPILED else 1000
    return (np.arange(points) + 0.5) / points


def draw_rows(seed, settings, vocab, dtype=np.float64):
    """logits, uniforms, temperature, top_k, top_p: half of the rows have small whole logits, so many are equal."""
    rng = np.random.default_rng(seed)
    rows = len(settings)
    logits = 2 * rng.standard_normal((rows, vocab))
    logits = np.where(rng.random((rows, 1)) < 0.5, np.round(logits), logits).astype(dtype)
    return [logits, rng.random(rows), *(np.array(x) for x in zip(*settings, strict=True))]


def plain_sample(logits, uniform, temperature, top_k, top_p):
    """The definition, token by token: (token, what was kept)."""
    ids = range(len(logits))
    if temperature == 0:
        return max(ids, key=lambda i: (logits[i], -i)), None
    p = [math.exp((z - max(logits)) / temperature) for z in logits]
    kept = set(ids)
    if top_k >= 1:
        kth = sorted(p, reverse=True)[min(top_k, len(p)) - 1]
        kept = {i for i in ids if p[i] >= kth}
    if top_p < 1:
        total, reached = sum(p[i] for i in kept), 0.0
        for last in sorted((p[i] for i in kept), reverse=True):
            reached += last
            if reached >= top_p * total:
                break
        kept = {i for i in kept if p[i] >= last}
    total, running = sum(p[i] for i in kept), 0.0
    for i in sorted(kept):
        running += p[i]
        if running > uniform * total:
            break
    return i, kept


@law(15, settings=rows_of_settings, vocab=vocabs, dtype=dtypes, seed=seeds)
def test_each_row_draws_what_the_definition_says(ops, settings, vocab, dtype, seed):
    inputs = draw_rows(seed, settings, vocab)
    tokens, _ = draw(ops, *inputs)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [plain_sample(*row)[0] for row in zip(*inputs, strict=True)]


@law(15, settings=rows_of_settings, vocab=vocabs, dtype=dtypes, seed=seeds)
def test_the_reported_logprob_is_of_the_tempered_distribution_before_the_cut(
    ops, settings, vocab, dtype, seed
):
    logits, _, temperature, *_ = inputs = draw_rows(seed, settings, vocab, dtype)
    tokens, logprobs = draw(ops, *inputs)
    untempered_if_greedy = np.where(temperature == 0, 1, temperature)
    tempered = torch.tensor(logits.astype(np.float64) / untempered_if_greedy[:, None])
    expected = torch.log_softmax(tempered, -1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].numpy()
    assert logprobs.dtype == dtype
    largest = np.abs(tempered.numpy()).max(-1)
    assert (np.abs(logprobs - expected) <= TOLERANCE[logprobs.dtype] * np.maximum(largest, 1)).all()


@law(15, vocab=st.integers(1, 30), temperature=st.sampled_from([0.5, 1.0, 2.0]), seed=seeds)
def test_over_a_grid_of_uniforms_frequencies_are_the_probabilities(ops, vocab, temperature, seed):
    logits = np.random.default_rng(seed).standard_normal(vocab)
    uniforms = grid(ops)
    points = len(uniforms)
    tokens, _ = draw(ops, np.tile(logits, (points, 1)), uniforms, temperature)
    counts = np.bincount(tokens, minlength=vocab)
    p = torch.softmax(torch.tensor(logits) / temperature, -1).numpy()
    assert (np.abs(counts - points * p) <= 1).all()  # an interval of that length holds that many points
    assert (np.diff(tokens) >= 0).all()  # the ids lie along the uniforms in their order


@law(15, vocab=vocabs, top_k=limits, top_p=masses, seed=seeds)
def test_over_a_grid_of_uniforms_what_is_kept_shares_the_mass_of_what_is_cut(ops, vocab, top_k, top_p, seed):
    settings, uniforms = [(1.0, top_k, top_p)], grid(ops)
    points = len(uniforms)
    logits = draw_rows(seed, settings, vocab)[0]
    kept = sorted(plain_sample(logits[0], 0.5, *settings[0])[1])
    tokens, _ = draw(ops, np.tile(logits, (points, 1)), uniforms, top_k=top_k, top_p=top_p)
    p = np.zeros(vocab)
    p[kept] = torch.softmax(torch.tensor(logits[0][kept]), -1).numpy()
    assert (np.abs(np.bincount(tokens, minlength=vocab) - points * p) <= 1).all()


@pytest.mark.parametrize("vocab", [1, 2, 8, 64])
def test_equal_logits_share_the_uniforms_evenly_to_the_last_bit(ops, vocab):
    borders = np.arange(vocab) / vocab
    uniforms = np.concatenate([borders, np.nextafter(borders[1:], 0), [LAST_UNIFORM]])
    tokens, _ = draw(ops, np.zeros((len(uniforms), vocab), np.float32), uniforms)
    assert tokens.tolist() == np.floor(uniforms * vocab).tolist()


@law(15, settings=rows_of_settings, vocab=vocabs, seed=seeds)
def test_the_first_and_the_last_uniform_draw_the_first_and_the_last_token_kept(ops, settings, vocab, seed):
    logits, _, temperature, top_k, top_p = draw_rows(seed, settings, vocab)
    temperature[temperature == 0] = 1
    for uniform, pick in [(0.0, min), (LAST_UNIFORM, max)]:
        uniforms = np.full(len(logits), uniform)
        tokens, _ = draw(ops, logits, uniforms, temperature, top_k, top_p)
        rows = zip(logits, uniforms, temperature, top_k, top_p, strict=True)
        assert tokens.tolist() == [pick(plain_sample(*row)[1]) for row in rows]


@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST_UNIFORM])
def test_a_token_without_probability_is_never_drawn(ops, uniform):
    for possible in range(5):
        logits = np.full((1, 5), -1e4, np.float32)
        logits[0, possible] = 1e4
        tokens, logprobs = draw(ops, logits, [uniform])
        assert tokens == [possible]
        assert logprobs == [0]


@law(15, vocab=st.integers(1, 20), dtype=dtypes, seed=seeds)
def test_temperature_0_takes_the_largest_logit_and_the_lowest_id_among_equals(ops, vocab, dtype, seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (6, vocab)).astype(dtype)
    top_k, top_p = rng.integers(-1, 4, 6), rng.uniform(0.1, 1, 6)  # of no consequence
    tokens, logprobs = draw(ops, logits, rng.random(6), 0.0, top_k, top_p)
    assert tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]
    expected = torch.log_softmax(torch.tensor(logits), -1).amax(-1).numpy()
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=3 * TOLERANCE[np.dtype(dtype)])


@law(15, vocab=st.integers(2, 12), temperature=st.sampled_from([1e-3, 1e-30, 1e-300]), seed=seeds)
def test_a_low_temperature_tends_to_the_largest_logit(ops, vocab, temperature, seed):
    rng = np.random.default_rng(seed)
    logits = rng.permuted(np.tile(np.arange(vocab, dtype=np.float32), (5, 1)), axis=1)
    tokens, logprobs = draw(ops, logits, rng.random(5), temperature)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert not logprobs.any()


@given(top_k=st.integers(1, 4), uniform=st.floats(0, 1, exclude_max=True))
def test_all_that_equal_the_kth_are_kept(ops, top_k, uniform):
    logits = np.array([[0.0, 3.0, 3.0, -1.0, 3.0]])
    tokens, _ = draw(ops, logits, [uniform], top_k=top_k)
    kept = [1, 2, 4] if top_k <= 3 else [0, 1, 2, 4]
    assert tokens[0] in kept


def test_top_p_1_keeps_the_least_probable_token_whatever_the_other_rows_cut(ops):
    logits = np.array([[-60.0, 0.0], [-60.0, 0.0]])  # e^-60 is lost in any sum with 1
    tokens, _ = draw(ops, logits, [0.0, 0.0], top_p=[1.0, 0.5])
    assert tokens.tolist() == [0, 1]


@law(15, settings=rows_of_settings, vocab=vocabs, dtype=dtypes, which=st.integers(0, 7), seed=seeds)
def test_a_row_does_not_depend_on_the_rows_around_it(ops, settings, vocab, dtype, which, seed):
    row = which % len(settings)
    inputs = draw_rows(seed, settings, vocab, dtype)
    tokens, logprobs = draw(ops, *inputs)
    token_alone, logprob_alone = draw(ops, *(x[row : row + 1] for x in inputs))
    assert (token_alone, logprob_alone) == (tokens[row], logprobs[row])
    others = draw_rows(seed + 1, settings[::-1], vocab, dtype)
    for array, other in zip(inputs, others, strict=True):
        other[row] = array[row]
    tokens_among_others, logprobs_among_others = draw(ops, *others)
    assert (tokens_among_others[row], logprobs_among_others[row]) == (tokens[row], logprobs[row])


def test_the_logits_are_left_as_they_are(ops):
    logits = np.random.default_rng(0).standard_normal((3, 5))
    before = logits.copy()
    draw(ops, logits, [0.1, 0.5, 0.9], 0.5, 2, 0.9)
    np.testing.assert_array_equal(logits, before)


def test_one_row_alone_is_close_to_its_logprob_in_a_forward_pass(ops):
    logits = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    tokens, logprobs = draw(ops, logits, [0.1, 0.4, 0.6, 0.9])
    expected, _ = ops.logprob_forward(ops.array(logits), ops.array(tokens[:, None]))
    check_close(logprobs, ops.to_numpy(expected)[:, 0])


@law(15, settings=rows_of_settings, vocab=vocabs, dtype=dtypes, seed=seeds)
def test_of_a_token_is_said_the_same_to_the_bit_whether_it_is_drawn_or_asked_for(
    ops, settings, vocab, dtype, seed
):
    logits, uniforms, temperature, top_k, top_p = draw_rows(seed, settings, vocab, dtype)
    tokens, logprobs = draw(ops, logits, uniforms, temperature, top_k, top_p)
    everything = np.tile(np.arange(vocab), (len(logits), 1))
    found = ops.to_numpy(ops.tempered_logprob(*(ops.array(x) for x in (logits, everything, temperature))))
    assert found.dtype == logprobs.dtype
    np.testing.assert_array_equal(np.take_along_axis(found, tokens[:, None], -1)[:, 0], logprobs)
    check_close(np.exp(found).sum(-1), np.ones(len(logits), dtype))
