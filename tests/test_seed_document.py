"""Every example of the API's own document runs as it is written there, with another import and base model."""

import asyncio
import re
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from seed_examples import EXAMPLES
from small_clients import logprobs, model, saved, train, weights
from tiny_models import TINY

from minitinker import SamplingClient, TrainingClient, types

BASE_MODEL = "minitinker/tiny" if (TINY / "model.safetensors").is_file() else model()
CHECKPOINT = "tinker://run-id/weights/checkpoint-001"
LOSS = r"Loss: (\d+\.\d+)\n"


@pytest.fixture(scope="module")
def checkpoint(service):
    """The run and the checkpoint of the document's paths, after two steps of training."""
    client = service.create_lora_training_client(BASE_MODEL, seed=1)
    train(client, learning_rate=1e-3)
    path = client.save_state("checkpoint-001").result().path
    home = service._session.store.root
    saved(home, path).parent.parent.rename(home / "run-id")
    return client


@pytest.fixture
def run(service, checkpoint, capsys):
    """Runs an example in a new world; returns its variables, and beside them `printed` and `before`."""

    def run(name):
        client = service.create_lora_training_client(BASE_MODEL)
        tokenizer = client.get_tokenizer()
        data = [
            types.Datum(
                types.ModelInput.from_ints(tokenizer.encode("Hello")),
                {"target_tokens": tokenizer.encode("world")},
            )
        ]
        world = {
            "service_client": service,
            "training_client": client,
            "tokenizer": tokenizer,
            "data": data,
            "training_data": data,
            "types": types,
            "torch": torch,
        }
        found = {"training_client": client, "before": weights(client)}
        code = EXAMPLES[name].replace("Qwen/Qwen2.5-7B", BASE_MODEL)
        example = f"async def example():\n{textwrap.indent(code, '    ')}\n    return locals()"
        exec(compile(example, name, "exec"), world)
        found |= asyncio.run(world["example"]())
        return SimpleNamespace(**found, printed=capsys.readouterr().out)

    return run


def test_the_class(run):
    found = run("TrainingClient")
    assert isinstance(found.training_client, TrainingClient)
    assert found.training_client.get_info().model_name == BASE_MODEL
    assert found.fwdbwd_result.loss > 0
    assert found.optim_result.metrics["unclipped_grad_l2:mean"] > 0
    assert isinstance(found.sampling_client.result(), SamplingClient)


def test_forward(run):
    found = run("forward")
    assert float(re.fullmatch(LOSS, found.printed)[1]) == found.result.loss
    np.testing.assert_array_equal(weights(found.training_client), found.before)


def test_forward_backward(run):
    found = run("forward_backward")
    assert float(re.fullmatch(LOSS, found.printed)[1]) == found.fwdbwd_result.loss
    assert found.optim_future.result().metrics["unclipped_grad_l2:mean"] > 0
    assert not np.array_equal(weights(found.training_client), found.before)


def test_forward_backward_custom(run):
    found = run("forward_backward_custom")
    assert found.result.loss == pytest.approx(found.result.metrics["custom_metric"])
    assert found.printed == f"Custom loss: {found.result.loss}\nMetrics: {found.result.metrics}\n"
    assert found.training_client.optim_step(types.AdamParams()).result().metrics["unclipped_grad_l2:mean"] > 0


def test_optim_step(run):
    found = run("optim_step")
    assert found.fwdbwd_result.loss > 0
    assert found.optim_result.metrics["unclipped_grad_l2:mean"] > 0
    assert not np.array_equal(weights(found.training_client), found.before)


def test_save_state(run, service):
    found = run("save_state")
    run_id = found.training_client.get_info().model_id
    assert found.printed == f"Saved to: tinker://{run_id}/weights/checkpoint-001\n"
    np.testing.assert_array_equal(service._session.store.load(found.result.path).flat, found.before)


@pytest.mark.parametrize(("name", "step"), [("load_state", 0), ("load_state_with_optimizer", 2)])
def test_loading(run, checkpoint, name, step):
    found = run(name)
    assert found.load_future.result().path == CHECKPOINT
    np.testing.assert_array_equal(weights(found.training_client), weights(checkpoint))
    assert found.training_client._run.trainer.step == step


def test_save_weights_for_sampler(run):
    found = run("save_weights_for_sampler")
    assert found.printed == f"Sampler weights saved to: {found.result.path}\n"
    assert found.result.path.endswith("/sampler_weights/sampler-001")
    assert found.sampling_client.get_base_model() == BASE_MODEL


def test_get_info(run):
    found = run("get_info")
    assert found.printed == f"Model ID: {found.info.model_id}\nBase model: {BASE_MODEL}\nLoRA rank: 32\n"


def test_get_tokenizer(run):
    found = run("get_tokenizer")
    assert found.text == "Hello world"


def test_create_sampling_client(run, checkpoint):
    found = run("create_sampling_client")
    # A text that the model knows: of one that it finds absurd, float32 itself tells no logprob to 1e-5.
    tokens = found.training_client.get_tokenizer().encode("copy tree\ntree")
    computed = found.sampling_client.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    np.testing.assert_allclose(computed[1:], logprobs(checkpoint, tokens), atol=1e-5)


def test_save_weights_and_get_sampling_client(run):
    found = run("save_weights_and_get_sampling_client")
    (sequence,) = found.result.sequences
    assert 1 <= len(sequence.tokens) == len(sequence.logprobs) <= 20


def test_no_example_is_left_out():
    assert len(EXAMPLES) == 13
    assert set(EXAMPLES) - {"TrainingClient"} <= set(dir(TrainingClient))
