"""engine/trainer.py: losses that are sums, gradients that add up, steps against PEFT and torch.

What fails is in test_trainer_failures.py, custom losses are in test_trainer_custom_loss.py.
"""

import math

import numpy as np
import pytest
import torch
from tiny_models import (
    VOCAB,
    from_peft,
    make_batch,
    make_model,
    make_trainer,
    relative_errors,
    to_peft,
    torch_logprobs,
)
from trainer_checks import (
    GRADIENT,
    INF,
    LENGTHS,
    LOSS,
    NORM,
    WEIGHT,
    assert_same_gradient,
    gradient_of,
    in_the_middle,
    state,
    with_weights,
)

from minitinker import reference
from minitinker.losses import LOSSES, check_data, find_loss
from minitinker.model.weights import load_base_model
from minitinker.types import AdamParams, Datum

CONFIGS = {"dro": {"beta": 0.1}, "ppo": {"clip_low_threshold": 0.5}}


@pytest.fixture(scope="module")
def base():
    return load_base_model(str(make_model("qwen3-tied")[0]))


@pytest.fixture
def trainer(base):
    return make_trainer(base)


# Against PEFT and torch


def positive(data):
    """The same data with weights above zero: a sum that is compared relatively must not cancel."""
    return with_weights(data, lambda w: np.abs(w) + np.float32(0.1))


@pytest.mark.parametrize("family", ["llama-biased", "llama3-tied", "qwen2", "qwen3-tied"])
def test_ten_steps_are_those_of_peft_and_torch(family):
    folder, model = make_model(family)
    trainer = make_trainer(folder, spread=None)  # A as it begins, B zero
    peft = to_peft(model, trainer.spec, trainer.flat)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    rng = np.random.default_rng(0)
    for step in range(10):
        adam = AdamParams(
            learning_rate=10 ** rng.uniform(-4, -2),
            beta1=rng.uniform(0.5, 0.95),
            beta2=rng.uniform(0.8, 0.999),
            eps=10 ** rng.uniform(-12, -6),
            weight_decay=rng.choice([0, 0.1]),
            grad_clip_norm=rng.choice([0, 0.1, 1e6]),
        )
        theirs, optimizer.param_groups[0]["lr"] = 0.0, adam.learning_rate
        optimizer.param_groups[0]["betas"] = adam.beta1, adam.beta2
        optimizer.param_groups[0]["eps"] = adam.eps
        optimizer.param_groups[0]["weight_decay"] = adam.weight_decay
        ours = 0.0
        for part in range(2):
            data = positive(make_batch(rng.integers(1, 30, 2), seed=2 * step + part))
            ours += trainer.forward_backward(data, "cross_entropy", None).loss
            for datum in data:
                loss = -(torch_logprobs(peft, datum) * datum.loss_fn_inputs["weights"].to_torch()).sum()
                loss.backward()
                theirs += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, adam.grad_clip_norm or INF).item()
        optimizer.step()
        optimizer.zero_grad()
        assert ours == pytest.approx(theirs, rel=LOSS)
        assert trainer.optim_step(adam)[NORM] == pytest.approx(norm, rel=GRADIENT)
    errors = relative_errors(trainer.flat, from_peft(peft, trainer.spec), trainer.spec)
    assert max(errors.values()) <= WEIGHT, errors


@pytest.mark.parametrize("k", [None, 3])
def test_gradients_and_logprobs_are_those_of_peft(k):
    folder, model = make_model("qwen3-tied")
    trainer, data = make_trainer(folder), make_batch(LENGTHS, k=k)
    peft = to_peft(model, trainer.spec, trainer.flat)
    output = trainer.forward_backward(data, "cross_entropy", None)
    for datum, found in zip(data, output.loss_fn_outputs, strict=True):
        lp = torch_logprobs(peft, datum)
        assert found["logprobs"].shape == datum.loss_fn_inputs["target_tokens"].shape
        assert found["logprobs"].dtype == "float32"
        np.testing.assert_allclose(found["logprobs"].to_numpy(), lp.detach().numpy(), rtol=0, atol=1e-4)
        (-(lp * datum.loss_fn_inputs["weights"].to_torch()).sum()).backward()
    assert_same_gradient(trainer.grad, from_peft(peft, trainer.spec, gradients=True), trainer)


# Losses and data


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_a_sum_and_its_gradient_a_cross_entropy_weighted_by_its_derivative(base, name):
    data = make_batch(LENGTHS, name)
    output, grad = gradient_of(base, data, name, CONFIGS.get(name))
    config, total, weighted = find_loss(name, CONFIGS.get(name))[1], 0.0, []
    examples = check_data(data, name, config, VOCAB, max(LENGTHS))
    for datum, example, found in zip(data, examples, output.loss_fn_outputs, strict=True):
        lp = found["logprobs"].to_numpy().astype(np.float64)[:, None]
        inputs = dict(example.inputs)
        if LOSSES[name].per_sequence:
            key, values = LOSSES[name].per_sequence
            inputs[key] = values(lp, inputs)
        loss, dlp = LOSSES[name].per_token(lp, inputs, config)
        total += loss.sum()
        targets = datum.loss_fn_inputs["target_tokens"]
        weighted.append(
            Datum(datum.model_input, {"target_tokens": targets, "weights": (-dlp[:, 0]).astype(np.float32)})
        )
    assert output.loss == output.metrics["loss:sum"] == pytest.approx(total, rel=1e-6)
    np.testing.assert_allclose(grad, gradient_of(base, weighted)[1], rtol=1e-5, atol=1e-6)


def test_the_ratio_of_a_sequence_is_the_same_however_the_head_and_the_batch_are_cut(base, monkeypatch):
    data = make_batch(LENGTHS, "gspo")
    expected, grad = gradient_of(base, data, "gspo")
    monkeypatch.setattr(reference, "HEAD_BYTES", 5 * 4 * VOCAB)  # five rows at once
    monkeypatch.setattr(reference, "MICRO_BATCH_TOKENS", 40)
    output, cut = gradient_of(base, data, "gspo")
    assert output.loss == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_allclose(cut, grad, rtol=1e-4, atol=1e-5)


def test_absent_weights_count_every_token_once(base):
    data = make_batch(LENGTHS)
    bare = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
    ones = with_weights(data, np.ones_like)
    outputs, grads = zip(gradient_of(base, bare), gradient_of(base, ones), strict=True)
    assert outputs[0] == outputs[1]
    np.testing.assert_array_equal(*grads)


def test_negative_weights_unlearn_what_positive_ones_learn(trainer):
    data = make_batch(LENGTHS)
    learned = trainer.forward_backward(data, "cross_entropy", None)
    assert trainer.grad.any()
    assert (
        trainer.forward_backward(with_weights(data, np.negative), "cross_entropy", None).loss == -learned.loss
    )
    assert not trainer.grad.any()


def test_tokens_of_weight_zero_have_no_gradient_and_still_logprobs(base):
    long, short = make_batch([20]), make_batch([8])
    output, grad = gradient_of(base, [*with_weights(long, np.zeros_like), *short])
    assert_same_gradient(grad, gradient_of(base, short)[1], make_trainer(base))
    np.testing.assert_allclose(
        output.loss_fn_outputs[0]["logprobs"].to_numpy(),
        gradient_of(base, long)[0].loss_fn_outputs[0]["logprobs"].to_numpy(),
        rtol=0,
        atol=1e-5,
    )


def test_datums_with_one_and_with_many_targets_go_together(base):
    parts = [make_batch([9, 4]), make_batch([5], k=3, seed=1), make_batch([7], k=1, seed=2)]
    data = [datum for part in parts for datum in part]
    together, grad = gradient_of(base, data)
    apart = [gradient_of(base, part) for part in parts]
    assert_same_gradient(grad, sum(g for _, g in apart), make_trainer(base))
    assert together.loss == pytest.approx(sum(output.loss for output, _ in apart), rel=LOSS)
    expected = [found for output, _ in apart for found in output.loss_fn_outputs]
    for datum, ours, theirs in zip(data, together.loss_fn_outputs, expected, strict=True):
        assert ours["logprobs"].shape == datum.loss_fn_inputs["target_tokens"].shape
        np.testing.assert_allclose(
            ours["logprobs"].to_numpy(), theirs["logprobs"].to_numpy(), rtol=0, atol=1e-5
        )


def test_k_targets_are_k_targets_of_the_same_position(base):
    (many,) = make_batch([9], k=3)
    targets, weights = (many.loss_fn_inputs[key].to_numpy() for key in ("target_tokens", "weights"))
    singles = [
        Datum(many.model_input, {"target_tokens": targets[:, i], "weights": weights[:, i]}) for i in range(3)
    ]
    together, grad = gradient_of(base, [many])
    apart, summed = gradient_of(base, singles)
    assert together.loss == pytest.approx(apart.loss, rel=LOSS)
    assert_same_gradient(grad, summed, make_trainer(base))


@pytest.mark.parametrize(
    ("budget", "width", "head_rows"),
    [(10_000, 1, 10_000), (10_000, 1, 13), (10_000, 3, 1), (40, 1, 10_000), (40, 2, 13), (1, 5, 10_000)],
)
def test_how_the_work_is_split_changes_nothing_beyond_rounding(base, monkeypatch, budget, width, head_rows):
    data = make_batch((7, 1, 33, 12, 3, 25), "importance_sampling")
    expected, grad = gradient_of(base, data, "importance_sampling")
    monkeypatch.setattr(reference, "MICRO_BATCH_TOKENS", budget)
    monkeypatch.setattr(reference, "HEAD_BYTES", 4 * VOCAB * head_rows)
    monkeypatch.setattr(reference, "width", lambda: width)
    output, split = gradient_of(base, data, "importance_sampling")
    assert output.loss == pytest.approx(expected.loss, rel=LOSS)
    assert_same_gradient(split, grad, make_trainer(base))
    for ours, theirs in zip(output.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
        np.testing.assert_allclose(
            ours["logprobs"].to_numpy(), theirs["logprobs"].to_numpy(), rtol=0, atol=1e-5
        )


# Accumulation


def test_gradients_of_two_calls_add_up(base):
    a, b = make_batch((7, 12)), make_batch((3, 20), seed=1)
    together, apart = make_trainer(base), make_trainer(base)
    whole = together.forward_backward(a + b, "cross_entropy", None)
    parts = [apart.forward_backward(part, "cross_entropy", None) for part in (a, b)]
    assert whole.loss == pytest.approx(sum(part.loss for part in parts), rel=LOSS)
    assert_same_gradient(apart.grad, together.grad, together)
    assert not np.array_equal(apart.grad, make_trainer(base).grad)


def test_different_losses_add_up_too(trainer, base):
    a, b = make_batch((7, 12)), make_batch((3, 20), "ppo", seed=1)
    trainer.forward_backward(a, "cross_entropy", None)
    trainer.forward_backward(b, "ppo", None)
    summed = gradient_of(base, a)[1] + gradient_of(base, b, "ppo")[1]
    np.testing.assert_array_equal(trainer.grad, summed)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_says_what_forward_backward_says_and_touches_nothing(trainer, name):
    data = make_batch(LENGTHS, name)
    before = state(in_the_middle(trainer))
    output = trainer.forward(data, name, CONFIGS.get(name))
    assert state(trainer) == before
    assert output == trainer.forward_backward(data, name, CONFIGS.get(name))


def test_a_step_takes_the_gradient_away(trainer):
    trainer.forward_backward(make_batch(), "cross_entropy", None)
    trainer.optim_step(AdamParams())
    assert not trainer.grad.any()
    assert (trainer.step, trainer.accumulated) == (1, 0)


# The optimizer


def torch_step(trainer, adam):
    """The weights that torch makes of the trainer's state, and the gradient's norm: (size,) and a float."""
    p = torch.nn.Parameter(torch.tensor(trainer.flat))
    p.grad = torch.tensor(trainer.grad)
    norm = torch.nn.utils.clip_grad_norm_([p], adam.grad_clip_norm or INF).item()
    options = {"lr": adam.learning_rate, "betas": (adam.beta1, adam.beta2), "eps": adam.eps}
    optimizer = torch.optim.AdamW([p], weight_decay=adam.weight_decay, **options)
    moments = {"exp_avg": torch.tensor(trainer.m), "exp_avg_sq": torch.tensor(trainer.v)}
    optimizer.state[p] = moments | {"step": torch.tensor(float(trainer.step))}
    optimizer.step()
    return p.detach().numpy(), norm


@pytest.mark.parametrize(
    "adam",
    [
        AdamParams(),
        AdamParams(learning_rate=0.0),
        AdamParams(learning_rate=0.1, beta1=0.0, beta2=0.0),
        AdamParams(learning_rate=0.01, beta1=0.5, beta2=0.999, eps=1e-3, weight_decay=0.3),
        AdamParams(learning_rate=0.01, grad_clip_norm=0.01),
        AdamParams(learning_rate=0.01, grad_clip_norm=1e9),
    ],
    ids=["default", "still", "memoryless", "all", "clipped", "not-clipped"],
)
def test_a_step_is_that_of_torch_and_reports_the_norm_before_clipping(trainer, adam):
    in_the_middle(trainer)
    weights, norm = torch_step(trainer, adam)
    assert trainer.optim_step(adam) == {NORM: pytest.approx(norm, rel=1e-6)}
    np.testing.assert_allclose(trainer.flat, weights, rtol=1e-6, atol=1e-7)


def test_weights_without_gradient_only_decay(trainer):
    trainer.forward_backward(make_batch(), "cross_entropy", None)
    trainer.grad[:100] = 0
    before = trainer.flat[:100].copy()
    trainer.optim_step(AdamParams(learning_rate=0.5, weight_decay=0.5))
    np.testing.assert_allclose(trainer.flat[:100], 0.75 * before, rtol=1e-6)


def test_a_gradient_of_zero_is_still_something_accumulated(trainer):
    trainer.forward_backward(with_weights(make_batch([5]), np.zeros_like), "cross_entropy", None)
    before = trainer.flat.copy()
    assert trainer.optim_step(AdamParams()) == {NORM: 0.0}
    np.testing.assert_array_equal(trainer.flat, before)


# State


def a_run(base, seed):
    trainer = make_trainer(base, seed=seed, spread=None)
    for step in range(2):
        trainer.forward_backward(make_batch((7, 33, 12, 20), seed=step), "cross_entropy", None)
        trainer.forward_backward(make_batch((12, 1, 9), "ppo", seed=step), "ppo", None)
        trainer.optim_step(AdamParams(learning_rate=0.01, grad_clip_norm=1.0))
    return state(trainer)


def test_the_same_calls_give_the_same_bits(base, monkeypatch):
    monkeypatch.setattr(reference, "MICRO_BATCH_TOKENS", 40)
    monkeypatch.setattr(reference, "width", lambda: 2)  # micro-batches side by side, whatever the machine
    assert a_run(base, 5) == a_run(base, 5)
    assert a_run(base, 5) != a_run(base, 6)


def test_training_makes_the_loss_smaller(trainer):
    data = positive(make_batch())
    losses = []
    for _ in range(5):
        losses.append(trainer.forward_backward(data, "cross_entropy", None).loss)
        trainer.optim_step(AdamParams(learning_rate=1e-3))
    assert losses == sorted(losses, reverse=True)


def test_a_snapshot_stays_what_it_was(trainer):
    snapshot, before = trainer.snapshot(), trainer.flat.copy()
    in_the_middle(trainer)
    np.testing.assert_array_equal(snapshot.flat, before)
    assert not np.array_equal(snapshot.flat, trainer.flat)


def test_restored_with_its_moments_training_goes_on_bit_by_bit(base, trainer):
    in_the_middle(trainer).optim_step(AdamParams())
    other = make_trainer(base, seed=1)
    other.forward_backward(make_batch(), "cross_entropy", None)  # which restoring drops
    other.restore(trainer.flat, trainer.m, trainer.v, trainer.step)
    assert state(other) == state(trainer)
    for each in (trainer, other):
        each.forward_backward(make_batch(), "cross_entropy", None)
        each.optim_step(AdamParams(weight_decay=0.1))
    assert state(other) == state(trainer)


def test_restored_without_moments_the_optimizer_begins_anew(base, trainer):
    weights = in_the_middle(trainer).flat.copy()
    trainer.restore(weights, None, None, 0)
    fresh = make_trainer(base)
    fresh.flat[...] = weights
    assert state(trainer) == state(fresh)


def test_the_norm_is_that_of_the_whole_gradient(trainer):
    trainer.forward_backward(make_batch(), "cross_entropy", None)
    expected = math.sqrt((trainer.grad.astype(np.float64) ** 2).sum())
    assert trainer.optim_step(AdamParams(grad_clip_norm=1e-3))[NORM] == pytest.approx(expected, rel=1e-12)
