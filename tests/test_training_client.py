import asyncio
import concurrent.futures
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from small_clients import bad_datum, datum, model, on_both_backends, train, weights

from minitinker import APIFuture
from minitinker.errors import BadRequestError
from minitinker.types import AdamParams, ForwardBackwardOutput

DATA = [datum(1, 2, 3, 4), datum(9, 8, 7)]
STEP = AdamParams(learning_rate=0.01)


def test_every_call_returns_a_future_at_once_and_its_async_twin_the_same(client, held):
    def loss(data, logprobs):
        return sum(lp.sum() for lp in logprobs), {}

    calls = {
        "forward": (DATA, "cross_entropy"),
        "forward_backward": (DATA, "cross_entropy"),
        "forward_backward_custom": (DATA, loss),
        "optim_step": (STEP,),
        "save_state": ("a",),
        "save_weights_for_sampler": ("a",),
        "load_state": ("tinker://nobody/weights/a",),
        "load_state_with_optimizer": ("tinker://nobody/weights/a",),
    }

    async def twin(name, args):
        return await getattr(client, name + "_async")(*args)

    for name, args in calls.items():
        for future in (getattr(client, name)(*args), asyncio.run(twin(name, args))):
            assert isinstance(future, APIFuture)
            assert not future.future().done()


def test_both_ways_give_the_same_results(service, client):
    async def main():
        other = await service.create_lora_training_client_async(model(), rank=4, seed=0)
        future = await other.forward_backward_async(DATA, "cross_entropy")
        step = await other.optim_step_async(STEP)
        return await future, await step.result_async(), await other.get_info_async(), weights(other)

    output, stepped, info, theirs = asyncio.run(main())
    assert client.forward_backward(DATA, "cross_entropy").result() == output
    assert client.optim_step(STEP).result() == stepped
    assert client.get_info().lora_rank == info.lora_rank == 4
    np.testing.assert_array_equal(weights(client), theirs)


@on_both_backends
def test_info_tells_what_is_trained(client):
    info = client.get_info()
    assert info.model_id == info.model_data.model_id
    assert info.model_name == info.model_data.model_name == model()
    assert info.lora_rank == info.model_data.lora_rank == 4
    assert info.is_lora
    assert info.model_data.arch == "Qwen3ForCausalLM"


def test_the_tokenizer_is_the_base_models(client):
    tokenizer = client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"


# Order


def test_calls_of_one_client_run_in_the_order_they_were_made(service, client):
    waiting = service.create_lora_training_client(model(), rank=4, seed=0)
    outputs, expected = [client.forward(DATA, "cross_entropy")], []
    for _ in range(3):
        outputs.append(client.forward_backward(DATA, "cross_entropy"))
        client.optim_step(STEP)
    outputs.append(client.forward(DATA, "cross_entropy"))
    expected.append(waiting.forward(DATA, "cross_entropy").result())
    for _ in range(3):
        expected.append(waiting.forward_backward(DATA, "cross_entropy").result())
        waiting.optim_step(STEP).result()
    expected.append(waiting.forward(DATA, "cross_entropy").result())
    assert [future.result() for future in outputs] == expected
    assert expected[0] == expected[1]
    assert expected[0].loss > expected[2].loss > expected[3].loss > expected[4].loss


def test_data_is_taken_as_it_is_when_the_call_is_made(client, held):
    data = list(DATA)
    futures = [
        client.forward(data, "cross_entropy"),
        client.forward_backward(data, "cross_entropy"),
        client.forward_backward_custom(data, lambda data, logprobs: (logprobs[1].sum(), {})),
    ]
    data.clear()
    held.set()
    assert [len(future.result().loss_fn_outputs) for future in futures] == [2, 2, 2]


def test_two_clients_train_apart(service):
    first, second = (service.create_lora_training_client(model(), rank=4, seed=seed) for seed in (0, 0))
    train(first)
    assert not np.array_equal(weights(first), weights(second))
    train(second)
    np.testing.assert_array_equal(weights(first), weights(second))


def test_threads_may_share_a_client(client):
    one = client.forward(DATA, "cross_entropy").result().loss
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        losses = pool.map(lambda _: client.forward(DATA, "cross_entropy").result().loss, range(12))
        awaited = pool.map(
            lambda _: asyncio.run(client.forward(DATA, "cross_entropy").result_async()), range(4)
        )
        assert all(loss == one for loss in losses)
        assert all(output.loss == one for output in awaited)


# What goes wrong


@on_both_backends
def test_bad_data_raises_at_the_result_and_names_the_datum(client):
    futures = [client.forward([DATA[0], bad_datum()], "cross_entropy"), client.forward([], "cross_entropy")]
    with pytest.raises(BadRequestError, match=r"data\[1\].*target_tokens.*1000000"):
        futures[0].result()
    with pytest.raises(ValueError, match="data"):
        futures[1].result()


@on_both_backends
def test_an_optim_step_queued_behind_a_failing_forward_backward_fails_naming_the_cause(client):
    train(client)
    before = weights(client)
    client.forward_backward(DATA, "cross_entropy")
    failing = client.forward_backward([bad_datum()], "cross_entropy")
    step = client.optim_step(STEP)
    with pytest.raises(BadRequestError):
        failing.result()
    with pytest.raises(BadRequestError, match=r"forward_backward before it failed: .*1000000") as error:
        step.result()
    assert error.value.__cause__ is failing.future().exception()
    np.testing.assert_array_equal(weights(client), before)
    assert client._run.trainer.step == 2


def test_an_optim_step_asked_for_after_the_failure_was_seen_goes_on_with_what_there_is(service, client):
    other = service.create_lora_training_client(model(), rank=4, seed=0)
    for one in (client, other):
        one.forward_backward(DATA, "cross_entropy").result()
    with pytest.raises(BadRequestError):
        client.forward_backward([bad_datum()], "cross_entropy").result()
    for one in (client, other):
        one.optim_step(STEP).result()
    np.testing.assert_array_equal(weights(client), weights(other))


@on_both_backends
def test_a_step_that_was_left_out_does_not_trouble_the_next(client):
    client.forward_backward([bad_datum()], "cross_entropy")
    left_out = client.optim_step(STEP)
    client.forward_backward(DATA, "cross_entropy")
    step = client.optim_step(STEP)
    with pytest.raises(BadRequestError, match="was left out"):
        left_out.result()
    assert step.result().metrics["unclipped_grad_l2:mean"] > 0


def test_an_optim_step_behind_a_cancelled_forward_backward_fails(client, held):
    cancelled = client.forward_backward(DATA, "cross_entropy")
    step = client.optim_step(STEP)
    assert cancelled.future().cancel()
    held.set()
    with pytest.raises(CancelledError):
        cancelled.result()
    with pytest.raises(BadRequestError, match="was cancelled"):
        step.result()


@on_both_backends
def test_an_optim_step_without_gradients_fails_and_changes_nothing(client):
    before = weights(client)
    with pytest.raises(BadRequestError, match="call forward_backward first"):
        client.optim_step(STEP).result()
    np.testing.assert_array_equal(weights(client), before)


# Losses of one's own


@on_both_backends
def test_a_custom_loss_gets_the_logprobs_and_its_metrics_and_loss_come_back(client):
    seen = {}

    def loss(data, logprobs):
        seen["data"], seen["logprobs"] = data, [lp.detach().clone() for lp in logprobs]
        return torch.cat(logprobs).square().mean(), {"largest": torch.cat(logprobs).max().item()}

    output = client.forward_backward_custom(DATA, loss).result()
    plain = client.forward(DATA, "cross_entropy").result()
    assert isinstance(output, ForwardBackwardOutput)
    assert seen["data"] == DATA
    expected = [out["logprobs"].to_numpy() for out in plain.loss_fn_outputs]
    for lp, other in zip(seen["logprobs"], expected, strict=True):
        np.testing.assert_allclose(lp.numpy(), other, atol=1e-6)
    whole = np.concatenate(expected)
    assert output.loss == output.metrics["loss:sum"] == pytest.approx((whole**2).mean(), rel=1e-5)
    assert output.metrics["largest"] == pytest.approx(whole.max(), rel=1e-5)


@on_both_backends
def test_a_custom_loss_that_raises_is_a_failing_forward_backward(client):
    def loss(data, logprobs):
        raise KeyError("no such thing")

    failing, step = client.forward_backward_custom(DATA, loss), client.optim_step(STEP)
    with pytest.raises(KeyError, match="no such thing"):
        failing.result()
    with pytest.raises(BadRequestError, match="no such thing"):
        step.result()


@pytest.mark.parametrize(
    "wait",
    [
        lambda client: client.forward(DATA, "cross_entropy").result(),
        lambda client: client.get_info(),
        lambda client: asyncio.run(client.save_weights_and_get_sampling_client_async()),
    ],
)
def test_a_custom_loss_that_waits_for_its_own_client_raises_instead_of_hanging(client, wait):
    def loss(data, logprobs):
        wait(client)

    with pytest.raises(RuntimeError, match="thread that has to do the work"):
        client.forward_backward_custom(DATA, loss).result(timeout=30)


def test_a_custom_loss_may_ask_for_more_without_waiting(client):
    asked = []

    def loss(data, logprobs):
        asked.append(client.forward(DATA, "cross_entropy"))
        return logprobs[0].sum(), {"vocab": float(client.get_tokenizer().vocab_size)}

    output = client.forward_backward_custom(DATA, loss).result()
    assert output.metrics["vocab"] == 256
    assert asked[0].result().loss > 0


# Spellings of older scripts


def test_an_optimizer_step_takes_its_parameters_in_either_way(service):
    after = []
    for give in (
        lambda client: client.optim_step(STEP),
        lambda client: client.optim_step(optim_params=STEP),
        lambda client: client.optim_step(adam_params=STEP),
        lambda client: asyncio.run(client.optim_step_async(adam_params=STEP)),
    ):
        client = service.create_lora_training_client(model(), rank=2, seed=0)
        client.forward_backward(DATA, "cross_entropy")
        give(client).result()
        after.append(weights(client).tobytes())
    assert len(set(after)) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "optim_params is of type NoneType; it must be an AdamParams"),
        ({"optim_params": 1e-4}, "optim_params is of type float"),
        ({"optim_params": STEP, "adam_params": STEP}, "two names of one thing"),
    ],
)
def test_one_set_of_parameters_is_needed(client, given, message):
    with pytest.raises(BadRequestError, match=message):
        client.optim_step(**given)


def test_a_custom_loss_gets_logprobs_whether_that_is_said_or_not(client):
    def loss(data, logprobs):
        return -sum(lp.sum() for lp in logprobs), {}

    said = client.forward_backward_custom(DATA, loss, loss_type_input="logprobs").result()
    assert said == client.forward_backward_custom(DATA, loss).result()
    assert said.metrics["surrogate_loss:sum"] == pytest.approx(said.loss, rel=1e-6)
    with pytest.raises(BadRequestError, match="loss_type_input is 'logits'"):
        client.forward_backward_custom(DATA, loss, loss_type_input="logits")
