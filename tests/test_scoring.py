"""What `sample` reports beside its tokens equals what `forward` says with the same weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_clients import PROMPT, datum, draw, logprobs, model, on_both_backends, prompt, tokens, train
from tiny_models import VOCAB

from minitinker.engine.request import ALTERNATIVES
from minitinker.errors import BadRequestError
from minitinker.types import ImageChunk, ModelInput, SamplingParams, TensorData

GIVEN = [3, 1, 4, 1, 5, 9, 2, 6]
ONE = SamplingParams(max_tokens=1, seed=1, stop=[])
CLOSE = 1e-5


def ask(client, given=GIVEN, params=ONE, samples=1, **asked):
    return client.sample(ModelInput.from_ints(given), samples, params, **asked).result()


def everything(client, text):
    """log p of every token of the vocabulary in every place but the first: (len(text) - 1, VOCAB)."""
    targets = np.tile(np.arange(VOCAB), (len(text) - 1, 1))
    output = client.forward([datum(*text, target_tokens=targets)], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].to_numpy().astype(np.float64)


def tempered(lp, temperature):
    z = lp / (temperature or 1)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


# The likeliest tokens in the places of a sample


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("cut", [{}, {"top_k": 2}])
def test_the_likeliest_tokens_of_a_sample_are_of_the_distribution_that_its_logprobs_are_of(
    trained, temperature, cut
):
    training_client, client = trained
    k = 5
    params = SamplingParams(max_tokens=6, seed=3, stop=[], temperature=temperature, **cut)
    response = ask(client, PROMPT.to_ints(), params, 2, topk_sample_logprobs=k)
    for sequence in response.sequences:
        assert sequence.topk_logprobs_np.token_ids.shape == (6, k)
        whole = [*PROMPT.to_ints(), *sequence.tokens]
        lp = tempered(everything(training_client, whole), temperature)[PROMPT.length - 1 :]
        for place, row, token, logprob in zip(
            sequence.topk_logprobs, lp, sequence.tokens, sequence.logprobs, strict=True
        ):
            assert [one for one, _ in place] == np.argsort(-row, kind="stable")[:k].tolist()
            np.testing.assert_allclose([x for _, x in place], np.sort(row)[::-1][:k], atol=2 * CLOSE)
            if token in dict(place):
                assert dict(place)[token] == pytest.approx(logprob, abs=CLOSE)


@on_both_backends
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_among_the_likeliest_tokens_the_one_drawn_has_the_bits_of_its_logprob(base, temperature):
    params = SamplingParams(max_tokens=3, seed=3, stop=[], temperature=temperature)
    (sequence,) = ask(base, PROMPT.to_ints(), params, topk_sample_logprobs=VOCAB).sequences
    for place, token, logprob in zip(sequence.topk_logprobs, sequence.tokens, sequence.logprobs, strict=True):
        assert dict(place)[token] == logprob


def test_only_those_who_ask_for_the_likeliest_tokens_get_them(base):
    futures = [
        base.sample(PROMPT, 2, SamplingParams(max_tokens=4, seed=1, stop=[]), topk_sample_logprobs=k)
        for k in (0, 3, 1)
    ]
    none, three, one = (future.result() for future in futures)
    assert tokens(none) == tokens(three) == tokens(one)
    assert [s.topk_logprobs for s in none.sequences] == [None, None]
    for many, few in zip(three.sequences, one.sequences, strict=True):
        assert [place[:1] for place in many.topk_logprobs] == few.topk_logprobs


# The logprobs of other tokens in the prompt's places


@settings(derandomize=True, deadline=None, max_examples=20)
@given(k=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.1, 0.5, 1.0]))
def test_logprobs_of_target_tokens_are_what_forward_says_of_them_and_0_where_none_is_named(
    trained_once, k, seed, share
):
    training_client, client = trained_once
    rng = np.random.default_rng(seed)
    shape = (len(GIVEN) - 1, k)
    targets = np.where(rng.random(shape) < share, rng.integers(0, VOCAB, shape), -1)
    targets[rng.integers(shape[0]), 0] = 7
    dense = TensorData.from_numpy(targets)
    sparse = TensorData.from_torch_sparse(torch.from_numpy(targets), pad_value=-1)
    expected = np.take_along_axis(everything(training_client, GIVEN), np.maximum(targets, 0), axis=-1)
    expected = np.where(targets >= 0, expected, 0)
    for asked in (dense, sparse):
        params = SamplingParams(max_tokens=1, temperature=0.4)
        found = ask(client, params=params, target_prompt_logprobs=asked).target_prompt_logprobs
        assert (found.dtype, found.shape) == ("float32", list(shape))
        assert found.sparse_crow_indices == asked.sparse_crow_indices
        assert found.sparse_col_indices == asked.sparse_col_indices
        np.testing.assert_allclose(found.to_numpy(), expected, atol=CLOSE)


@pytest.fixture(scope="module")
def trained_once(service):
    client = service.create_lora_training_client(model(), rank=4, seed=0)
    train(client)
    return client, client.save_weights_and_get_sampling_client()


# Draws beside the prompt's tokens


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_alternatives_are_drawn_by_the_documented_law_from_the_whole_tempered_distribution(
    trained, temperature
):
    training_client, client = trained
    k, seed = 3, 11
    params = SamplingParams(max_tokens=1, seed=seed, temperature=temperature, top_k=1, top_p=0.1)
    found = ask(client, params=params, prompt_alt_tokens_k=k).prompt_alt_tokens
    lp = everything(training_client, GIVEN)
    p = np.exp(tempered(lp, temperature))
    drawn = found.tokens.to_numpy()
    assert drawn.shape == tuple(found.logprobs.shape) == (len(GIVEN) - 1, k)
    assert (found.tokens.dtype, found.logprobs.dtype) == ("int64", "float32")
    for j in range(k):
        philox = np.random.Philox(key=np.array([seed, ALTERNATIVES + j], np.uint64))
        for i, row in enumerate(p):
            u = np.random.Generator(np.random.Philox(key=philox.state["state"]["key"], counter=i)).random()
            assert drawn[i, j] == int((row.cumsum() > u * row.sum()).argmax())
    np.testing.assert_allclose(found.logprobs.to_numpy(), np.take_along_axis(lp, drawn, -1), atol=CLOSE)


def test_alternatives_repeat_with_a_seed_differ_without_and_are_the_likeliest_at_temperature_0(trained):
    training_client, client = trained

    def drawn(k=4, **params):
        whole = {"max_tokens": 1, "seed": 1} | params
        return ask(client, params=SamplingParams(**whole), prompt_alt_tokens_k=k).prompt_alt_tokens.tokens

    assert drawn() == drawn()
    assert drawn().to_numpy()[:, :2].tolist() == drawn(k=2).tolist()
    assert drawn(seed=None) != drawn(seed=None)
    likeliest = everything(training_client, GIVEN).argmax(axis=-1)
    np.testing.assert_array_equal(drawn(temperature=0).to_numpy(), np.tile(likeliest[:, None], 4))


# The end of the prompt alone


@pytest.mark.parametrize("last", [1, 3, len(GIVEN) - 1])
def test_of_the_last_tokens_is_said_what_is_said_of_them_among_all(base, last):
    whole = ask(base, include_prompt_logprobs=True, topk_prompt_logprobs=2)
    asked = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_logprobs_last_n": last}
    part = ask(base, **asked)
    unsaid = [None] * (len(GIVEN) - last)
    assert part.prompt_logprobs[:-last] == part.topk_prompt_logprobs[:-last] == unsaid
    np.testing.assert_allclose(part.prompt_logprobs[-last:], whole.prompt_logprobs[-last:], atol=CLOSE)
    for one, other in zip(part.topk_prompt_logprobs[-last:], whole.topk_prompt_logprobs[-last:], strict=True):
        np.testing.assert_allclose(one, other, atol=CLOSE)
    computed = base.compute_logprobs(prompt(*GIVEN), last).result()
    assert computed[:-last] == unsaid
    np.testing.assert_allclose(computed[-last:], whole.prompt_logprobs[-last:], atol=CLOSE)


def test_the_prompts_own_tokens_among_targets_and_the_likeliest_agree_with_its_logprobs(base):
    own = TensorData([[token] for token in GIVEN[1:]], "int64")
    asked = {"include_prompt_logprobs": True, "topk_prompt_logprobs": VOCAB}
    response = ask(base, **asked, target_prompt_logprobs=own)
    assert response.target_prompt_logprobs.data == pytest.approx(response.prompt_logprobs[1:], abs=CLOSE)
    assert response.topk_prompt_logprobs_np.token_ids.shape == (len(GIVEN), VOCAB)
    for token, logprob, place in zip(
        GIVEN[1:], response.prompt_logprobs[1:], response.topk_prompt_logprobs[1:], strict=True
    ):
        assert dict(place)[token] == pytest.approx(logprob, abs=CLOSE)


def test_what_was_not_asked_is_none(base):
    response = draw(base)
    assert response.prompt_logprobs is response.prompt_logprobs_np is response.topk_prompt_logprobs is None
    assert response.target_prompt_logprobs is response.prompt_alt_tokens is None
    assert response.prompt_cache_hit_tokens == 0


def test_a_prompt_of_one_token_has_no_place_for_alternatives(base):
    found = ask(base, [5], prompt_alt_tokens_k=2).prompt_alt_tokens
    assert found.tokens.shape == found.logprobs.shape == [0, 2]


def test_what_is_asked_about_a_prompt_does_not_change_its_samples(base):
    params = SamplingParams(max_tokens=6, seed=2, stop=[])
    asked = {
        "include_prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 2,
        "target_prompt_logprobs": TensorData([[3]] * (len(GIVEN) - 1), "int64"),
        "prompt_alt_tokens_k": 2,
        "prompt_logprobs_last_n": 2,
    }
    assert tokens(ask(base, params=params, samples=3, **asked)) == tokens(ask(base, params=params, samples=3))


# What goes wrong


def targets(rows=7, fill=3, dtype="int64"):
    return TensorData(np.full((rows, 1), fill), dtype)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs is -1; .* at least 0 and at most 264"),
        ({"topk_sample_logprobs": VOCAB + 1}, "topk_sample_logprobs is 265"),
        ({"topk_prompt_logprobs": VOCAB + 1}, "topk_prompt_logprobs is 265"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k is -1"),
        ({"prompt_alt_tokens_k": 10**9}, "prompt_alt_tokens_k is 1000000000; .* at most 4096"),
        ({"prompt_alt_tokens_k": 1.5}, "prompt_alt_tokens_k is 1.5"),
        ({"prompt_logprobs_last_n": 2}, "include_prompt_logprobs is not set"),
        ({"prompt_logprobs_last_n": 0, "include_prompt_logprobs": True}, "prompt_logprobs_last_n is 0"),
        (
            {"prompt_logprobs_last_n": 8, "include_prompt_logprobs": True},
            "prompt_logprobs_last_n is 8; .* most 7",
        ),
        ({"target_prompt_logprobs": [[1]]}, "target_prompt_logprobs is a list; it must be a TensorData"),
        ({"target_prompt_logprobs": targets(dtype="float32")}, "is float32 of shape .* must be int64"),
        (
            {"target_prompt_logprobs": targets(rows=3)},
            r"of shape \[3, 1\]; it must be int64 of shape \[7, K\]",
        ),
        ({"target_prompt_logprobs": TensorData([1] * 7, "int64")}, r"of shape \[7\]"),
        ({"target_prompt_logprobs": targets(fill=VOCAB)}, "holds 264; token ids are 0 to 263"),
        ({"target_prompt_logprobs": targets(fill=-2)}, "holds -2"),
        ({"target_prompt_logprobs": targets(fill=-1)}, "holds no token id"),
    ],
)
def test_bad_arguments_raise_at_the_result_naming_the_value(base, asked, message):
    future = base.sample(ModelInput.from_ints(GIVEN), 1, ONE, **asked)
    with pytest.raises(BadRequestError, match=message):
        future.result()


def test_weights_that_give_no_numbers_are_told_where_only_the_prompt_is_asked_about(client):
    client.get_info()
    client._run.trainer.flat[...] = np.nan
    broken = client.save_weights_and_get_sampling_client()
    for future in (
        broken.compute_logprobs(prompt(*GIVEN)),
        broken.sample(prompt(*GIVEN), 1, ONE, prompt_alt_tokens_k=1),
    ):
        with pytest.raises(BadRequestError, match="logits that are not finite"):
            future.result()


def test_an_image_in_a_prompt_is_refused_with_its_place(base):
    picture = prompt(1, 2).append(ImageChunk(data=b"", format="png", expected_tokens=1))
    for future in (base.sample(picture, 1, ONE), base.compute_logprobs(picture)):
        with pytest.raises(BadRequestError, match=r"prompt\.chunks\[1\] is of type ImageChunk"):
            future.result()


def test_the_chunks_of_a_prompt_are_read_one_after_the_other(base):
    parts = (
        ModelInput.from_ints(GIVEN[:3]).append_int(GIVEN[3]).append(ModelInput.from_ints(GIVEN[4:]).chunks[0])
    )
    assert base.compute_logprobs(parts).result() == base.compute_logprobs(prompt(*GIVEN)).result()


def test_logprobs_of_a_prompt_are_those_that_forward_has(trained):
    training_client, client = trained
    found = client.compute_logprobs(prompt(*GIVEN)).result()
    np.testing.assert_allclose(found[1:], logprobs(training_client, GIVEN), atol=CLOSE)
