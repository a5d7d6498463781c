import asyncio
import gc
import shutil
import threading
import time
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from small_clients import datum, model, prompt, saved, train, weights
from transformers import AutoModelForCausalLM

from minitinker import ServiceClient, backend
from minitinker.errors import BadRequestError, NotFoundError, TinkerError
from minitinker.hosted import HostedServiceError
from minitinker.types import AdamOptimizerConfig, AdamParams, DimuonOptimizerConfig, SamplingParams

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


def test_a_run_begins_from_an_adapter_that_was_made_elsewhere(service, client, tmp_path):
    train(client)
    folder = service._session.store.find(client.save_weights_for_sampler("elsewhere").result().path)
    shutil.copytree(folder, tmp_path / "adapter")
    (tmp_path / "adapter" / "minitinker.json").unlink()
    begun = service.create_training_client_from_state(str(tmp_path / "adapter"), model())
    np.testing.assert_array_equal(weights(begun), weights(client))
    begun.forward_backward(DATA, "cross_entropy")
    begun.optim_step(STEP).result()
    again = service.create_training_client_from_state(begun.save_state("a").result().path)
    np.testing.assert_array_equal(weights(again), weights(begun))
    with pytest.raises(BadRequestError, match="no optimizer state"):
        service.create_training_client_from_state_with_optimizer(str(tmp_path / "adapter")).result()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for what it has renamed
def test_a_run_on_some_kinds_of_linears_trains_those_and_no_others(service, tmp_path):
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model()), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    made.save_pretrained(tmp_path)
    client = service.create_training_client_from_state(str(tmp_path), base_model=model())
    train(client)
    kinds = {name.rpartition(".")[2] for name in client._run.trainer.spec.shapes}
    assert kinds == {"q_proj", "down_proj"}
    again = service.create_training_client_from_state_with_optimizer(client.save_state("a").result().path)
    np.testing.assert_array_equal(weights(again), weights(client))


def test_a_run_begins_from_a_checkpoints_folder_with_its_optimizer(service, client):
    train(client)
    folder = service._session.store.find(client.save_state("folder").result().path)
    begun = service.create_training_client_from_state_with_optimizer(str(folder), base_model=model())
    assert begun.result()._run.trainer.step == 2


def test_another_base_token_or_optimizer_is_refused(service, client):
    path = client.save_state("base").result().path
    make = service.create_training_client_from_state
    with pytest.raises(BadRequestError, match=r"base_model is 'minitinker/tiny'; .* was trained on"):
        make(path, "minitinker/tiny").result()
    with pytest.raises(HostedServiceError, match="weights_access_token='secret'"):
        make(path, weights_access_token="secret")
    with pytest.raises(HostedServiceError, match="weights_access_token"):
        service.copy_weights(path, weights_access_token="secret")
    for optimizer in (DimuonOptimizerConfig(), "adamw"):
        with pytest.raises(BadRequestError, match=r"it must be None or AdamOptimizerConfig\(\)"):
            make(path, optimizer=optimizer)
    assert make(path, optimizer=AdamOptimizerConfig()).get_info().lora_rank == 4


def test_a_copy_belongs_to_this_session_and_can_be_trained_on(service, client):
    train(client)
    path = client.save_state("original").result().path
    copy = service.copy_weights(path, ttl_seconds=1000).result()
    np.testing.assert_array_equal(weights(service.create_training_client_from_state(copy)), weights(client))
    session = service.create_rest_client().get_session(service._session.id).result()
    assert copy.split("/")[2] in session.training_run_ids


def test_what_has_expired_is_swept_when_a_service_begins(own, tmp_path, monkeypatch):
    client = own[0].create_lora_training_client(model(), rank=2)
    path = client.save_state("short", ttl_seconds=1).result().path
    time.sleep(1.1)
    with pytest.raises(NotFoundError, match="expired"):
        client.load_state(path).result()
    assert saved(tmp_path, path).is_dir()
    service = ServiceClient()
    service.close()
    assert not saved(tmp_path, path).exists()


def test_notes_are_kept_with_what_they_were_given_to(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    service = ServiceClient(user_metadata={"who": "me", "what": "all"})
    client = service.create_lora_training_client(model(), rank=2, user_metadata={"what": "this"})
    path = client.save_state("noted", user_metadata={"which": "first"}).result().path
    rest = service.create_rest_client()
    run = rest.get_training_run_by_tinker_path(path).result()
    assert run.last_checkpoint.user_metadata == {"which": "first"}
    assert run.user_metadata == {"what": "this"}
    (session,) = rest.list_sessions().result().sessions
    assert rest.get_session(session).result().user_metadata == {"who": "me", "what": "all"}
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
        own[0].__enter__,
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
        with pytest.raises(TinkerError, match="the ServiceClient is closed; make a new one") as caught:
            call()
        assert isinstance(caught.value, RuntimeError)  # what the hosted service's library raises


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
