"""loss_handles.py: losses made by create_custom_loss, traced, and run as they are by forward_backward_custom."""

import asyncio
import math

import numpy as np
import pytest
import tinker
import torch
from small_clients import datum, weights
from tinker.lib.public_interfaces import custom_loss as theirs

from minitinker import LossHandle, ServiceClient
from minitinker.errors import BadRequestError
from minitinker.loss_handles import trace_loss
from minitinker.types import AdamParams, CustomLossInput

ONE = {"logprobs": 1, "weights": 1}
DATA = [datum(1, 2, 3, 4, weights=[1.0, 0.0, 2.0]), datum(9, 8, 7, weights=[-1.0, 0.5])]


def neg_ll(logprobs, weights):
    loss = -(logprobs * weights).sum()
    return loss, {"custom/neg_ll:sum": loss, "custom/longest:mean": torch.exp(logprobs).sum()}


def test_a_traced_loss_gives_what_the_same_loss_gives_untraced(service, client):
    handle = service.create_custom_loss(neg_ll, ONE).result()
    assert isinstance(handle, LossHandle)
    traced = client.forward_backward_custom(DATA, handle).result()
    client.optim_step(AdamParams(learning_rate=0)).result()

    def whole(data, logprobs):
        parts = [
            neg_ll(lp, one.loss_fn_inputs["weights"].to_torch())
            for one, lp in zip(data, logprobs, strict=True)
        ]
        return sum(loss for loss, _ in parts), {}

    plain = client.forward_backward_custom(DATA, whole).result()
    built_in = client.forward(DATA, "cross_entropy").result()
    assert traced.loss == plain.loss == pytest.approx(built_in.loss, rel=1e-6)
    assert traced.loss_fn_outputs == plain.loss_fn_outputs
    assert traced.metrics["custom/neg_ll:sum"] == pytest.approx(traced.loss, rel=1e-6)
    lps = [np.exp(out["logprobs"].to_numpy()).sum() for out in traced.loss_fn_outputs]
    assert traced.metrics["custom/longest:mean"] == pytest.approx(np.mean(lps), rel=1e-6)


def test_a_traced_loss_trains(service, client):
    before = weights(client)
    handle = asyncio.run(awaited(service.create_custom_loss(neg_ll, ONE)))
    client.forward_backward_custom(DATA, handle)
    assert client.optim_step(AdamParams(learning_rate=0.1)).result().metrics["unclipped_grad_l2:mean"] > 0
    assert (weights(client) != before).any()


async def awaited(future):
    return await future


def test_targets_of_several_columns_have_logprobs_of_several_columns(service, client):
    def distribution(logprobs, target_distribution, temperature):
        loss = -(target_distribution * logprobs / temperature).sum()
        return loss, {}

    ranks = {"logprobs": 2, "target_distribution": 2, "temperature": 0}
    handle = service.create_custom_loss(distribution, ranks).result()
    rng = np.random.default_rng(0)
    wanted = rng.random((3, 2)).astype(np.float32)
    inputs = {"target_tokens": [[2, 9], [3, 9], [4, 9]]}
    own = inputs | {"target_distribution": wanted, "temperature": np.array(0.5, np.float32)}
    found = client.forward_backward_custom([datum(1, 2, 3, 4, **own)], handle).result()
    expected = client.forward([datum(1, 2, 3, 4, **inputs, weights=2 * wanted)], "cross_entropy").result()
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.loss_fn_outputs[0]["logprobs"].shape == [3, 2]


def test_a_handle_says_what_it_takes():
    handle = trace_loss(neg_ll, ONE, "session-1")
    assert (handle.name, handle.session_id, handle.loss_id) == ("neg_ll", "session-1", None)
    assert handle.inputs == (
        CustomLossInput(name="logprobs", rank=1),
        CustomLossInput(name="weights", rank=1),
    )
    assert handle.input_names == ("weights",)
    again, other = trace_loss(neg_ll, ONE, "s"), trace_loss(neg_ll, {"logprobs": 2, "weights": 2}, "s")
    assert handle.key == again.key != other.key
    assert "graph" not in repr(handle)


def test_a_handle_is_for_its_session_alone(client, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    with ServiceClient() as other:
        handle = other.create_custom_loss(neg_ll, ONE).result()
    with pytest.raises(BadRequestError, match="neg_ll was made by another ServiceClient"):
        client.forward_backward_custom(DATA, handle)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([datum(1, 2, 3)], r"data\[0\]: the loss neg_ll needs the input 'weights'"),
        (
            [DATA[0], datum(1, 2, weights=[[1.0]])],
            r"data\[1\].loss_fn_inputs\['weights'\] has shape \(1, 1\)",
        ),
        ([3], r"data\[0\]: the loss neg_ll needs the input 'target_tokens'"),
        ([], "at least one Datum"),
    ],
)
def test_data_that_a_traced_loss_cannot_take_are_refused(service, client, data, message):
    before = weights(client)
    handle = service.create_custom_loss(neg_ll, ONE).result()
    with pytest.raises(BadRequestError, match=message):
        client.forward_backward_custom(data, handle).result()
    assert (weights(client) == before).all()
    with pytest.raises(BadRequestError, match="no gradient"):
        client.optim_step(AdamParams()).result()


def test_a_traced_loss_of_many_numbers_is_refused(service, client):
    handle = service.create_custom_loss(lambda logprobs: (logprobs, {}), {"logprobs": 1}).result()
    with pytest.raises(BadRequestError, match=r"of data\[0\] has shape \(3,\); it must be one number"):
        client.forward_backward_custom(DATA, handle).result()


# The rules, which are those of the client library


OUTSIDE = torch.ones(3)


def branches(logprobs):
    return (logprobs.sum() if logprobs.sum() > 0 else -logprobs.sum()), {}


def no_logprobs(weights):
    return weights.sum(), {}


def keyword_only(logprobs, *, weights):
    return logprobs.sum(), {}


def with_a_default(logprobs, weights=1):
    return logprobs.sum(), {}


def upper_case(logprobs, Weights):
    return logprobs.sum(), {}


def anything(logprobs, *more):
    return logprobs.sum(), {}


def of_numpy(logprobs):
    return torch.sum(np.exp(logprobs)), {}


GOOD = {"one": neg_ll, "two": lambda logprobs, weights: (logprobs.sum() * math.pi, {})}
BAD = {
    "branching": (branches, {}),
    "no logprobs": (no_logprobs, {"weights": 1}),
    "no parameter": (lambda: (1, {}), {}),
    "keyword only": (keyword_only, {"logprobs": 1, "weights": 1}),
    "a default": (with_a_default, {"logprobs": 1, "weights": 1}),
    "upper case": (upper_case, {"logprobs": 1, "Weights": 1}),
    "any number": (anything, {"logprobs": 1, "more": 1}),
    "a rank too few": (neg_ll, {"logprobs": 1}),
    "a rank too many": (neg_ll, ONE | {"advantages": 1}),
    "rank 0": (neg_ll, {"logprobs": 0, "weights": 1}),
    "another library": (of_numpy, {}),
    "backward": (lambda logprobs: (logprobs.sum().backward(), {}), {}),
    "item": (lambda logprobs: (logprobs.sum(), {"custom/a:sum": logprobs.sum().item()}), {}),
    "no method of tensors": (lambda logprobs: (logprobs.total(), {}), {}),
    "a tensor from outside": (lambda logprobs: ((logprobs * OUTSIDE).sum(), {}), {}),
    "no metrics": (lambda logprobs: logprobs.sum(), {}),
    "metrics that are none": (lambda logprobs: (logprobs.sum(), None), {}),
    "a loss that is no tensor": (lambda logprobs: (1.0, {}), {}),
    "a metric by another name": (lambda logprobs: (logprobs.sum(), {"loss": logprobs.sum()}), {}),
    "a metric that is no tensor": (lambda logprobs: (logprobs.sum(), {"custom/a:sum": 1.0}), {}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_loss_that_breaks_a_rule_is_refused_here_as_by_the_client_library(name):
    fn, ranks = BAD[name]
    with pytest.raises(BadRequestError) as caught:
        trace_loss(fn, ranks or {"logprobs": 1}, "session")
    assert getattr(fn, "__name__", "") in str(caught.value) or "logprobs" in str(caught.value)
    with pytest.raises(ValueError, match="create_custom_loss"):
        theirs.trace_loss(fn, ranks or {"logprobs": 1}, "session")


@pytest.mark.parametrize("name", GOOD)
def test_a_loss_that_keeps_the_rules_is_taken_here_and_by_the_client_library(name):
    ours, real = (trace(GOOD[name], ONE, "session") for trace in (trace_loss, theirs.trace_loss))
    assert isinstance(real, tinker.LossHandle)
    assert (ours.name, ours.input_names) == (real.name, real.input_names)


def test_a_rank_that_there_is_not_is_refused():
    with pytest.raises(BadRequestError, match=r"input_ranks\['weights'\] is 3"):
        trace_loss(neg_ll, {"logprobs": 1, "weights": 3}, "session")
