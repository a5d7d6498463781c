import asyncio
import gc
import inspect
import threading
import time
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
from small_clients import datum, model, prompt, saved, train, weights

from minitinker import ServiceClient, backend
from minitinker.errors import BadRequestError, NotFoundError, TinkerError
from minitinker.types import AdamParams, SamplingParams

DATA = [datum(1, 2, 3, 4), datum(9, 8, 7)]
STEP = AdamParams(learning_rate=0.01)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A ServiceClient for one test alone, to be closed or dropped."""
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    services = [ServiceClient()]
    worker = services[0]._session.worker
    yield services
    worker.close(finish=False)


# What the hosted service has


@pytest.mark.parametrize(
    ("name", "documented"),
    [
        (
            "create_lora_training_client",
            "base_model, rank=32, seed=None, train_mlp=True, train_attn=True, train_unembed=True, "
            "user_metadata=None",
        ),
        ("create_training_client_from_state", "path"),
        ("create_training_client_from_state_with_optimizer", "path"),
        ("create_sampling_client", "model_path=None, base_model=None, retry_config=None"),
        ("get_server_capabilities", ""),
    ],
)
def test_every_method_and_its_async_twin_begin_with_the_documented_parameters(name, documented):
    plain, twin = (getattr(ServiceClient, name + end) for end in ("", "_async"))
    assert inspect.iscoroutinefunction(twin)
    assert list(inspect.signature(plain).parameters) == list(inspect.signature(twin).parameters)
    for method in (plain, twin):
        parameters = list(inspect.signature(method).parameters.values())[1:]
        shown = [
            p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}" for p in parameters
        ]
        names = documented.split(", ") if documented else []
        assert shown[: len(names)] == names
        assert all("=" in further for further in shown[len(names) :])


def test_the_embedded_model_is_always_there(service):
    (only,) = service.get_server_capabilities().supported_models
    assert only.model_name == "minitinker/tiny"
    assert only.max_context_length == 512
    assert only.trainable
    assert only.sampleable
    assert asyncio.run(service.get_server_capabilities_async()).supported_models == [only]


def test_an_unknown_backend_is_refused():
    with pytest.raises(BadRequestError, match="no backend 'abacus'; there are: reference, kernels"):
        ServiceClient(backend="abacus")


def test_storage_is_where_the_environment_says(own, tmp_path):
    assert backend.storage_folder() == tmp_path
    client = own[0].create_lora_training_client(model(), rank=2)
    assert saved(tmp_path, client.save_state("here").result().path).is_dir()


# Making clients


def test_the_seed_makes_an_adapter_the_same_each_time(service):
    def make(seed):
        return weights(service.create_lora_training_client(model(), rank=4, seed=seed))

    np.testing.assert_array_equal(make(1), make(1))
    assert not np.array_equal(make(1), make(2))
    assert not np.array_equal(make(None), make(None))


def test_the_parameters_of_a_training_client_reach_its_adapter(service):
    client = service.create_lora_training_client(model(), 3, 0, True, False, False)
    spec = client.result()._run.trainer.spec
    assert spec.rank == 3
    assert all(".mlp." in name for name in spec.shapes)
    assert client.get_info().lora_rank == 3


def test_a_run_goes_on_from_a_state_with_and_without_its_optimizer(service, client):
    train(client)
    path = client.save_state("state").result().path
    whole = service.create_training_client_from_state_with_optimizer(path)
    anew = asyncio.run(service.create_training_client_from_state_async(path))
    for one in (whole, anew):
        np.testing.assert_array_equal(weights(one), weights(client))
        assert one.get_info().model_id != client.get_info().model_id
        assert one.get_info().lora_rank == 4
    assert (whole._run.trainer.step, anew._run.trainer.step) == (2, 0)
    for one in (client, whole, anew):
        one.forward_backward(DATA, "cross_entropy")
        one.optim_step(STEP).result()
    np.testing.assert_array_equal(weights(whole), weights(client))
    assert not np.array_equal(weights(anew), weights(client))


def test_what_is_not_saved_cannot_be_gone_on_from(service, client):
    nowhere = "tinker://nobody/weights/nothing"
    for make in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
        service.create_sampling_client,
    ):
        with pytest.raises(NotFoundError, match="nobody"):
            make(nowhere).result()
    sampler = client.save_weights_for_sampler("sampler").result().path
    with pytest.raises(BadRequestError, match="no optimizer state"):
        service.create_training_client_from_state_with_optimizer(sampler).result()


def test_notes_of_the_service_and_the_client_are_saved_together(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    service = ServiceClient(user_metadata={"who": "me", "what": "all"})
    client = service.create_lora_training_client(model(), rank=2, user_metadata={"what": "this"})
    path = client.save_state("noted").result().path
    assert service._session.store.load(path).user_metadata == {"who": "me", "what": "this"}
    service.close()


# Closing


def test_closing_finishes_what_was_asked_for(own, tmp_path):
    client = own[0].create_lora_training_client(model(), rank=2)
    sample = (
        own[0].create_sampling_client(base_model=model()).sample(prompt(1), 2, SamplingParams(max_tokens=20))
    )
    for _ in range(3):
        client.forward_backward(DATA, "cross_entropy")
        client.optim_step(STEP)
    state = client.save_state("last")
    own[0].close()
    assert saved(tmp_path, state.result(timeout=0).path).is_dir()
    assert len(sample.result(timeout=0).sequences) == 2


@pytest.mark.parametrize("status", ["errored", "interrupted"])
def test_closing_after_a_failure_drops_what_has_not_begun(own, status):
    client = own[0].create_lora_training_client(model(), rank=2)
    sampling_client = own[0].create_sampling_client(base_model=model()).result()
    begun = threading.Event()
    own[0]._session.submit(begun.set)
    samples = [sampling_client.sample(prompt(1), 8, SamplingParams(stop=[])) for _ in range(20)]
    futures = [client.forward_backward(DATA, "cross_entropy") for _ in range(200)]
    futures += [*samples, sampling_client.compute_logprobs(prompt(1, 2))]
    futures.append(own[0].create_lora_training_client(model(), rank=2))
    begun.wait(timeout=10)
    own[0].close(status)
    assert not wait([future.future() for future in futures], timeout=0).not_done
    for future in futures[-5:]:
        with pytest.raises(CancelledError):
            future.result(timeout=0)


def test_calls_after_closing_say_so(own):
    client = own[0].create_lora_training_client(model(), rank=2).result()
    sampling_client = client.save_weights_and_get_sampling_client().result()
    own[0].close()
    own[0].close()
    calls = [
        lambda: own[0].create_lora_training_client(model()).result(),
        lambda: own[0].create_training_client_from_state("tinker://a/weights/b").result(),
        lambda: own[0].create_sampling_client(base_model=model()).result(),
        lambda: client.forward(DATA, "cross_entropy").result(),
        lambda: client.forward_backward(DATA, "cross_entropy").result(),
        lambda: client.forward_backward_custom(DATA, None).result(),
        lambda: client.optim_step(STEP).result(),
        lambda: client.save_state("a").result(),
        lambda: client.save_weights_and_get_sampling_client().result(),
        lambda: client.get_info(),
        lambda: sampling_client.sample(prompt(1), 1, SamplingParams()).result(),
        lambda: sampling_client.compute_logprobs(prompt(1)).result(),
        lambda: asyncio.run(client.get_info_async()),
    ]
    for call in calls:
        with pytest.raises(TinkerError, match="the ServiceClient is closed; make a new one"):
            call()


def test_one_service_may_close_while_another_goes_on(own, service):
    client = service.create_lora_training_client(model(), rank=2)
    own[0].create_lora_training_client(model(), rank=2).result()
    own[0].close()
    assert client.forward(DATA, "cross_entropy").result().loss > 0


@pytest.mark.parametrize("failing", [False, True])
def test_the_thread_ends_with_the_last_client(own, failing):
    thread = own[0]._session.worker.thread
    client = own[0].create_lora_training_client(model(), rank=2)
    own.clear()
    train(client)
    sampling_client = client.save_weights_and_get_sampling_client()
    if failing:
        with pytest.raises(BadRequestError):
            client.forward([], "cross_entropy").result()
    del client
    time.sleep(0.01)
    assert sampling_client.sample(prompt(1), 1, SamplingParams(max_tokens=2)).result().sequences
    assert thread.is_alive()
    del sampling_client
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_what_was_asked_for_is_finished_though_nobody_holds_the_client(own, tmp_path):
    client = own.pop().create_lora_training_client(model(), rank=2)
    state = client.save_state("kept")
    del client
    assert saved(tmp_path, state.result(timeout=30).path).is_dir()
