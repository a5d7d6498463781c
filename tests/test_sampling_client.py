import asyncio
import concurrent.futures
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest
from small_clients import PROMPT, datum, draw, logprobs, model, prompt, tokens, train
from tiny_models import VOCAB, make_model

from minitinker import APIFuture, SamplingClient, ServiceClient, reference
from minitinker.engine.cache import Arena
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.config import read_config
from minitinker.types import AdamParams, ModelInput, SampleResponse, SamplingParams

CONTEXT = 256
EOS = 258


def test_calls_return_futures_at_once_and_the_async_twins_return_results(base, held):
    params = SamplingParams(max_tokens=3, seed=1)
    sample, computed = base.sample(PROMPT, 2, params), base.compute_logprobs(PROMPT)
    for future in (sample, computed):
        assert isinstance(future, APIFuture)
        assert not future.future().done()
    held.set()

    async def main():
        return (
            await base.sample_async(PROMPT, 2, params),
            await base.compute_logprobs_async(PROMPT),
            await base.get_base_model_async(),
        )

    response, awaited, name = asyncio.run(main())
    assert isinstance(response, SampleResponse)
    assert tokens(response) == tokens(sample.result())
    assert awaited == computed.result()
    assert name == base.get_base_model() == model()
    assert base.get_tokenizer().decode([104, 105]) == "hi"


def test_a_client_may_be_used_at_once_awaited_or_asked_for_its_result(service, held):
    client = service.create_sampling_client(base_model=model())
    future = client.sample(PROMPT, 1, SamplingParams(max_tokens=2))
    assert not client.future().done()
    held.set()
    assert client.result() is client

    async def main():
        assert await client is client
        return await service.create_sampling_client_async(base_model=model())

    assert isinstance(asyncio.run(main()), SamplingClient)
    assert future.result().sequences


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"base_model": "./no/such/model"}, NotFoundError, "no/such/model"),
        ({"model_path": "tinker://nobody/weights/nothing"}, NotFoundError, "nobody"),
        ({"model_path": "weights"}, BadRequestError, "tinker://"),
    ],
)
def test_what_goes_wrong_in_making_a_client_comes_with_its_result_and_every_use(
    service, asked, error, message
):
    client = service.create_sampling_client(**asked)

    async def awaited():
        await service.create_sampling_client_async(**asked)

    uses = [
        client.result,
        client.sample(PROMPT, 1, SamplingParams()).result,
        client.compute_logprobs(PROMPT).result,
        client.get_tokenizer,
        client.get_base_model,
        lambda: asyncio.run(awaited()),
    ]
    for use in uses:
        with pytest.raises(error, match=message):
            use()


def test_one_of_a_path_and_a_base_model_is_needed(service):
    with pytest.raises(BadRequestError, match="give one of the two"):
        service.create_sampling_client()


def test_a_base_model_beside_a_path_must_be_the_one_that_was_trained(service, client):
    path = client.save_weights_for_sampler("beside").result().path
    expected = tokens(draw(service.create_sampling_client(path)))
    assert tokens(draw(service.create_sampling_client(path, model()))) == expected
    with pytest.raises(BadRequestError, match=r"was trained on .*; base_model is minitinker/tiny"):
        service.create_sampling_client(path, "minitinker/tiny").result()


# A snapshot


def test_training_on_never_changes_what_a_client_samples(trained):
    training_client, client = trained
    before = draw(client, 3, max_tokens=12)
    train(training_client)
    after = draw(client, 3, max_tokens=12)
    assert tokens(before) == tokens(after)
    assert [s.logprobs for s in before.sequences] == [s.logprobs for s in after.sequences]
    assert tokens(draw(training_client.save_weights_and_get_sampling_client(), 3, max_tokens=12)) != tokens(
        before
    )


def test_a_client_has_the_weights_of_the_moment_it_was_asked_for(client):
    """Though it is made, and used, while training is queued up behind it."""
    before = logprobs(client, [5, 6, 7])
    snapshot = client.save_weights_and_get_sampling_client()
    train(client)
    assert snapshot.compute_logprobs(PROMPT).result()[1:] == pytest.approx(list(before), abs=1e-5)


# Seeds


def test_a_seed_repeats_from_client_to_client_and_call_to_call(service, base):
    first = tokens(draw(base, 4))
    assert len({tuple(sample) for sample in first}) == 4
    assert tokens(draw(base, 4)) == first
    assert tokens(draw(service.create_sampling_client(base_model=model()), 4)) == first
    assert tokens(draw(base, 2)) == first[:2]
    assert tokens(draw(base, 4, seed=2)) != first


def test_without_a_seed_samples_differ(base):
    assert tokens(draw(base, 1, seed=None)) != tokens(draw(base, 1, seed=None))


# Ends


def test_max_tokens_and_the_end_of_the_context_end_a_sample(base):
    long = ModelInput.from_ints(list(range(100, 250)))
    for max_tokens, expected in ((1, 1), (5, 5), (None, CONTEXT - 150), (10**6, CONTEXT - 150)):
        (sequence,) = draw(base, given=long, max_tokens=max_tokens).sequences
        assert len(sequence.tokens) == len(sequence.logprobs) == expected
        assert sequence.stop_reason == "length"


def test_end_tokens_stop_a_sample_unless_stop_is_empty(base):
    def up_to_the_end_token(sample):
        return sample[: sample.index(EOS) + 1] if EOS in sample else sample

    free = tokens(draw(base, 16, temperature=3, max_tokens=100))
    assert {len(sample) for sample in free} == {100}
    ends = [up_to_the_end_token(sample) for sample in free]
    assert ends != free
    for stop in (None, ["a string that is not there"]):
        response = draw(base, 16, temperature=3, max_tokens=100, stop=stop)
        assert tokens(response) == ends
        for sequence in response.sequences:
            assert (sequence.stop_reason == "stop") == (sequence.tokens[-1] == EOS)


def test_a_stop_token_stays_in_the_tokens(base):
    (free,) = draw(base, max_tokens=20).sequences
    token = free.tokens[7]
    (stopped,) = draw(base, max_tokens=20, stop=[token]).sequences
    assert stopped.tokens == free.tokens[: free.tokens.index(token) + 1]
    assert stopped.stop_reason == "stop"


def test_a_stop_string_may_lie_across_tokens_that_are_parts_of_characters(client):
    text = "né🙂日x"  # a token is a byte, and each of these has but one successor: soon learned by heart
    tokenizer = client.get_tokenizer()
    spelled = tokenizer.encode(text)
    assert len(spelled) == len(text.encode())
    for _ in range(40):
        client.forward_backward([datum(1, *spelled)], "cross_entropy")
        client.optim_step(AdamParams(learning_rate=0.005))
    sampling_client = client.save_weights_and_get_sampling_client()
    params = {"given": prompt(1), "temperature": 0, "max_tokens": len(spelled)}
    assert tokens(draw(sampling_client, **params)) == [spelled]
    for stop in ("é", "🙂", "🙂日", "日x", "n"):
        for asked in (stop, ["not there", stop]):
            (sequence,) = draw(sampling_client, stop=asked, **params).sequences
            assert tokenizer.decode(sequence.tokens) == text[: text.index(stop) + len(stop)]
            assert sequence.stop_reason == "stop"


# What goes wrong


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": prompt()}, "the prompt has 0 tokens; it must have 1 to 255"),
        ({"prompt": prompt(*[1] * CONTEXT)}, "the prompt has 256 tokens; it must have 1 to 255"),
        ({"prompt": prompt(1, VOCAB)}, "the prompt holds the token 264; the vocabulary is 0 to 263"),
        ({"prompt": [1, 2]}, "prompt is a list; it must be a ModelInput"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0 and finite"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0.*; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"stop": ""}, "stop"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs is -1"),
    ],
)
def test_bad_arguments_raise_at_the_result_naming_the_value(base, fields, message):
    params = {key: value for key, value in fields.items() if key in SamplingParams.__dataclass_fields__}
    call = {"prompt": PROMPT, "num_samples": 1, "sampling_params": SamplingParams(**params)}
    future = base.sample(**call | {key: value for key, value in fields.items() if key not in params})
    with pytest.raises(BadRequestError, match=message):
        future.result()


def test_compute_logprobs_takes_a_prompt_that_fills_the_context(base):
    assert len(base.compute_logprobs(prompt(*[1] * CONTEXT)).result()) == CONTEXT
    with pytest.raises(BadRequestError, match="1 to 256"):
        base.compute_logprobs(prompt(*[1] * (CONTEXT + 1))).result()


def test_cancelling_a_sample_frees_its_place_and_leaves_the_others_alone(service, base):
    expected = tokens(draw(base, 2))
    long = [base.sample(PROMPT, 8, SamplingParams(stop=[])) for _ in range(4)]
    short = base.sample(PROMPT, 2, SamplingParams(max_tokens=8, seed=1, stop=[]))
    for future in long:
        assert future.future().cancel()
    assert not wait([future.future() for future in long], timeout=10).not_done
    for future in long:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    assert tokens(short.result()) == expected
    sampler = service._session.sampler(base._source.base)
    deadline = time.monotonic() + 10
    while sampler.busy:
        assert time.monotonic() < deadline


def test_cancelled_logprobs_are_cancelled_for_whoever_waits(base, held):
    future = base.compute_logprobs(PROMPT)
    assert future.future().cancel()
    held.set()
    assert not wait([future.future()], timeout=10).not_done
    with pytest.raises(CancelledError):
        future.result(timeout=0)


def test_samples_may_be_awaited_from_many_loops_and_threads(base):
    expected = tokens(draw(base, 2))
    params = SamplingParams(max_tokens=8, seed=1, stop=[])

    async def several():
        return await asyncio.gather(*(base.sample_async(PROMPT, 2, params) for _ in range(3)))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(lambda: asyncio.run(several())) for _ in range(3)]
        threads = [pool.submit(lambda: base.sample(PROMPT, 2, params).result()) for _ in range(3)]
        responses = [response for loop in loops for response in loop.result()]
        responses += [thread.result() for thread in threads]
    assert len(responses) == 12
    assert all(tokens(response) == expected for response in responses)


# Clients side by side


def test_clients_on_different_weights_and_models_sample_side_by_side(service, base, trained):
    small = service.create_lora_training_client(model(), rank=2, seed=3, train_mlp=False, train_unembed=False)
    train(small)
    other = service.create_sampling_client(base_model=str(make_model("llama", seed=1)[0]))
    clients = [base, trained[1], small.save_weights_and_get_sampling_client(), other]
    alone = [tokens(draw(client, 2)) for client in clients]
    params = SamplingParams(max_tokens=8, seed=1, stop=[])
    together = [client.sample(PROMPT, 2, params) for _ in range(3) for client in clients]
    assert [tokens(future.result()) for future in together] == alone * 3
    assert len({str(sample) for sample in alone}) == 4


# Many at once


@pytest.mark.parametrize("cache_tokens", [None, 400])
def test_a_thousand_calls_from_loops_and_threads_are_all_answered(cache_tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    folder = make_model()[0]
    row_bytes = Arena(reference, read_config(folder)).row_bytes
    cache_bytes = None if cache_tokens is None else cache_tokens * row_bytes
    service = ServiceClient(backend="reference", cache_bytes=cache_bytes)
    client = service.create_sampling_client(base_model=str(folder))
    expected = [ask(client, i).result().sequences[0].tokens for i in range(10)]

    async def many(first, last):
        answers = [ask(client, i) for i in range(first, last)]
        return [answer.sequences[0].tokens for answer in await asyncio.gather(*answers)]

    with ThreadPoolExecutor(4) as threads:
        loops = [threads.submit(asyncio.run, many(first, first + 300)) for first in (0, 300, 600)]
        plain = threads.submit(lambda: [ask(client, i).result().sequences[0].tokens for i in range(100)])
        answers = [tokens for loop in loops for tokens in loop.result(timeout=60)] + plain.result(timeout=60)
    assert answers == [expected[i % 10] for i in [*range(900), *range(100)]]
    service.close()


def ask(client, i):
    prompt = ModelInput.from_ints([i % 10, 5, 6])
    return client.sample(prompt, 1, SamplingParams(max_tokens=5, seed=i % 10, stop=[]))
