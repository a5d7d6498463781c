"""The kernels in the whole loop: what the reference computes, and the same bits whatever else is in the batch.

Without a GPU the kernels run in Triton's interpreter, on a model of a few thousand numbers.
"""

import numpy as np
import pytest
import torch
from small_clients import weights
from tiny_models import make_model, with_tokenizer

from minitinker import (
    AdamParams,
    APIError,
    Datum,
    ModelInput,
    SamplingParams,
    ServiceClient,
    TensorData,
    kernels,
)
from minitinker.backend import load_backend
from minitinker.engine.trainer import Trainer
from minitinker.model.adapter import adapter_spec
from minitinker.model.weights import load_base_model

GPU = torch.cuda.is_available()
MICRO = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    fields = {"num_key_value_heads": 1, "head_dim": 8}
    return str(
        with_tokenizer(make_model("qwen3-tied", tmp_path_factory.mktemp("micro"), **MICRO, **fields)[0])
    )


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Makes ServiceClients, and closes them."""
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    made = []

    def make(backend, **options):
        made.append(ServiceClient(backend=backend, **options))
        return made[-1]

    yield make
    for client in made:
        client.close("errored")


def draw_data(lengths, vocab=264, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Datum(ModelInput.from_ints(x[:-1].tolist()), {"target_tokens": x[1:]})
        for x in (rng.integers(0, vocab, n + 1) for n in lengths)
    ]


def run(client, data, steps=3):
    """The losses of some steps, the logprobs of the last, and a sampler on what came out."""
    outputs = []
    for _ in range(steps):
        outputs.append(client.forward_backward(data, "cross_entropy").result())
        client.optim_step(AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)).result()
    logprobs = np.concatenate([out["logprobs"].to_numpy() for out in outputs[-1].loss_fn_outputs])
    return [output.loss for output in outputs], logprobs, client.save_weights_and_get_sampling_client()


def sample(sampler, prompt, samples=2, tokens=4, **options):
    params = SamplingParams(max_tokens=tokens, seed=3, stop=[], **options)
    return sampler.sample(ModelInput.from_ints(prompt), samples, params, include_prompt_logprobs=True)


def said_by_forward(client, prompt, tokens):
    """The logprobs that `forward` gives to tokens that follow a prompt: (tokens,)."""
    text = [*prompt, *tokens]
    datum = Datum(ModelInput.from_ints(text[:-1]), {"target_tokens": text[1:]})
    output = client.forward([datum], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()[len(prompt) - 1 :]


def test_what_is_reported_beside_samples_and_a_loss_of_sequences_match_the_reference(service, model):
    rl = {"logprobs": [-5.0] * 4, "advantages": [1.0, -1.0, 0.5, 1.0], "sequence_ratio_mask": [0, 1, 1, 1]}
    data = [Datum(ModelInput.from_ints([5, 6, 7, 8]), {"target_tokens": [6, 7, 8, 9]} | rl)]
    wide = {"clip_low_threshold": 0.01, "clip_high_threshold": 50.0}
    answers = []
    for backend, options in (("reference", {}), ("kernels", {"dtype": "float32"})):
        client = service(backend, **options).create_lora_training_client(model, rank=2, seed=0)
        loss = client.forward_backward(data, "gspo", wide).result().loss
        norm = client.optim_step(AdamParams(learning_rate=1e-2)).result().metrics["unclipped_grad_l2:mean"]
        response = (
            client.save_weights_and_get_sampling_client(kind="inflight")
            .sample(
                ModelInput.from_ints([3, 1, 4, 1]),
                2,
                SamplingParams(max_tokens=2, seed=1, temperature=0.7, stop=[]),
                topk_prompt_logprobs=2,
                topk_sample_logprobs=3,
                target_prompt_logprobs=TensorData([[3, -1], [-1, -1], [5, 6]], "int64"),
                prompt_alt_tokens_k=2,
            )
            .result()
        )
        tops = [response.topk_prompt_logprobs_np, *(s.topk_logprobs_np for s in response.sequences)]
        alternatives = response.prompt_alt_tokens
        tokens = [alternatives.tokens.to_numpy(), *(top.token_ids for top in tops)]
        targets = response.target_prompt_logprobs.to_numpy()
        numbers = [alternatives.logprobs.to_numpy(), *(top.logprobs for top in tops), targets, loss, norm]
        answers.append((tokens, numbers))
    (tokens, numbers), (their_tokens, their_numbers) = answers
    for one, other in zip(tokens, their_tokens, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(numbers, their_numbers, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_and_sampling_through_the_kernels_match_the_reference(service, model, recompute):
    data = draw_data([5, 1, 9])
    answers = []
    for backend, options in (("reference", {}), ("kernels", {"dtype": "float32"})):
        client = service(backend, recompute=recompute, **options).create_lora_training_client(
            model, rank=4, seed=0
        )
        losses, logprobs, sampler = run(client, data)
        answer = sample(sampler, [5, 6, 7], temperature=0.7, top_k=50, top_p=0.9).result()
        answers.append((losses, logprobs, answer))
    (losses, logprobs, answer), (their_losses, their_logprobs, their_answer) = answers
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(their_losses, losses, rtol=TOLERANCE)
    np.testing.assert_allclose(their_logprobs, logprobs, rtol=0, atol=TOLERANCE)
    for ours, theirs in zip(answer.sequences, their_answer.sequences, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(theirs.logprobs, ours.logprobs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(
        their_answer.prompt_logprobs[1:], answer.prompt_logprobs[1:], rtol=0, atol=TOLERANCE
    )


def test_what_the_sampler_reports_forward_reports_too_to_the_last_bit(service, model):
    client = service("kernels", dtype="float32").create_lora_training_client(model, rank=4, seed=0)
    data = draw_data([5, 9])
    sampler = run(client, data, steps=1)[2]
    prompts = [[5, 6, 7], [8], list(range(40, 53))]
    answers = [sample(sampler, prompt) for prompt in prompts]  # decoded together
    for prompt, answer in zip(prompts, answers, strict=True):
        for sequence in answer.result().sequences:
            said = said_by_forward(client, prompt, sequence.tokens)
            np.testing.assert_array_equal(np.float32(sequence.logprobs), said)


def test_logprobs_of_a_prompt_have_the_bits_that_forward_reports(service, model):
    client = service("kernels", dtype="float32").create_lora_training_client(model, rank=4, seed=0)
    sampler = run(client, draw_data([9]), steps=1)[2]
    prompts = [[5, 6, 7], [8, 9], list(range(40, 53))]
    answers = [sample(sampler, prompt) for prompt in prompts]  # all in one pass
    computed = [sampler.compute_logprobs(ModelInput.from_ints(prompt)) for prompt in prompts]
    for prompt, answer, alone in zip(prompts, answers, computed, strict=True):
        said = said_by_forward(client, prompt[:1], prompt[1:])
        for found in (answer.result().prompt_logprobs, alone.result()):
            assert found[0] is None
            np.testing.assert_array_equal(np.float32(found[1:]), said)


def test_activations_that_are_formed_again_change_no_bit(service, model):
    data, answers = draw_data([5, 1, 9]), []
    for recompute in (False, True):
        made = service("kernels", dtype="float32", recompute=recompute)
        client = made.create_lora_training_client(model, rank=4, seed=0)
        losses, logprobs, _ = run(client, data, steps=2)
        answers.append([losses, logprobs, weights(client)])
    for kept, formed_again in zip(*answers, strict=True):
        np.testing.assert_array_equal(kept, formed_again)


def test_weights_put_back_are_rounded_anew_for_the_layers(model, monkeypatch):
    monkeypatch.setattr(kernels, "place", lambda device, dtype: (kernels.DEVICE, dtype))
    ops = load_backend("kernels", dtype="bfloat16")  # for nothing that the interpreter would compute wrongly
    base = load_base_model(model)
    trainer = Trainer(ops, base, adapter_spec(base.config, 2, True, True, True), seed=0)
    flat = np.random.default_rng(0).standard_normal(trainer.spec.size, np.float32)
    trainer.restore(flat, None, None, 0)
    np.testing.assert_array_equal(ops.to_numpy(trainer.flat), flat)
    for working in (trainer.copy, trainer.snapshot().flat):
        assert torch.equal(working, ops.array(flat, "bfloat16"))


def test_rows_of_several_adapters_decode_together_with_the_bits_of_each_alone(service, model):
    client = service("kernels", dtype="float32").create_lora_training_client(model, rank=4, seed=0)
    samplers = [run(client, draw_data([6]), steps=1)[2], run(client, draw_data([4]), steps=1)[2]]
    together = [answer.result() for answer in [sample(sampler, [5, 6, 7]) for sampler in samplers]]
    alone = [sample(sampler, [5, 6, 7]).result() for sampler in samplers]
    for one, other in zip(together, alone, strict=True):
        assert [s.tokens for s in one.sequences] == [s.tokens for s in other.sequences]
        assert [s.logprobs for s in one.sequences] == [s.logprobs for s in other.sequences]
        assert one.prompt_logprobs == other.prompt_logprobs


def test_memory_that_runs_out_in_the_kernels_is_told_and_the_client_goes_on(service, model, monkeypatch):
    client = service("kernels", dtype="float32").create_lora_training_client(model, rank=4, seed=0)
    data = draw_data([5])
    first = client.forward_backward(data, "cross_entropy").result().loss

    def no_room(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        ops = client._run.trainer.ops
        patch.setattr(ops, "attention_backward", no_room)
        patch.setattr(ops, "free_memory", lambda: 10**9)
        with pytest.raises(
            APIError, match=r"5 tokens did not fit, where 1.0 GB are free; about \d+ tokens would"
        ):
            client.forward_backward(data, "cross_entropy").result()
    assert client.forward_backward(data, "cross_entropy").result().loss == first  # accumulated, not stepped
    norm = client.optim_step(AdamParams()).result().metrics["unclipped_grad_l2:mean"]
    other = service("kernels", dtype="float32").create_lora_training_client(model, rank=4, seed=0)
    for _ in range(2):  # what was accumulated before the failure is still there
        other.forward_backward(data, "cross_entropy").result()
    assert norm == other.optim_step(AdamParams()).result().metrics["unclipped_grad_l2:mean"]


@pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU")
@pytest.mark.parametrize("batch", [1, 7, 64, 256])
def test_in_bfloat16_a_model_of_a_real_size_samples_with_the_bits_that_forward_reports(
    service, big_model, batch
):
    client = service("kernels", dtype="bfloat16").create_lora_training_client(big_model, rank=32, seed=0)
    vocab = 151_936
    losses, _, sampler = run(client, draw_data([200, 31, 64], vocab))
    assert losses[-1] < losses[0]
    rng = np.random.default_rng(batch)
    prompts = [rng.integers(0, vocab, int(n)).tolist() for n in rng.integers(1, 130, batch)]
    answers = [sample(sampler, prompt, samples=1, tokens=8) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        (sequence,) = answer.result().sequences
        said = said_by_forward(client, prompt[:1], [*prompt[1:], *sequence.tokens])
        found = [*answer.result().prompt_logprobs[1:], *sequence.logprobs]
        np.testing.assert_array_equal(np.float32(found), said)


@pytest.fixture(scope="module")
def big_model(tmp_path_factory):
    """A random model of Qwen3-0.6B's shape, in bfloat16."""
    from bench_contenders import write_model

    folder = str(tmp_path_factory.mktemp("big"))
    write_model("0.6B", folder)
    return folder


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_device_is_a_parameter(service, model):
    last = f"cuda:{torch.cuda.device_count() - 1}"
    client = service("kernels", device=last).create_lora_training_client(model, rank=4, seed=0)
    client.forward_backward(draw_data([5]), "cross_entropy").result()
    assert str(client._run.trainer.flat.device) == last
