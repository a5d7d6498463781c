"""engine/trainer.py: a call that fails says why and leaves every bit of the state as it was."""

import numpy as np
import pytest
from tiny_models import VOCAB, make_batch, make_model, make_trainer
from trainer_checks import HUGE, INF, NAN, gradient_of, in_the_middle, state, with_weights

from minitinker import reference
from minitinker.engine import trainer as trainer_module
from minitinker.errors import APIError, BadRequestError
from minitinker.model.transformer import hidden_states
from minitinker.model.weights import load_base_model
from minitinker.types import AdamParams, Datum, ModelInput


@pytest.fixture(scope="module")
def base():
    return load_base_model(str(make_model("qwen3-tied")[0]))


@pytest.fixture
def trainer(base):
    return make_trainer(base)


def datum(**inputs):
    return Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [4, 5, 6]} | inputs)


FAILURES = {
    "no data": ([], "cross_entropy", None, "at least one"),
    "unknown loss": ([datum()], "mse", None, "'mse'"),
    "unknown config": ([datum()], "cross_entropy", {"beta": 1}, "'beta'"),
    "bad token": ([datum(target_tokens=[4, VOCAB, 6])], "cross_entropy", None, "'target_tokens'"),
    "wrong length": ([datum(weights=[1.0])], "cross_entropy", None, "'weights'"),
    "wrong dtype": ([datum(target_tokens=np.float32([4, 5, 6]))], "cross_entropy", None, "'target_tokens'"),
    "extra key": ([datum(advantages=[1.0] * 3)], "cross_entropy", None, "'advantages'"),
    "missing key": ([datum(advantages=[1.0] * 3)], "ppo", None, "'logprobs'"),
    "nan weight": ([datum(weights=[1.0, NAN, 1.0])], "cross_entropy", None, "'weights'"),
    "infinite ratio": (
        [datum(logprobs=[-1e4] * 3, advantages=[1.0] * 3)],
        "importance_sampling",
        None,
        "loss is -inf",
    ),
    "infinite gradient": ([datum(weights=[HUGE] * 3)], "cross_entropy", None, "gradient is not finite"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_call_that_fails_leaves_everything_as_it_was(trainer, failure):
    data, loss_fn, config, said = FAILURES[failure]
    before = state(in_the_middle(trainer))
    for call in (trainer.forward, trainer.forward_backward):
        if call == trainer.forward and failure == "infinite gradient":
            continue  # the loss is still finite
        with pytest.raises(BadRequestError) as caught:
            call(data, loss_fn, config)
        assert said in str(caught.value)
        assert state(trainer) == before


def test_one_bad_datum_keeps_the_others_out_and_is_named(trainer):
    before = state(in_the_middle(trainer))
    with pytest.raises(BadRequestError, match=r"data\[4\].*'weights'.*nan"):
        trainer.forward_backward([*make_batch(), datum(weights=[NAN] * 3)], "cross_entropy", None)
    assert state(trainer) == before


def test_a_sum_of_gradients_that_overflows_is_refused_before_it_is_there(trainer):
    in_the_middle(trainer).grad[...] = np.finfo(np.float32).max
    before, data = state(trainer), make_batch()
    size = np.abs(gradient_of(trainer.base, data)[1]).max()
    louder = with_weights(data, lambda w: w * np.float32(1e35 / size))
    assert np.isfinite(gradient_of(trainer.base, louder)[1]).all()
    with pytest.raises(BadRequestError, match="gradient is not finite"):
        trainer.forward_backward(louder, "cross_entropy", None)
    assert state(trainer) == before


def test_weights_that_are_not_finite_give_an_error_and_no_warning(trainer):
    trainer.flat[...] = INF
    before = state(trainer)
    for call in (trainer.forward, trainer.forward_backward):
        with pytest.raises(BadRequestError, match="loss is nan"):
            call(make_batch(), "cross_entropy", None)
    assert state(trainer) == before


# The optimizer


def test_a_step_with_nothing_accumulated_is_refused(trainer):
    for _ in range(2):  # at first, and right after a step
        before = state(trainer)
        with pytest.raises(BadRequestError, match="forward_backward"):
            trainer.optim_step(AdamParams())
        assert state(trainer) == before
        trainer.forward_backward(make_batch(), "cross_entropy", None)
        trainer.optim_step(AdamParams())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("learning_rate", x) for x in (-1e-4, NAN, INF)),
        *(("beta1", x) for x in (-0.1, 1.0, 1.5, NAN)),
        *(("beta2", x) for x in (-0.1, 1.0, INF, NAN)),
        *(("eps", x) for x in (0.0, -1e-8, 1e-50, NAN, INF)),
        *(("weight_decay", x) for x in (-0.1, NAN, INF)),
        *(("grad_clip_norm", x) for x in (-1.0, NAN, INF)),
    ],
)
def test_a_field_out_of_its_range_is_refused_and_changes_nothing(trainer, field, value):
    before = state(in_the_middle(trainer))
    with pytest.raises(BadRequestError) as caught:
        trainer.optim_step(AdamParams(**{field: value}))
    assert f"AdamParams.{field} is {value}" in str(caught.value)
    assert state(trainer) == before
    trainer.optim_step(AdamParams())  # the gradient is still there


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(trainer, value):
    in_the_middle(trainer).grad[3] = value
    before = state(trainer)
    with pytest.raises(BadRequestError, match=r"norm is (nan|inf)"):
        trainer.optim_step(AdamParams(grad_clip_norm=1.0))
    assert state(trainer) == before


@pytest.mark.parametrize(("room", "told"), [(5, "about 5 tokens would have"), (10**6, "a shorter one may")])
@pytest.mark.parametrize("op", ["attention_forward", "logprob_backward", "lora_linear_backward"])
def test_memory_that_runs_out_anywhere_is_told_and_nothing_accumulated_is_lost(
    trainer, monkeypatch, op, room, told
):
    before = state(in_the_middle(trainer))

    def no_room(*inputs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(reference, op, no_room)
        free = trainer._footprint().fixed + room * trainer._footprint().recomputed
        patch.setattr(reference, "free_memory", lambda: free)
        said = f"a sequence of 20 tokens did not fit, where {free / 1e9:.1f} GB are free; {told}"
        with pytest.raises(APIError, match=said):
            trainer.forward_backward(make_batch(), "cross_entropy", None)
    assert state(trainer) == before
    trainer.forward_backward(make_batch(), "cross_entropy", None)
    trainer.optim_step(AdamParams())


def test_what_would_not_fit_is_formed_again_and_gives_the_same_gradient_to_the_bit(base, monkeypatch):
    seen = []
    forward = reference.lora_linear_forward

    def counted(*inputs):
        seen.append(inputs)
        return forward(*inputs)

    monkeypatch.setattr(reference, "lora_linear_forward", counted)
    monkeypatch.setattr(reference, "width", lambda: 1)
    calls, gradients = [], []
    data = make_batch((7, 12, 33))
    needs = make_trainer(base)._footprint()
    for free in (10**12, needs.fixed + 52 * needs.recomputed):
        monkeypatch.setattr(reference, "free_memory", lambda free=free: free)
        seen.clear()
        gradients.append(gradient_of(base, data)[1])
        calls.append(len(seen))
    assert calls[1] - calls[0] == 7 * base.config.num_hidden_layers  # each linear of each layer once more
    np.testing.assert_array_equal(*gradients)


def test_where_memory_ran_out_all_the_same_activations_are_formed_again_from_the_start(base, monkeypatch):
    monkeypatch.setattr(reference, "width", lambda: 1)
    monkeypatch.setattr(reference, "free_memory", lambda: 10**12)  # enough, it seems
    monkeypatch.setattr(reference, "MICRO_BATCH_TOKENS", 20)
    data, tried = make_batch((7, 12, 33)), []
    expected = in_the_middle(make_trainer(base))
    output = expected.forward_backward(data, "cross_entropy", None)

    def hidden_states_where_one_long_sequence_fits(net, batch, keep, recompute):
        tried.append((len(batch.tokens), recompute))
        if keep and not recompute and len(batch.tokens) == 33:
            raise MemoryError
        return hidden_states(net, batch, keep=keep, recompute=recompute)

    monkeypatch.setattr(trainer_module, "hidden_states", hidden_states_where_one_long_sequence_fits)
    trainer = in_the_middle(make_trainer(base))
    tried.clear()
    assert trainer.forward_backward(data, "cross_entropy", None) == output
    assert tried == [(19, False), (33, False), (19, True), (33, True)]
    assert state(trainer) == state(expected)

    trainer.recompute, tried[:] = False, []  # what was asked for is not given up
    with pytest.raises(APIError, match="a sequence of 33 tokens did not fit"):
        trainer.forward_backward(data, "cross_entropy", None)
    assert tried == [(19, False), (33, False)]
    assert state(trainer) == state(expected)


def test_memory_that_runs_out_in_a_step_leaves_the_count_of_steps_and_all_else(trainer, monkeypatch):
    before = state(in_the_middle(trainer))

    def no_room(*inputs):
        raise MemoryError

    monkeypatch.setattr(reference, "adamw_", no_room)
    with pytest.raises(MemoryError):
        trainer.optim_step(AdamParams())
    assert state(trainer) == before


def test_memory_that_runs_out_while_a_checkpoint_is_put_back_changes_nothing(trainer, monkeypatch):
    before = state(in_the_middle(trainer))
    flat, m, v = (np.full(trainer.spec.size, x, np.float32) for x in (1, 2, 3))
    array = reference.array

    def room_for_one(x, *more):
        if x is v:
            raise MemoryError
        return array(x, *more)

    monkeypatch.setattr(reference, "array", room_for_one)
    with pytest.raises(MemoryError):
        trainer.restore(flat, m, v, 7)
    assert state(trainer) == before
