"""Sampling clients of kind "inflight": they follow their training run from save to save."""

from concurrent.futures import Future

import numpy as np
import pytest
from small_clients import PROMPT, datum, draw, logprobs, model, prompt, tokens, train
from tiny_models import make_model, make_trainer

from minitinker import reference
from minitinker.engine.request import SampleRequest, Served
from minitinker.engine.sampler import Sampler
from minitinker.engine.stopping import StopRule
from minitinker.errors import BadRequestError
from minitinker.model.weights import load_base_model
from minitinker.types import SamplingParams


def scores(sampling_client):
    return sampling_client.compute_logprobs(prompt(5, 6, 7, 8)).result()[1:]


def now(client):
    return pytest.approx(list(logprobs(client, [5, 6, 7, 8])), abs=1e-5)


def test_inflight_clients_have_the_weights_of_the_latest_inflight_save(client):
    train(client)
    first = client.save_weights_and_get_sampling_client(kind="inflight")
    assert scores(first) == now(client)
    saved = scores(first)
    train(client)
    assert scores(first) == saved  # an optimizer step publishes nothing,
    snapshot = client.save_weights_and_get_sampling_client()
    assert scores(first) == saved  # nor does a snapshot
    assert scores(snapshot) == now(client) != saved
    second = client.save_weights_and_get_sampling_client(kind="inflight")
    assert scores(first) == scores(second) == now(client)
    train(client)
    assert scores(second) == scores(snapshot)
    third = client.save_weights_and_get_sampling_client(kind="inflight")
    assert scores(first) == scores(second) == scores(third) == now(client)
    assert scores(snapshot) != now(client)


def test_runs_do_not_share_their_inflight_weights(service, client):
    train(client)
    mine = client.save_weights_and_get_sampling_client(kind="inflight")
    before = scores(mine)
    other = service.create_lora_training_client(model(), rank=2, seed=5)
    train(other)
    assert scores(other.save_weights_and_get_sampling_client(kind="inflight")) == now(other) != before
    assert scores(mine) == before


def test_an_inflight_client_has_the_weights_of_its_own_save_at_least(client):
    """Though it is used before it is made, and training is queued up behind it."""
    before = now(client)
    inflight = client.save_weights_and_get_sampling_client(kind="inflight")
    asked = inflight.compute_logprobs(prompt(5, 6, 7, 8))
    train(client)
    assert asked.result()[1:] == before


def test_a_request_in_work_goes_on_with_the_newer_weights_from_its_next_token():
    """The adapter is on the head alone here, so keys and values are the same, and forward tells what is right."""
    base = load_base_model(str(make_model()[0]))
    old, new = (
        make_trainer(base, rank=4, spread=0.3, seed=seed, train_attn=False, train_mlp=False)
        for seed in (0, 1)
    )
    served, sampler = Served(old.snapshot()), Sampler(reference, base)
    request = SampleRequest(
        prompt=np.array([5, 6, 7]),
        samples=2,
        served=served,
        stop=StopRule(frozenset(), (), str),
        max_tokens=9,
        future=Future(),
        seed=1,
    )
    sampler.add(request)
    for _ in range(4):
        sampler.step()
    served.snapshot = new.snapshot()
    while sampler.busy:
        sampler.step()
    for sequence in request.future.result(timeout=0).sequences:
        whole = [5, 6, 7, *sequence.tokens]
        said = [says(trainer, whole)[2:] for trainer in (old, new)]
        np.testing.assert_allclose(sequence.logprobs[:4], said[0][:4], atol=1e-5)
        np.testing.assert_allclose(sequence.logprobs[4:], said[1][4:], atol=1e-5)
        assert np.abs(said[0] - said[1]).min() > 1e-4


def says(trainer, text):
    (output,) = trainer.forward([datum(*text)], "cross_entropy", None).loss_fn_outputs
    return output["logprobs"].to_numpy()


def test_an_inflight_client_samples_like_a_snapshot_of_the_same_weights(client):
    train(client)
    kinds = [client.save_weights_and_get_sampling_client(kind=kind) for kind in ("inflight", "snapshot")]
    one, other = (tokens(draw(sampling_client, 3)) for sampling_client in kinds)
    assert one == other


def test_newer_weights_may_come_while_many_samples_are_drawn(client):
    train(client)
    inflight = client.save_weights_and_get_sampling_client(kind="inflight")
    futures = [inflight.sample(PROMPT, 4, SamplingParams(max_tokens=60, stop=[])) for _ in range(4)]
    for _ in range(3):
        train(client, steps=1)
        client.save_weights_and_get_sampling_client(kind="inflight")
    for future in futures:
        assert all(len(sequence.tokens) == 60 for sequence in future.result().sequences)


def test_another_kind_is_refused(client):
    with pytest.raises(BadRequestError, match="kind is 'mutable'"):
        client.save_weights_and_get_sampling_client(kind="mutable")
