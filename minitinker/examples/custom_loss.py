"""A loss of your own: direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

    python -m minitinker.examples.custom_loss

Asked to `copy` a word, the model writes it as it stands. Pairs of answers say that capitals are preferred:
HELLO to hello. The loss is -log sigmoid(beta (log r(chosen) - log r(rejected))), where r(answer) is the answer's
probability now over that at the start. torch differentiates it down to the logprobs, minitinker the rest.
"""

import time
from random import Random
from typing import Any

from tqdm import tqdm

import minitinker
from minitinker import types
from minitinker.examples import show
from minitinker.model.tokenizer import Tokenizer
from minitinker.tiny.corpus import is_held_out, prompt
from minitinker.tiny.words import word

PAIRS = 8
TESTED = 100
BETA = 0.1


def draw_word(random: Random, held_out: bool) -> str:
    """A word of the training, or one that was drawn by lot to be kept out of it."""
    while True:
        text = word(random)
        if is_held_out(prompt("copy", text)) == held_out:
            return text


def datum(tokenizer: Tokenizer, text: str, answer: str) -> types.Datum:
    """`copy` with one of its two answers; the weights mark the answer."""
    question = tokenizer.encode(prompt("copy", text))
    given = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    tokens, weights = question + given, [0.0] * len(question) + [1.0] * len(given)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def pair(tokenizer: Tokenizer, text: str) -> list[types.Datum]:
    """The chosen answer, then the rejected one."""
    return [datum(tokenizer, text, text.upper()), datum(tokenizer, text, text)]


def log_probability(item: types.Datum, logprobs: Any) -> Any:
    """Of the whole answer."""
    return (logprobs * item.loss_fn_inputs["weights"].to_torch()).sum()


def margins(data: list[types.Datum], logprobs: list[Any], at_start: list[Any]) -> Any:
    """log r(chosen) - log r(rejected) of each pair."""
    import torch

    now = torch.stack([log_probability(item, lp) for item, lp in zip(data, logprobs, strict=True)])
    then = torch.stack([log_probability(item, lp) for item, lp in zip(data, at_start, strict=True)])
    ratios = now - then
    return ratios[0::2] - ratios[1::2]


def main() -> None:
    args = show.options(__doc__, steps=100, learning_rate=3e-4)
    import torch

    began = time.perf_counter()
    random = Random(args.seed)
    tested = [draw_word(random, held_out=True) for _ in range(TESTED)]

    service = minitinker.ServiceClient()
    client = service.create_lora_training_client(base_model=args.base_model, rank=32, seed=args.seed)
    tokenizer = client.get_tokenizer()
    reference = service.create_lora_training_client(
        base_model=args.base_model, rank=1
    )  # B = 0: the base itself

    def logprobs_of(model: minitinker.TrainingClient, data: list[types.Datum]) -> list[Any]:
        outputs = model.forward(data, "cross_entropy").result().loss_fn_outputs
        return [output["logprobs"].to_torch() for output in outputs]

    def answers() -> list[str]:
        sampler = client.save_weights_and_get_sampling_client()
        params = types.SamplingParams(max_tokens=12, temperature=0)
        asked = [types.ModelInput.from_ints(tokenizer.encode(prompt("copy", text))) for text in tested]
        futures = [sampler.sample(each, 1, params) for each in asked]
        return [
            tokenizer.decode(future.result().sequences[0].tokens, skip_special_tokens=True)
            for future in futures
        ]

    before, losses = answers(), []
    with tqdm(range(args.steps), desc="training", unit="step") as progress:
        for _ in progress:
            data = [each for _ in range(PAIRS) for each in pair(tokenizer, draw_word(random, held_out=False))]
            at_start = logprobs_of(reference, data)

            def dpo(
                data: list[types.Datum], logprobs: list[Any], at_start: list[Any] = at_start
            ) -> tuple[Any, dict[str, float]]:
                margin = margins(data, logprobs, at_start)
                loss = -torch.nn.functional.logsigmoid(BETA * margin).mean()
                return loss, {"preferred": (margin > 0).float().mean().item()}

            gradient = client.forward_backward_custom(data, dpo)
            update = client.optim_step(types.AdamParams(learning_rate=args.learning_rate))
            losses.append(gradient.result().loss)
            update.result()
            progress.set_postfix(loss=f"{losses[-1]:.3f}", preferred=gradient.result().metrics["preferred"])

    held_out = [each for text in tested for each in pair(tokenizer, text)]
    margin = margins(held_out, logprobs_of(client, held_out), logprobs_of(reference, held_out))
    after = answers()
    print()
    show.table(["word", "before", "after"], list(zip(tested, before, after, strict=True))[:8])
    shouted = [sum(a == t.upper() for a, t in zip(each, tested, strict=True)) for each in (before, after)]
    print(f"\nOn {TESTED} words kept out of the training:")
    print(f"answered in capitals: {shouted[0]} before, {shouted[1]} after")
    print(f"chosen answer became likelier than the rejected one: {(margin > 0).sum().item()}")
    print(f"{args.steps} steps of {PAIRS} pairs in {time.perf_counter() - began:.0f} s")
    show.plot(args.plot, losses, "DPO loss")
    service.close()


if __name__ == "__main__":
    main()
