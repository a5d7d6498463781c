"""What a SamplingClient reports is what forward says with the same weights."""

import numpy as np
import pytest
from small_clients import PROMPT, datum, draw, logprobs, prompt, tokens
from tiny_models import VOCAB

from minitinker.types import ModelInput, SamplingParams


@pytest.mark.parametrize("temperature", [1, 0])
def test_logprobs_of_samples_are_what_forward_says(trained, temperature):
    training_client, client = trained
    for sequence in draw(client, 3, temperature=temperature, max_tokens=20).sequences:
        expected = logprobs(training_client, [*PROMPT.to_ints(), *sequence.tokens])
        np.testing.assert_allclose(sequence.logprobs, expected[PROMPT.length - 1 :], atol=1e-5)


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_logprobs_are_of_the_tempered_distribution_before_it_is_cut(trained, cut):
    training_client, client = trained
    temperature = 0.6
    (sequence,) = draw(client, temperature=temperature, max_tokens=5, **cut).sequences
    whole = [*PROMPT.to_ints(), *sequence.tokens]
    everything = np.tile(np.arange(VOCAB), (len(whole) - 1, 1))  # every token as a target in every place
    data = datum(*whole, target_tokens=everything, weights=np.zeros(everything.shape, np.float32))
    output = training_client.forward([data], "cross_entropy").result().loss_fn_outputs[0]
    lp = output["logprobs"].to_numpy().astype(np.float64)[PROMPT.length - 1 :]
    tempered = lp / temperature - np.log(np.exp(lp / temperature).sum(axis=-1, keepdims=True))
    expected = [row[token] for row, token in zip(tempered, sequence.tokens, strict=True)]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=2e-5)


def test_prompt_logprobs_are_untempered_and_begin_with_none(trained):
    training_client, client = trained
    given = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = logprobs(training_client, given)
    params = SamplingParams(max_tokens=2, temperature=0.3)
    response = client.sample(ModelInput.from_ints(given), 2, params, include_prompt_logprobs=True).result()
    computed = client.compute_logprobs(ModelInput.from_ints(given)).result()
    for found in (response.prompt_logprobs, computed):
        assert len(found) == len(given)
        assert found[0] is None
        np.testing.assert_allclose(found[1:], expected, atol=1e-5)
    assert response.topk_prompt_logprobs is None
    assert draw(client).prompt_logprobs is None


def test_a_prompt_of_one_token_has_nothing_to_predict(base):
    assert base.compute_logprobs(prompt(3)).result() == [None]
    response = base.sample(prompt(3), 1, SamplingParams(max_tokens=1), True, 2).result()
    assert response.prompt_logprobs == response.topk_prompt_logprobs == [None]


def test_topk_prompt_logprobs_are_the_likeliest_tokens_in_each_place(trained):
    training_client, client = trained
    given, k = [3, 1, 4, 1], 4
    response = client.sample(
        ModelInput.from_ints(given), 1, SamplingParams(max_tokens=1), topk_prompt_logprobs=k
    ).result()
    everything = np.tile(np.arange(VOCAB), (len(given) - 1, 1))
    data = datum(*given, target_tokens=everything)
    output = training_client.forward([data], "cross_entropy").result().loss_fn_outputs[0]
    first, *places = response.topk_prompt_logprobs
    assert first is None
    assert len(places) == len(given) - 1
    for place, row in zip(places, output["logprobs"].to_numpy(), strict=True):
        likeliest = np.argsort(-row)[:k]
        assert [token for token, _ in place] == likeliest.tolist()
        np.testing.assert_allclose([logprob for _, logprob in place], row[likeliest], atol=1e-5)


def test_greedy_takes_the_likeliest_and_so_does_a_cut_to_one_token(base):
    greedy = draw(base, 2, temperature=0)
    assert tokens(greedy)[0] == tokens(greedy)[1]
    assert tokens(draw(base, 2, top_k=1)) == tokens(draw(base, 2, top_p=1e-6)) == tokens(greedy)
