"""Saving and loading through a TrainingClient."""

import asyncio
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from small_clients import datum, logprobs, model, on_both_backends, train, weights
from transformers import AutoModelForCausalLM

from minitinker import SamplingClient
from minitinker.errors import APIError, BadRequestError, ConflictError, NotFoundError
from minitinker.hosted import HostedServiceError
from minitinker.types import AdamParams, ModelInput

DATA = [datum(1, 2, 3, 4), datum(9, 8, 7)]
STEP = AdamParams(learning_rate=0.01)


def test_states_are_saved_and_loaded_in_their_turn(service, client, tmp_path):
    train(client)
    first = client.save_state("first")
    at_first = client.forward(DATA, "cross_entropy")
    client.forward_backward(DATA, "cross_entropy")
    client.optim_step(STEP)
    later = client.forward(DATA, "cross_entropy")
    path = first.result().path
    client.load_state(path)
    again = client.forward(DATA, "cross_entropy")
    assert path == f"tinker://{client.get_info().model_id}/weights/first"
    assert again.result() == at_first.result() != later.result()


@on_both_backends
def test_the_optimizer_is_loaded_only_where_it_is_asked_for(client):
    def go_on():
        client.forward_backward(DATA, "cross_entropy")
        client.optim_step(STEP).result()
        return weights(client)

    train(client)
    path = client.save_state("state").result().path
    uninterrupted = go_on()
    loaded = client.load_state_with_optimizer(path).result()
    assert (loaded.path, loaded.model_id) == (path, client.get_info().model_id)
    np.testing.assert_array_equal(go_on(), uninterrupted)
    client.load_state(path).result()
    assert client._run.trainer.step == 0
    assert not np.array_equal(go_on(), uninterrupted)


@on_both_backends
def test_loading_drops_gradients(client):
    path = client.save_state("state").result().path
    for load in (client.load_state, client.load_state_with_optimizer):
        client.forward_backward(DATA, "cross_entropy")
        load(path)
        with pytest.raises(BadRequestError, match="call forward_backward first"):
            client.optim_step(STEP).result()


@on_both_backends
def test_what_does_not_fit_is_refused_and_changes_nothing(service, client):
    other = service.create_lora_training_client(model(), rank=5)
    path = other.save_state("state").result().path
    sampler_path = client.save_weights_for_sampler("sampler").result().path
    before = weights(client)
    with pytest.raises(BadRequestError, match=r"rank 5 .* rank 4 .*create_training_client_from_state"):
        client.load_state(path).result()
    with pytest.raises(BadRequestError, match="no optimizer state"):
        client.load_state_with_optimizer(sampler_path).result()
    with pytest.raises(NotFoundError, match="nowhere"):
        client.load_state("tinker://nobody/weights/nowhere").result()
    np.testing.assert_array_equal(weights(client), before)


@on_both_backends
def test_saved_weights_make_a_sampling_client(client):
    train(client)
    path = client.save_weights_for_sampler("sampler").result().path
    assert path == f"tinker://{client.get_info().model_id}/sampler_weights/sampler"
    tokens = [5, 6, 7, 8, 9]
    for sampling_client in (
        client.create_sampling_client(path),
        asyncio.run(client.create_sampling_client_async(path)),
        client.save_weights_and_get_sampling_client("a name"),
        asyncio.run(client.save_weights_and_get_sampling_client_async()),
    ):
        assert isinstance(sampling_client, SamplingClient)
        assert sampling_client.get_base_model() == model()
        found = sampling_client.compute_logprobs(ModelInput.from_ints(tokens)).result()
        assert found[0] is None
        np.testing.assert_allclose(found[1:], logprobs(client, tokens), atol=1e-5)


def test_a_name_is_taken_once_unless_it_is_overwritten_notes_and_expiry_included(service, client):
    rest = service.create_rest_client()
    run = client.get_info().model_id

    def only():
        (checkpoint,) = rest.list_checkpoints(run).result().checkpoints
        return checkpoint

    path = client.save_state("a", 1000, user_metadata={"k": "v"}).result().path
    assert (only().tinker_path, only().user_metadata) == (path, {"k": "v"})
    assert only().expires_at is not None
    with pytest.raises(ConflictError, match="exists already"):
        client.save_state("a").result()
    assert only().user_metadata == {"k": "v"}
    train(client)
    assert client.save_state("a", overwrite=True).result().path == path
    assert (only().user_metadata, only().expires_at) == (None, None)
    assert service._session.store.load(path).step == 2


def test_notes_are_those_of_the_moment_of_the_call(service, client):
    notes = {"k": "v"}
    path = client.save_weights_for_sampler("a", None, notes)
    notes["k"] = "w"
    assert service._session.store.load(path.result().path).user_metadata == {"k": "v"}


@pytest.mark.parametrize(
    "save",
    [
        lambda client: client.save_state("a", ttl_seconds=0),
        lambda client: client.save_state("a", overwrite="yes"),
        lambda client: client.save_state("a", user_metadata={"k": 1}),
        lambda client: client.save_state("../a"),
        lambda client: client.save_state(None),
        lambda client: client.save_weights_for_sampler("a", ttl_seconds=1.5),
        lambda client: client.save_weights_for_sampler("a", user_metadata=["k"]),
        lambda client: client.save_weights_external("a", ttl_seconds=-1),
        lambda client: client.save_weights_external(""),
    ],
)
def test_bad_arguments_of_saving_are_named_and_nothing_is_saved(save, service, client):
    with pytest.raises((BadRequestError, TypeError), match=r"ttl_seconds|overwrite|user_metadata|name is"):
        save(client).result()
    run = client.get_info().model_id
    assert service.create_rest_client().list_checkpoints(run).result().checkpoints == []
    client.save_state("a").result()


def test_what_only_accounts_have_is_refused_and_not_ignored(client):
    path = client.save_state("a").result().path
    calls = [
        lambda: client.load_state(path, "token"),
        lambda: client.load_state_with_optimizer(path, weights_access_token="token"),
        lambda: client.save_weights_external("a", age_encryption_recipients=["age1..."]),
    ]
    for call in calls:
        with pytest.raises(HostedServiceError, match="belongs to the hosted service; on one machine"):
            call()
    client.load_state(path, None).result()


def test_external_weights_are_a_model_of_their_own(service, client):
    train(client)
    path = client.save_weights_external("merged").result().path
    assert path == f"tinker://{client.get_info().model_id}/external_weights/merged"
    urls = service.create_rest_client().get_external_weights_urls(path).result().urls
    folder = Path(urls["config.json"].removeprefix("file://")).parent
    tokens = [5, 6, 7, 8, 9]
    merged = service.create_sampling_client(base_model=str(folder))
    found = merged.compute_logprobs(ModelInput.from_ints(tokens)).result()
    np.testing.assert_allclose(found[1:], logprobs(client, tokens), atol=1e-4)
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(BadRequestError, match="of the kind external_weights; it must be weights or"):
        client.load_state(path).result()
    with pytest.raises(ConflictError):
        client.save_weights_external("merged").result()


def test_a_full_disk_is_said_and_the_client_goes_on(client, monkeypatch):
    train(client)
    path = client.save_state("a").result().path
    before = weights(client)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        for save in (
            lambda: client.save_state("a", overwrite=True),
            lambda: client.save_weights_for_sampler("b"),
            lambda: client.save_weights_external("c"),
        ):
            with pytest.raises(APIError, match=r"was not saved in .*: No space left on device"):
                save().result()
    np.testing.assert_array_equal(weights(client), before)
    train(client)
    client.load_state_with_optimizer(path).result()
    np.testing.assert_array_equal(weights(client), before)
    client.save_state("a", overwrite=True).result()


def test_every_call_has_a_twin_that_returns_the_same_future(client):
    async def calls():
        saved = await (await client.save_state_async("a", 1000, False, {"k": "v"}))
        await (await client.save_weights_for_sampler_async("a", 1000, {"k": "v"}))
        await (await client.save_weights_external_async("a", 1000, None))
        await (await client.load_state_async(saved.path, None))
        await (await client.load_state_with_optimizer_async(saved.path, None))

    asyncio.run(calls())
