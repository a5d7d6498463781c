"""engine/trainer.py: forward_backward_custom, a loss of the user's own that torch differentiates."""

import numpy as np
import pytest
import torch
from tiny_models import from_peft, make_batch, make_model, make_trainer, to_peft, torch_logprobs
from trainer_checks import (
    HUGE,
    INF,
    LENGTHS,
    LOSS,
    NAN,
    assert_same_gradient,
    gradient_of,
    in_the_middle,
    state,
    with_weights,
)

from minitinker.errors import BadRequestError
from minitinker.model.weights import load_base_model
from minitinker.types import Datum, ModelInput


@pytest.fixture(scope="module")
def base():
    return load_base_model(str(make_model("qwen3-tied")[0]))


@pytest.fixture
def trainer(base):
    return make_trainer(base)


def negative_log_likelihood(data, logprobs):
    pairs = zip(data, logprobs, strict=True)
    return -sum((d.loss_fn_inputs["weights"].to_torch() * lp).sum() for d, lp in pairs), {}


@pytest.mark.parametrize("k", [None, 2])
def test_cross_entropy_as_a_custom_loss_is_cross_entropy(base, trainer, k):
    data = make_batch(LENGTHS, k=k)
    expected, grad = gradient_of(base, data)
    output = trainer.forward_backward_custom(data, negative_log_likelihood)
    assert output.loss == pytest.approx(expected.loss, rel=1e-6)
    assert output.loss_fn_outputs == expected.loss_fn_outputs
    assert output.loss_fn_output_type == expected.loss_fn_output_type
    np.testing.assert_array_equal(trainer.grad, grad)
    assert trainer.accumulated == 1


def preference(data, logprobs):
    """DPO (Rafailov et al. 2023, arXiv:2305.18290) on neighbours, and a term that is not linear in one token."""
    margins = [
        (chosen.sum() - d.loss_fn_inputs["reference"].to_torch().sum()) - rejected.sum()
        for d, chosen, rejected in zip(data[::2], logprobs[::2], logprobs[1::2], strict=True)
    ]
    margin = torch.stack(margins)
    loss = -torch.nn.functional.logsigmoid(0.1 * margin).sum() + (logprobs[0] ** 2).mean()
    return loss, {"margin": margin.mean(), "right": np.float32(0.5), "pairs": 2}


def test_a_loss_across_datums_has_the_gradient_of_torch_from_end_to_end():
    folder, model = make_model("qwen3-tied")
    trainer, own = make_trainer(folder), {"reference": np.float32([-1.0, -2.0])}
    data = [Datum(d.model_input, d.loss_fn_inputs | own) for d in make_batch((9, 12, 4, 7))]
    peft = to_peft(model, trainer.spec, trainer.flat)
    logprobs = [torch_logprobs(peft, d) for d in data]
    loss, metrics = preference(data, logprobs)
    slopes = torch.autograd.grad(loss, logprobs, retain_graph=True)
    surrogate = sum((slope * lp).sum().item() for slope, lp in zip(slopes, logprobs, strict=True))
    loss.backward()
    output = trainer.forward_backward_custom(data, preference)
    assert_same_gradient(trainer.grad, from_peft(peft, trainer.spec, gradients=True), trainer)
    assert output.loss == pytest.approx(loss.item(), rel=LOSS)
    assert output.metrics == {
        "margin": pytest.approx(metrics["margin"].item(), rel=1e-4),
        "right": 0.5,
        "pairs": 2.0,
        "loss:sum": output.loss,
        "surrogate_loss:sum": pytest.approx(surrogate, rel=1e-4),
    }
    assert all(type(value) is float for value in output.metrics.values())


def test_a_custom_loss_adds_to_the_gradients_that_are_there(base, trainer):
    a, b = make_batch((7, 12)), make_batch((3, 20), seed=1)
    trainer.forward_backward(a, "cross_entropy", None)
    trainer.forward_backward_custom(b, negative_log_likelihood)
    np.testing.assert_array_equal(trainer.grad, gradient_of(base, a)[1] + gradient_of(base, b)[1])


def test_logprobs_that_a_custom_loss_leaves_out_have_no_gradient(base, trainer):
    first, *rest = make_batch((7, 12, 3))
    trainer.forward_backward_custom([first, *rest], lambda data, lp: (lp[0].sum(), {}))
    alone = with_weights([first], lambda w: -np.ones_like(w))
    assert_same_gradient(trainer.grad, gradient_of(base, alone)[1], trainer)


def test_a_custom_loss_gets_the_data_and_leaves_in_the_shape_of_the_targets(trainer):
    data, seen = [*make_batch((7, 12)), *make_batch((3,), k=2)], []

    def loss_fn(given, logprobs):
        assert given == data
        seen.extend(logprobs)
        given.clear()  # what it does to its lists is its own affair
        logprobs.clear()
        return sum(lp.sum() for lp in seen), {}

    trainer.forward_backward_custom(data, loss_fn)
    assert [tuple(lp.shape) for lp in seen] == [(7,), (12,), (3, 2)]
    assert all(lp.requires_grad and lp.dtype == torch.float32 for lp in seen)


def sum_of(logprobs):
    return sum(lp.sum() for lp in logprobs)


RUBBISH = {
    "nothing": lambda data, lp: None,
    "no metrics": lambda data, lp: sum_of(lp),
    "a float": lambda data, lp: (1.0, {}),
    "no graph": lambda data, lp: (sum_of(lp).detach(), {}),
    "many numbers": lambda data, lp: (lp[0], {}),
    "metrics that are none": lambda data, lp: (sum_of(lp), None),
    "a metric that is text": lambda data, lp: (sum_of(lp), {"note": "good"}),
    "a metric of many numbers": lambda data, lp: (sum_of(lp), {"lp": lp[0].detach()}),
    "nan": lambda data, lp: (sum_of(lp) * NAN, {}),
    "infinity": lambda data, lp: (sum_of(lp) + INF, {}),
    "an infinite slope": lambda data, lp: ((lp[0] - lp[0].detach()).abs().sqrt().sum(), {}),
    "a gradient too large": lambda data, lp: (HUGE * (lp[0] - lp[0].detach()).sum(), {}),
}


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_a_custom_loss_that_returns_rubbish_changes_nothing(trainer, rubbish):
    before = state(in_the_middle(trainer))
    with pytest.raises(BadRequestError, match=r"custom loss|gradient is not finite"):
        trainer.forward_backward_custom(make_batch(), RUBBISH[rubbish])
    assert state(trainer) == before


def test_what_a_custom_loss_raises_comes_through_and_changes_nothing(trainer):
    before = state(in_the_middle(trainer))
    with pytest.raises(ZeroDivisionError):
        trainer.forward_backward_custom(make_batch(), lambda data, lp: 1 / 0)
    assert state(trainer) == before


@pytest.mark.parametrize("data", [[], None, [1], [Datum(ModelInput.from_ints([1]), {})]])
def test_a_custom_loss_is_not_asked_about_bad_data(trainer, data):
    before = state(in_the_middle(trainer))
    with pytest.raises(BadRequestError, match="data"):
        trainer.forward_backward_custom(data, lambda data, lp: pytest.fail("it was asked"))
    assert state(trainer) == before
