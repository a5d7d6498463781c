"""A client is a future of itself."""

import asyncio
import gc
import weakref

import pytest
from small_clients import datum, model, train

from minitinker import TrainingClient
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.types import AdamParams

DATA = [datum(1, 2, 3, 4), datum(9, 8, 7)]
STEP = AdamParams(learning_rate=0.01)


def test_a_client_may_be_used_at_once_awaited_or_asked_for_its_result(service):
    client = service.create_lora_training_client(model(), rank=2)
    assert client.forward(DATA, "cross_entropy").result().loss > 0
    assert client.result() is client

    async def main():
        assert await client is client
        assert await client.result_async() is client
        assert await asyncio.gather(client, client) == [client, client]
        assert await asyncio.create_task(client.coroutine()) is client
        return await service.create_lora_training_client_async(model(), rank=2)

    assert isinstance(asyncio.run(main()), TrainingClient)
    assert client.future().result() is client


def test_a_future_of_a_client_that_is_not_made_yet_comes_with_the_client(service, held):
    client = service.create_lora_training_client(model(), rank=2)
    future = client.future()
    assert not future.done()
    with pytest.raises(TimeoutError):
        client.result(timeout=0.01)
    held.set()
    assert future.result(timeout=10) is client


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"base_model": "./no/such/model/here"}, NotFoundError, "no/such/model/here"),
        ({"rank": 0}, BadRequestError, "rank is 0; it must be"),
        (
            {"train_mlp": False, "train_attn": False, "train_unembed": False},
            BadRequestError,
            "nothing to train",
        ),
    ],
)
def test_what_goes_wrong_in_making_a_client_comes_with_its_result_and_every_use(
    service, fields, error, message
):
    client = service.create_lora_training_client(**{"base_model": model(), "rank": 4} | fields)

    async def awaited():
        return await client

    uses = [
        client.result,
        client.result,
        client.future().result,
        client.get_info,
        client.get_tokenizer,
        client.forward(DATA, "cross_entropy").result,
        client.forward_backward(DATA, "cross_entropy").result,
        client.optim_step(STEP).result,
        client.save_state("a").result,
        client.save_weights_and_get_sampling_client().result,
        lambda: asyncio.run(awaited()),
        lambda: asyncio.run(service.create_lora_training_client_async(**{"base_model": model()} | fields)),
    ]
    for use in uses:
        with pytest.raises(error, match=message):
            use()


def test_a_dropped_client_frees_its_weights_at_once(service):
    client = service.create_lora_training_client(model(), rank=4).result()
    train(client, steps=1)
    sampling_client = client.save_weights_and_get_sampling_client().result()
    things = [weakref.ref(thing) for thing in (client, client._run.trainer, sampling_client._source.snapshot)]
    gc.disable()
    try:
        service._session.submit(lambda: None).result()
        del client, sampling_client
        assert [thing() for thing in things] == [None, None, None]
    finally:
        gc.enable()
