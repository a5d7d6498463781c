"""Saving and loading through a TrainingClient."""

import asyncio

import numpy as np
import pytest
from small_clients import datum, logprobs, model, train, weights

from minitinker import SamplingClient
from minitinker.errors import BadRequestError, NotFoundError
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


def test_loading_drops_gradients(client):
    path = client.save_state("state").result().path
    for load in (client.load_state, client.load_state_with_optimizer):
        client.forward_backward(DATA, "cross_entropy")
        load(path)
        with pytest.raises(BadRequestError, match="call forward_backward first"):
            client.optim_step(STEP).result()


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
