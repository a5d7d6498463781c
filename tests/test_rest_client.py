"""rest_client.py: the methods of the client library, on the storage of this machine."""

import asyncio
import inspect
from datetime import UTC, datetime
from urllib.request import urlopen

import pytest
import tinker
from small_clients import model, prompt, saved
from tinker.lib.public_interfaces.rest_client import RestClient as TheirRestClient

import minitinker
from minitinker import RestClient, ServiceClient
from minitinker.errors import BadRequestError, ConflictError, NotFoundError
from minitinker.hosted import HostedServiceError
from minitinker.types import SamplingParams

HOSTED = {  # what belongs to an account, with arguments that fit
    "get_audit_log": (),
    "get_billing_usage": ("2026-01-01", "2026-02-01"),
    "assign_session_project": ("session", "project"),
    "export_session_trace": ("session",),
    "search_sessions": (None,),
    "get_telemetry": (),
}
PUBLIC = [name for name in vars(TheirRestClient) if not name.startswith("_")]


@pytest.fixture
def rest(service):
    return service.create_rest_client()


@pytest.fixture
def path(client):
    return client.save_state("state", user_metadata={"k": "v"}).result().path


def described(method):
    """Name, kind and default of each parameter."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]


@pytest.mark.parametrize("name", ["__init__", *PUBLIC])
def test_every_method_has_the_parameters_of_the_client_library(name):
    ours, theirs = getattr(RestClient, name), getattr(TheirRestClient, name)
    assert described(ours) == described(theirs)
    assert inspect.iscoroutinefunction(ours) == name.endswith("_async")


def test_there_are_no_methods_that_the_client_library_lacks():
    assert {name for name in vars(RestClient) if not name.startswith("_")} <= set(PUBLIC)
    assert minitinker.RestClient.__name__ == tinker.RestClient.__name__


@pytest.mark.parametrize("name", HOSTED)
def test_what_belongs_to_an_account_says_so(name, rest):
    said = rf"^RestClient\.{name}\(\) belongs to the hosted service; on one machine "
    with pytest.raises(HostedServiceError, match=said):
        getattr(rest, name)(*HOSTED[name])
    with pytest.raises(TypeError):
        getattr(rest, name)(unknown=1)
    if hasattr(rest, f"{name}_async"):
        with pytest.raises(HostedServiceError, match=said):
            asyncio.run(getattr(rest, f"{name}_async")(*HOSTED[name]))


def test_arguments_that_belong_to_an_account_are_refused_and_not_ignored(rest, path):
    calls = {
        "project_id": lambda: rest.list_training_runs(project_id="p"),
        "destination_project_id": lambda: rest.copy_weights(path, "p"),
        "weights_access_token": lambda: rest.copy_weights(path, weights_access_token="t"),
    }
    for name, call in calls.items():
        with pytest.raises(HostedServiceError, match=f"^{name}="):
            call()
    with pytest.raises(HostedServiceError, match=r"^project_id="):
        rest.get_current_checkpoint_storage_usage("p")
    with pytest.raises(BadRequestError, match="access_scope is 'all'"):
        rest.get_training_run("run", "all")


def test_a_server_and_a_key_are_taken_and_change_nothing(rest, path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(rest._store.root))
    elsewhere = RestClient(base_url="http://localhost", api_key="key")
    found = elsewhere.list_user_checkpoints().result()
    assert found == rest.list_user_checkpoints().result()
    assert path in [one.tinker_path for one in found.checkpoints]


def test_a_run_is_there_from_its_beginning_and_lists_its_checkpoints(service, rest):
    client = service.create_lora_training_client(model(), rank=3, user_metadata={"renderer": "plain"})
    run_id = client.get_info().model_id
    run = rest.get_training_run(run_id).result()
    assert (run.base_model, run.lora_rank, run.user_metadata) == (model(), 3, {"renderer": "plain"})
    assert rest.list_checkpoints(run_id).result().checkpoints == []
    path = client.save_state("a").result().path
    client.save_weights_for_sampler("b").result()
    client.save_weights_external("c").result()
    listed = rest.list_checkpoints(run_id).result()
    assert [one.checkpoint_type for one in listed.checkpoints] == ["external", "sampler", "training"]
    assert listed.cursor is None
    assert rest.get_training_run_by_tinker_path(path).result().last_checkpoint == listed.checkpoints[2]
    runs = rest.list_training_runs(limit=1).result()
    assert [one.training_run_id for one in runs.training_runs] == [run_id]
    assert runs.cursor.total_count >= 1
    mine = rest.list_user_checkpoints(limit=2, offset=1).result()
    assert mine.checkpoints == listed.checkpoints[1:]
    assert mine.cursor.offset == 1


def test_a_checkpoint_is_deleted_by_its_run_and_id_or_by_its_path(rest, client, path):
    run_id = client.get_info().model_id
    rest.delete_checkpoint(run_id, "weights/state").result()
    with pytest.raises(NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result()
    other = client.save_weights_for_sampler("other").result().path
    rest.delete_checkpoint_from_tinker_path(other).result()
    assert rest.list_checkpoints(run_id).result().checkpoints == []
    for run, checkpoint in ((run_id, "../other"), ("..", "weights/a"), (run_id, "weights"), (run_id, None)):
        with pytest.raises(BadRequestError):
            rest.delete_checkpoint(run, checkpoint).result()


def test_a_copy_is_of_a_new_run_that_keeps_the_notes_of_the_old(service, rest):
    client = service.create_lora_training_client(model(), rank=3, user_metadata={"renderer": "plain"})
    path = client.save_weights_for_sampler("a", user_metadata={"k": "v"}).result().path
    copy = rest.copy_weights(path, ttl_seconds=1000).result()
    run = rest.get_training_run_by_tinker_path(copy).result()
    assert run.training_run_id != client.get_info().model_id
    assert (run.user_metadata, run.lora_rank) == ({"renderer": "plain"}, 3)
    assert run.last_sampler_checkpoint.user_metadata == {"k": "v"}
    assert run.last_sampler_checkpoint.expires_at > datetime.now(UTC)
    rest.delete_checkpoint_from_tinker_path(path).result()
    service.create_sampling_client(copy).result()


def test_expiry_and_publicity_are_changed_and_seen(rest, client, path):
    def checkpoint():
        return rest.get_training_run_by_tinker_path(path).result().last_checkpoint

    rest.set_checkpoint_ttl_from_tinker_path(path, 1000).result()
    assert 900 < (checkpoint().expires_at - datetime.now(UTC)).total_seconds() <= 1000
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert checkpoint().expires_at is None
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert checkpoint().public
    with pytest.raises(ConflictError, match="public already"):
        rest.publish_checkpoint_from_tinker_path(path).result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert not checkpoint().public
    assert checkpoint().user_metadata == {"k": "v"}
    client.load_state_with_optimizer(path).result()


def test_errors_come_when_the_result_is_asked_for(rest):
    future = rest.delete_checkpoint_from_tinker_path("tinker://nobody/weights/nothing")
    with pytest.raises(NotFoundError, match="nobody"):
        future.result()
    with pytest.raises(BadRequestError, match="must be tinker://"):
        rest.get_training_run_by_tinker_path("/etc/passwd").result()


def test_weights_info_and_usage(rest, path):
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == (model(), 4, True)
    (usage,) = rest.get_current_checkpoint_storage_usage().result().data
    assert usage.size_bytes >= rest.get_training_run_by_tinker_path(path).result().last_checkpoint.size_bytes


def test_urls_of_external_weights_can_be_read(rest, client, path):
    external = client.save_weights_external("merged", ttl_seconds=1000).result().path
    answer = rest.get_external_weights_urls(external).result()
    with urlopen(answer.urls["config.json"]) as file:
        assert b"Qwen3ForCausalLM" in file.read()
    assert answer.expires > datetime.now(UTC)
    assert "model.safetensors" in answer.urls
    with pytest.raises(BadRequestError, match="of the kind weights; it must be external_weights"):
        rest.get_external_weights_urls(path).result()


def test_a_session_knows_its_runs_and_its_samplers(service, rest, client):
    sampler = service.create_sampling_client(base_model=model()).result()
    from_path = service.create_sampling_client(client.save_weights_for_sampler("a").result().path).result()
    (session_id, *_) = rest.list_sessions().result().sessions
    session = rest.get_session(session_id).result()
    assert client.get_info().model_id in session.training_run_ids
    infos = [rest.get_sampler(one).result() for one in session.sampler_ids]
    assert {(info.base_model, info.model_path) for info in infos} >= {
        (model(), None),
        (model(), f"tinker://{client.get_info().model_id}/sampler_weights/a"),
    }
    for one in (sampler, from_path):
        one.sample(prompt(1), 1, SamplingParams(max_tokens=1)).result()
    with pytest.raises(NotFoundError, match="no sampler 'nobody'"):
        rest.get_sampler("nobody").result()
    with pytest.raises(NotFoundError, match="no session 'nobody'"):
        rest.get_session("nobody").result()


def test_a_rest_client_of_its_own_sees_the_storage(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    assert RestClient().list_sessions().result().sessions == []
    assert RestClient().list_user_checkpoints().result().checkpoints == []
    assert not (tmp_path / ".lock").exists()
    service = ServiceClient(user_metadata={"who": "me"})
    path = service.create_lora_training_client(model(), rank=2).save_state("a").result().path
    service.close()
    rest = RestClient()
    (session,) = rest.list_sessions().result().sessions
    assert rest.get_session(session).result().user_metadata == {"who": "me"}
    assert [one.tinker_path for one in rest.list_user_checkpoints().result().checkpoints] == [path]
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert not saved(tmp_path, path).exists()


def test_who_asks_and_what_there_is(rest):
    who = rest.whoami().result()
    assert who.user_urn.startswith("local:user:")
    assert who.org_urn.startswith("local:machine:")
    (only,) = rest.get_server_capabilities().result().supported_models
    assert only.model_name == "minitinker/tiny"


def test_every_twin_gives_the_result_itself(rest, client, path):
    async def calls():
        run = await rest.get_training_run_async(client.get_info().model_id)
        assert run == await rest.get_training_run_by_tinker_path_async(path)
        assert (await rest.list_training_runs_async(1)).training_runs == [run]
        assert len((await rest.list_checkpoints_async(run.training_run_id)).checkpoints) == 1
        assert (await rest.list_user_checkpoints_async(limit=0)).checkpoints == []
        copy = await rest.copy_weights_async(path)
        await rest.set_checkpoint_ttl_from_tinker_path_async(copy, 1000)
        await rest.publish_checkpoint_from_tinker_path_async(copy)
        await rest.unpublish_checkpoint_from_tinker_path_async(copy)
        await rest.delete_checkpoint_from_tinker_path_async(copy)
        await rest.delete_checkpoint_async(run.training_run_id, "weights/state")
        assert (await rest.get_current_checkpoint_storage_usage_async()).data
        (session, *_) = (await rest.list_sessions_async(limit=1)).sessions
        assert run.training_run_id in (await rest.get_session_async(session)).training_run_ids
        with pytest.raises(NotFoundError):
            await rest.get_sampler_async("nobody")

    asyncio.run(calls())
