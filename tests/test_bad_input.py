"""Whatever is given to a client, it is taken or refused by name, and what is refused leaves no trace.

`MINITINKER_FUZZ=5000 pytest -s tests/test_bad_*.py` tries so many inputs a law, other ones each time, and prints
how many it tried. test_bad_data.py and test_bad_types.py do the same for data and for the types of the API.
"""

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import Future
from numbers import Real
from typing import Any

import pytest
from bad_calls import ARGUMENTS, CALLS, CONTEXT, METHODS, OTHER_NAMES, cases
from bad_values import LIMIT, Case, check_told, count, flag, fuzz, notes, nothing, nowhere, odd, whole, words
from bad_world import World
from hypothesis import given
from hypothesis import strategies as st
from small_clients import PROMPT, prompt, tokens
from tiny_models import VOCAB

from minitinker import APIFuture, RestClient, SamplingClient, ServiceClient, TrainingClient
from minitinker.errors import BadRequestError, TinkerError
from minitinker.types import AdamParams, SamplingParams, TensorData


def find(world: World, target: str, in_async: bool) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A method, or one that runs its twin, and arguments that are taken."""
    client, method = target.split(".")
    good, _ = CALLS[client][method]
    twin = getattr(getattr(world, client), f"{method}_async", None)
    if in_async and twin is not None:
        return lambda **arguments: asyncio.run(asyncio.wait_for(twin(**arguments), LIMIT)), good(world)
    return getattr(getattr(world, client), method), good(world)


def check(world: World, target: str, argument: str, case: Case, in_async: bool) -> None:
    """A call with this argument is taken where it has to be, else refused by name and without a trace."""
    call, good = find(world, target, in_async)
    count(f"wrong arguments of the {target.split('.')[0]} client")
    try:
        value = case.make()
    except (TypeError, ValueError) as error:
        assert case.taken is not True
        check_told(error, *case.names)
        return
    if argument == "rank" and whole(500, 1 << 20)(value):
        return  # it is right where there is memory for it
    if target.endswith(".forward_backward_custom") and argument == "loss_fn" and case.taken is None:
        return  # a function, which raises what it likes
    raised = world.checked(lambda: call(**good | {argument: value}))
    if case.taken is False:
        assert raised is not None, "it was taken"
    if case.taken is True:
        assert raised is None, raised
    if raised is not None:
        check_told(raised, *case.names)


# Calls


@fuzz(600)
@given(chosen=st.sampled_from(ARGUMENTS), data=st.data(), in_async=st.booleans())
def test_a_wrong_argument_is_refused_by_name_and_leaves_no_trace(world, chosen, data, in_async):
    target, argument, slot = chosen
    check(world, target, argument, data.draw(slot.drawn), in_async)


@pytest.mark.parametrize("client", CALLS)
def test_what_is_near_the_rule_of_an_argument_is_taken_or_refused_by_it(world, client):
    for target, argument, slot in ARGUMENTS:
        if target.startswith(f"{client}."):
            for case in slot.listed:
                try:
                    check(world, target, argument, case, in_async=False)
                except BaseException as error:
                    error.add_note(f"{target}: {argument} is {case}")
                    raise


@pytest.mark.parametrize("name", ["misfit", "external", "without_moments"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_its_path_and_leaves_no_trace(world, name):
    path = getattr(world, name)
    raised = world.checked(lambda: world.training.load_state_with_optimizer(path))
    check_told(raised, path)


@fuzz(250)
@given(data=st.data())
def test_whatever_all_arguments_are_a_call_is_taken_or_refused_without_a_trace(world, data):
    target = data.draw(st.sampled_from([one for one in METHODS if one != "service.close"]))
    client, method = target.split(".")
    slots = CALLS[client][method][1]
    call, good = find(world, target, data.draw(st.booleans()))
    count("calls with all arguments odd")
    try:
        given_here = {argument: data.draw(slot.drawn).make() for argument, slot in slots.items()}
    except (TypeError, ValueError):
        return  # one could not be made
    if method == "forward_backward_custom" and callable(given_here["loss_fn"]):
        return
    if whole(65, 4096)(given_here.get("num_samples")):
        return  # it may be right, and take minutes
    raised = world.checked(lambda: call(**good | given_here))
    names = {name for argument in slots for name in (argument, *NAMES.get(argument, ()))}
    if raised is not None:
        check_told(raised, *names)


NAMES = {
    **dict.fromkeys(
        ["path", "tinker_path", "model_path", "checkpoint_id"], ("tinker://", "run id", "adapter", "the name")
    ),
    "base_model": ("model", "folder"),
    "training_run_id": ("run id", "training run"),
    "loss_fn": ("loss",),
    "fn": ("parameter", "takes"),
    "sampling_params": ("temperature", "top_", "max_tokens", "seed", "stop"),
    "optim_params": ("AdamParams",),
    "sampler_id": ("sampler",),
    "handle": ("sampler", "process"),
    "session_id": ("session",),
    "loss_fn_config": ("config",),
}


def test_the_value_of_a_key_of_the_wrong_type_is_not_told(world):
    makers = [ServiceClient, RestClient, lambda **key: SamplingClient.from_sampler_handle("", **key)]
    for make in makers:
        with pytest.raises(BadRequestError, match=r"^api_key is of type bytes; it must be a str or None$"):
            make(api_key=b"secret")


def test_every_argument_of_every_method_is_tried():
    """All but second names of one, and the methods that ask for a hosted account."""
    clients = {
        "service": ServiceClient,
        "training": TrainingClient,
        "sampling": SamplingClient,
        "rest": RestClient,
    }
    for client, cls in clients.items():
        for method, (_, slots) in CALLS[client].items():
            names = set(inspect.signature(getattr(cls, method)).parameters) - OTHER_NAMES
            assert names - {"self"} == set(slots), (client, method)
        methods = [name for name, x in vars(cls).items() if callable(x) and not name.startswith("_")]
        own = {name for name in methods if len(inspect.signature(getattr(cls, name)).parameters) > 1}
        assert {name for name in own if not name.endswith("_async")} - HOSTED == set(CALLS[client])


HOSTED = {
    *(
        "get_audit_log",
        "get_billing_usage",
        "assign_session_project",
        "export_session_trace",
        "search_sessions",
    ),
    "on_queue_state_change",
}


# Clients and futures themselves


def no_backend(x: Any) -> bool | None:
    return None if x is None or (isinstance(x, str) and x in ("", "reference", "kernels")) else False


SERVICE = {
    "user_metadata": cases("user_metadata", notes),
    "backend": cases("backend", no_backend),
    "device": cases(
        "device", lambda x: True if x is None else None if isinstance(x, str) and x == "cpu" else False
    ),
    "dtype": cases("dtype", nothing),
    "recompute": cases("recompute", lambda x: True if x is None else flag(x)),
    **{name: cases(name, words) for name in ("project_id", "display_name", "base_url", "api_key")},
    "default_headers_overrides": cases("default_headers_overrides", notes),
    "no_such": cases("no_such", nowhere),
}
REST = {
    "_holder": cases("_holder", nothing),
    "base_url": cases("base_url", words),
    "api_key": cases("api_key", words),
}


@fuzz(120)
@given(data=st.data())
def test_a_client_is_not_made_of_wrong_arguments(world, data):
    cls, slots = data.draw(st.sampled_from([(ServiceClient, SERVICE), (RestClient, REST)]))
    argument = data.draw(st.sampled_from(list(slots)))
    case = data.draw(slots[argument].drawn)
    count(f"wrong arguments of {cls.__name__}()")
    right = {"backend": "reference"} if cls is ServiceClient else {}
    try:
        made = cls(**right | {argument: case.make()})
    except (TinkerError, TypeError) as error:
        assert case.taken is not True
        check_told(error, *case.names)
    else:
        assert case.taken is not False, "it was taken"
        if cls is ServiceClient:
            made.close("errored")


@fuzz(150)
@given(make=odd, in_async=st.booleans(), done=st.booleans())
def test_a_timeout_is_a_number_or_refused(make, in_async, done):
    future: Future[int] = Future()
    answer, timeout = APIFuture(future), make()
    count("timeouts")
    if done or timeout is None or (isinstance(timeout, Real) and not timeout <= 0):
        future.set_result(1)  # else this would wait for it
    try:
        got = asyncio.run(answer.result_async(timeout)) if in_async else answer.result(timeout)
    except BadRequestError as error:
        check_told(error, "timeout")
    except TimeoutError:
        assert not done
    else:
        assert got == 1


# What is largest


LARGEST = {
    "num_samples": (4096, {}),
    "topk_prompt_logprobs": (VOCAB, {}),
    "topk_sample_logprobs": (VOCAB, {}),
    "prompt_alt_tokens_k": (4096, {}),
    "prompt_logprobs_last_n": (2, {"include_prompt_logprobs": True}),
    "target_prompt_logprobs": (TensorData([1] * 2 * VOCAB, "int64", [2, VOCAB]), {}),
}


@pytest.mark.parametrize("argument", LARGEST)
def test_the_largest_argument_of_a_sample_is_taken(world, argument):
    value, others = LARGEST[argument]
    arguments = {"num_samples": 1, argument: value, **others}
    params = SamplingParams(max_tokens=1)
    response = world.sampling.sample(PROMPT, sampling_params=params, **arguments).result(LIMIT)
    assert len(response.sequences) == arguments["num_samples"]


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 10**30},
        {"max_tokens": None},
        {"seed": 2**64 - 1},
        {"top_k": 10**30},
        {"temperature": 1e308},
        {"temperature": 5e-324},
        {"top_p": 5e-324},
        {"stop": "x" * 10**6},
        {"stop": list(range(VOCAB))},
    ],
    ids=lambda field: next(iter(field)),
)
def test_the_largest_field_of_sampling_params_is_taken(world, field):
    response = world.sampling.sample(PROMPT, 1, SamplingParams(**{"max_tokens": 3} | field)).result(LIMIT)
    assert 1 <= len(tokens(response)[0]) <= CONTEXT


def test_a_prompt_may_leave_room_for_one_token(world):
    whole = prompt(*[VOCAB - 1] * (CONTEXT - 1))
    assert (
        len(tokens(world.sampling.sample(whole, 1, SamplingParams(max_tokens=10**9)).result(LIMIT))[0]) == 1
    )
    assert len(world.sampling.compute_logprobs(prompt(*[0] * CONTEXT)).result(LIMIT)) == CONTEXT


@pytest.mark.parametrize(
    "field",
    [
        {"learning_rate": 9e14},
        {"beta1": 1 - 1e-16, "beta2": 1 - 1e-16},
        {"eps": 1.2e-38},
        {"grad_clip_norm": 1e308},
    ],
)
def test_the_largest_hyperparameters_are_taken(world, field):
    raised = world.checked(lambda: world.training.optim_step(AdamParams(**field)))
    assert raised is None
