"""How far minitinker's numbers are from transformers', PEFT's and torch.optim's: `python tests/show_agreement.py`.

Not a test: the tests hold each of these below its bound, and this prints what they come to. On random models of each
family, at ragged lengths, float32 on both sides.
"""

import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tiny_models import (
    FAMILIES,
    from_peft,
    make_batch,
    make_model,
    make_trainer,
    relative_errors,
    to_peft,
    torch_logprobs,
    with_tokenizer,
)

import minitinker
from minitinker.types import AdamParams, Datum

LENGTHS = (1, 7, 33, 20, 150)


def batch(seed: int = 0) -> list[Datum]:
    """Random data with weights above zero: a loss of terms that cancel has no relative error to speak of."""
    return [
        Datum(d.model_input, d.loss_fn_inputs | {"weights": np.abs(d.loss_fn_inputs["weights"].to_numpy())})
        for d in make_batch(LENGTHS, seed=seed)
    ]


def torch_loss(model: torch.nn.Module, data: list[Datum]) -> torch.Tensor:
    return -sum((torch_logprobs(model, d) * d.loss_fn_inputs["weights"].to_torch()).sum() for d in data)


def logprobs_and_gradients(family: str) -> tuple[float, float]:
    """Largest difference of a logprob, and largest relative difference of a gradient of an A or B."""
    folder, model = make_model(family)
    trainer, data = make_trainer(folder), batch()
    peft = to_peft(model, trainer.spec, trainer.flat)
    output = trainer.forward_backward(data, "cross_entropy", None)
    logprobs = max(
        float(np.abs(found["logprobs"].to_numpy() - torch_logprobs(peft, datum).detach().numpy()).max())
        for found, datum in zip(output.loss_fn_outputs, data, strict=True)
    )
    torch_loss(peft, data).backward()
    errors = relative_errors(trainer.grad, from_peft(peft, trainer.spec, gradients=True), trainer.spec)
    return logprobs, max(errors.values())


def ten_steps(family: str) -> tuple[float, float]:
    """Largest relative difference of a loss over ten steps, and of an A or B after them."""
    folder, model = make_model(family)
    trainer = make_trainer(folder, spread=None)
    peft = to_peft(model, trainer.spec, trainer.flat)
    optimizer = torch.optim.AdamW(
        [p for p in peft.parameters() if p.requires_grad], 1e-3, (0.9, 0.95), eps=1e-12, weight_decay=0.01
    )
    worst = 0.0
    for step in range(10):
        data = batch(step)
        ours, theirs = trainer.forward_backward(data, "cross_entropy", None).loss, torch_loss(peft, data)
        theirs.backward()
        trainer.optim_step(AdamParams(learning_rate=1e-3, weight_decay=0.01))
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(ours / theirs.item() - 1))
    return worst, max(relative_errors(trainer.flat, from_peft(peft, trainer.spec), trainer.spec).values())


def checkpoint(family: str) -> tuple[float, bool]:
    """Largest difference of a logprob when PEFT loads a sampler checkpoint; whether resumed training is bit-equal."""
    folder, model = make_model(family)
    service = minitinker.ServiceClient()
    client = service.create_lora_training_client(str(with_tokenizer(folder)), rank=8, seed=0)

    def train(client: minitinker.TrainingClient, seeds: range) -> list[float]:
        losses = []
        for seed in seeds:
            losses.append(client.forward_backward(batch(seed), "cross_entropy"))
            client.optim_step(AdamParams(learning_rate=1e-2))
        return [loss.result().loss for loss in losses]

    train(client, range(3))
    state = client.save_state("middle").result().path
    data = batch()
    ours = client.forward(data, "cross_entropy").result().loss_fn_outputs
    run, kind, name = (
        client.save_weights_for_sampler("adapter").result().path.removeprefix("tinker://").split("/")
    )
    peft = PeftModel.from_pretrained(model, Path(os.environ["MINITINKER_HOME"]) / run / kind / name)
    worst = max(
        float(np.abs(out["logprobs"].to_numpy() - torch_logprobs(peft, datum).detach().numpy()).max())
        for out, datum in zip(ours, data, strict=True)
    )
    resumed = service.create_training_client_from_state_with_optimizer(state)
    equal = train(client, range(3, 8)) == train(resumed, range(3, 8))
    service.close()
    return worst, equal


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"{'':14}  logprobs  gradients  10 steps:  losses   weights  checkpoint in PEFT  resumed")
    with tempfile.TemporaryDirectory() as home:
        os.environ["MINITINKER_HOME"] = home
        for family in FAMILIES:
            (logprob, gradient), (loss, weight), (peft, equal) = (
                logprobs_and_gradients(family),
                ten_steps(family),
                checkpoint(family),
            )
            print(
                f"{family:14}  {logprob:8.1e}  {gradient:9.1e}  {loss:18.1e}  {weight:8.1e}  {peft:18.1e}  "
                f"{'bit-equal' if equal else 'DIFFERS'}"
            )
    print(f"{'bound':14}  {1e-4:8.0e}  {1e-4:9.0e}  {1e-5:18.0e}  {1e-4:8.0e}  {1e-4:18.0e}  bit-equal")


if __name__ == "__main__":
    main()
