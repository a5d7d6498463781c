"""The surface of the real client library, by introspection: what is here is the same, what is not stands in a table,
minitinker/left_out.py.

Run as a script, it prints the table.
"""

import asyncio
import dataclasses
import inspect
import tomllib
import types as python_types
import typing
from dataclasses import MISSING
from pathlib import Path

import pydantic
import pytest
import tinker
import tinker.types as theirs
from small_clients import model
from tinker.lib import retry_handler
from tinker.types.topk_logprobs import TopkLogprobs as TheirTopkLogprobs

import minitinker
from minitinker import types
from minitinker.hosted import HostedServiceError, RetryConfig, is_retryable_status_code
from minitinker.left_out import LEFT_OUT, WHY
from minitinker.types import Datum, ModelInput, TensorData

# What is there and only raises HostedServiceError, with arguments that fit.
RAISES = {
    "ServiceClient": {"get_console_url": (), "get_telemetry": ()},
    "TrainingClient": {"get_console_url": (), "get_telemetry": ()},
    "SamplingClient": {"get_telemetry": (), "on_queue_state_change": (None, None)},
    "RestClient": {
        "get_audit_log": (),
        "get_billing_usage": ("2026-01-01", "2026-02-01"),
        "assign_session_project": ("session", "project"),
        "export_session_trace": ("session",),
        "search_sessions": (None,),
        "get_telemetry": (),
    },
    "SaveWeightsResponse": {"get_console_url": ()},
    "SaveWeightsForSamplerResponse": {"get_console_url": (), "get_playground_url": ()},
}

# Where a signature differs, and how.
DIFFERENT = {
    "ServiceClient.__init__": "backend, device, dtype, recompute and cache_bytes, by keyword, say how to compute here",
    "ServiceClient.close": "status has a default, success",
}

# Fields that are ours alone, and why.
ADDED = {"ModelData": {"model_id", "lora_rank"}}  # the API's document prints them

CLIENTS = ["ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "APIFuture", "LossHandle"]
MADE_BY_USERS = ["ServiceClient", "RestClient"]
CLASSES = [getattr(types, name) for name in types.__all__ if dataclasses.is_dataclass(getattr(types, name))]


def public(thing):
    return [name for name in dir(thing) if not name.startswith("_")]


ABSENT = object()


def find(name, package, package_types):
    """What a name of the table means in a package; ABSENT where it is not there."""
    first, _, rest = name.partition(".")
    if first == "types" and rest:
        return getattr(package_types, rest, ABSENT)
    found = getattr(package, first, ABSENT)
    return getattr(found, rest, ABSENT) if rest else found


def real(cls):
    return TheirTopkLogprobs if cls is types.TopkLogprobs else getattr(theirs, cls.__name__)


def test_what_the_library_has_is_here_or_stands_in_the_table():
    exported = [
        name for name in {*tinker.__all__, *vars(tinker)} if name[0].isupper() or name in tinker.__all__
    ]
    exported = [name for name in exported if not name.startswith("_")]
    exported += [
        f"types.{name}"
        for name, value in vars(theirs).items()
        if name[0].isupper() and not isinstance(value, python_types.ModuleType)
    ]
    exported += [f"{cls}.{name}" for cls in CLIENTS for name in public(getattr(tinker, cls))]
    missing = {name for name in exported if find(name, minitinker, types) is ABSENT}
    assert missing == set(WHY)


def test_who_asks_for_what_is_left_out_is_told_why():
    for name, why in WHY.items():
        *package, last = f"minitinker.{name}".split(".")
        module = {"minitinker": minitinker, "minitinker.types": types}.get(".".join(package))
        if module is not None:
            assert not hasattr(module, last)
            with pytest.raises(AttributeError) as caught:
                getattr(module, last)
            assert str(caught.value) == f"minitinker.{name} is left out ({why})"
    for module in (minitinker, types):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_the_table_names_what_the_library_has_and_nothing_twice():
    names = [name for listed in LEFT_OUT.values() for name in listed.split()]
    assert len(names) == len(set(names))
    assert [name for name in names if find(name, tinker, theirs) is ABSENT] == []


def parameters(method):
    return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]


METHODS = [
    f"{cls}.{name}"
    for cls in CLIENTS
    for name in [*(["__init__"] if cls in MADE_BY_USERS else []), *public(getattr(tinker, cls))]
    if callable(getattr(getattr(tinker, cls), name)) and f"{cls}.{name}" not in WHY
]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_parameters_of_the_library_in_their_order_with_their_defaults(name):
    ours, their = find(name, minitinker, types), find(name, tinker, theirs)
    assert (parameters(ours) != parameters(their)) == (name in DIFFERENT)
    if name in DIFFERENT:  # ours takes whatever theirs takes
        own = {p[0]: p for p in parameters(ours)}
        for one, kind, default in parameters(their):
            assert own.pop(one)[:2] == (one, kind)
            assert (
                default is inspect.Parameter.empty
                or inspect.signature(ours).parameters[one].default == default
            )
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in own.values())
    assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(inspect.unwrap(their))


@pytest.mark.parametrize("cls", RAISES)
def test_what_belongs_to_a_hosted_account_says_so(service, client, base, cls):
    clients = {"ServiceClient": service, "TrainingClient": client, "SamplingClient": base}
    clients["RestClient"] = service.create_rest_client()
    thing = clients[cls] if cls in clients else getattr(types, cls)(path="tinker://a/weights/b")
    for name, arguments in RAISES[cls].items():
        with pytest.raises(
            HostedServiceError, match=rf"{cls}.{name}\(\) belongs to the hosted service; on one"
        ):
            getattr(thing, name)(*arguments)


def test_nobody_holds_a_connection(service, client, base):
    for thing in (service, client, base):
        with pytest.raises(HostedServiceError, match="holder belongs to the hosted service"):
            thing.holder  # noqa: B018


def test_the_attributes_that_the_library_sets_on_a_training_client_are_there(client):
    assert client.model_id == client.get_info().model_id


def test_the_names_of_the_futures_of_clients_are_those_of_the_clients():
    assert minitinker.BackcompatTrainingClientFuture is minitinker.TrainingClient
    assert minitinker.BackcompatSamplingClientFuture is minitinker.SamplingClient
    for name in ("Training", "Sampling"):
        wrapper = getattr(tinker, f"Backcompat{name}ClientFuture")
        ours = getattr(minitinker, f"Backcompat{name}ClientFuture")
        assert issubclass(ours, minitinker.APIFuture)
        assert set(public(wrapper)) - set(public(ours)) <= {"create"}


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert (minitinker.__title__, minitinker.__version__) == (project["name"], project["version"])


# Types


def fields_of(cls):
    """Public field -> default, or MISSING where it must be given; for dataclasses and pydantic models."""
    if issubclass(cls, pydantic.BaseModel):
        return {
            name: MISSING if field.is_required() else field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
        }
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in dataclasses.fields(cls)
        if not field.name.startswith("_")
    }


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_fields_and_defaults_are_those_of_the_library(cls):
    ours, their = fields_of(cls), fields_of(real(cls))
    assert ours.keys() - their.keys() == ADDED.get(cls.__name__, set())
    assert their.keys() <= ours.keys()
    if cls is Datum:  # has its own __init__
        assert Datum(ModelInput.empty()).loss_fn_inputs == their.pop("loss_fn_inputs")
    for name, default in their.items():
        if isinstance(default, pydantic.BaseModel):
            assert dataclasses.asdict(ours[name]) == default.model_dump()
        else:
            assert ours[name] == default


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_only_keywords_are_taken_where_the_library_takes_only_keywords(cls):
    ours = {name: p.kind for name, p in inspect.signature(cls).parameters.items()}
    their = {name: p.kind for name, p in inspect.signature(real(cls)).parameters.items()}
    assert {name: ours[name] for name in ours.keys() & their.keys()} == {
        name: kind for name, kind in their.items() if not name.startswith("_") and name in ours
    }
    positional = [name for name, kind in their.items() if kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [name for name in ours if name in positional] == [n for n in positional if not n.startswith("_")]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_methods_and_properties_of_the_library_are_there(cls):
    of_pydantic = {name for name in dir(real(cls)) if name.startswith(("validate_", "serialize_"))}
    expected = set(public(real(cls))) - set(dir(pydantic.BaseModel)) - of_pydantic
    assert expected - set(dir(cls)) - fields_of(cls).keys() == set()


def test_tensor_data_is_made_and_read_as_in_the_library():
    assert parameters(TensorData) == parameters(theirs.TensorData)
    for name in public(theirs.TensorData):
        ours, their = getattr(TensorData, name), getattr(theirs.TensorData, name)
        if callable(their):
            assert parameters(ours) == parameters(their)


LITERALS = [
    "TensorDtype",
    "StopReason",
    "CheckpointType",
    "LossFnType",
    "SamplingClientKind",
    "CustomLossInputRank",
]


@pytest.mark.parametrize("name", LITERALS)
def test_literals_are_those_of_the_library(name):
    assert typing.get_args(getattr(types, name)) == typing.get_args(getattr(theirs, name))


# The service's own arguments


def test_what_only_a_hosted_service_needs_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    names = {
        "display_name": "a",
        "base_url": "http://b",
        "api_key": "c",
        "default_headers_overrides": {"d": "e"},
    }
    with minitinker.ServiceClient({"f": "g"}, "project", **names, timeout=3, max_retries=2) as service:
        client = service.create_lora_training_client(model(), rank=2, optimizer=types.AdamOptimizerConfig())
        assert client.get_info().optimizer_config == types.AdamOptimizerConfig()
    with pytest.raises(minitinker.TinkerError, match="closed"), service:
        pass


def test_the_config_of_retries_is_that_of_the_library_and_is_taken_by_every_client(service, client):
    ours, their = fields_of(RetryConfig), fields_of(retry_handler.RetryConfig)
    raised = "retryable_exceptions"  # has the real library's own exceptions
    assert list(ours) == list(their)
    assert ours | {raised: None} == their | {raised: None}
    config = RetryConfig(max_connections=2)
    assert hash(config) == hash(RetryConfig(2))
    service.create_sampling_client(base_model=model(), retry_config=config).result()
    client.save_weights_and_get_sampling_client(retry_config=config).result()
    with pytest.raises(ValueError, match="max_connections is 0"):
        RetryConfig(max_connections=0)
    for status in range(200, 600):
        assert is_retryable_status_code(status) == retry_handler.is_retryable_status_code(status)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_service_that_an_exception_leaves_drops_what_has_not_begun(monkeypatch, tmp_path, error):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    text = [Datum(ModelInput.from_ints([1] * 200), {"target_tokens": [1] * 200})] * 9
    futures = []

    def leave():
        with minitinker.ServiceClient() as service:
            client = service.create_lora_training_client(model(), rank=2)
            futures.extend(client.forward(text, "cross_entropy") for _ in range(9))
            raise error

    with pytest.raises(error):
        leave()
    assert futures[-1].future().cancelled()


def test_an_argument_that_nobody_knows_is_refused():
    with pytest.raises(TypeError, match="ServiceClient takes no argument 'bakcend'"):
        minitinker.ServiceClient(bakcend="reference")


def test_another_optimizer_is_refused_wherever_it_is_named(service, client):
    muon = types.DimuonParams(learning_rate=0.1)
    calls = [
        lambda: service.create_lora_training_client(model(), optimizer=types.DimuonOptimizerConfig()),
        lambda: client.optim_step(muon),
        lambda: asyncio.run(client.optim_step_async(muon)),
    ]
    for call in calls:
        with pytest.raises(minitinker.BadRequestError, match="Dimuon"):
            call()


def test_stability_information_is_refused_wherever_it_is_asked_for(service, client):
    calls = [
        lambda: service.create_sampling_client(base_model=model(), record_stability_info=True),
        lambda: client.create_sampling_client("tinker://a/weights/b", record_stability_info=True),
        lambda: client.save_weights_and_get_sampling_client(record_stability_info=True),
    ]
    for call in calls:
        with pytest.raises(
            HostedServiceError, match="record_stability_info=True belongs to the hosted service"
        ):
            call()


if __name__ == "__main__":
    for left_out, why in WHY.items():
        print(f"{left_out:46} {why}")
    for different, how in DIFFERENT.items():
        print(f"{different:46} differs: {how}")
