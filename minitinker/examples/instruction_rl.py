"""Reinforcement learning: teach a model an instruction from a reward alone.

    python -m minitinker.examples.instruction_rl

The model knows `add 3 4` but has never seen `plus 3 4`. Nobody shows it an answer: it guesses, eight times a
question, and guesses that were right become likelier. It is tested on pairs that the training leaves out.
"""

import time
from random import Random

from tqdm import tqdm

import minitinker
from minitinker import types
from minitinker.examples import show
from minitinker.model.tokenizer import Tokenizer
from minitinker.tiny.corpus import is_held_out, number, prompt

QUESTIONS = 32
GUESSES = 8
TESTED = 200


def draw_pair(random: Random, held_out: bool) -> tuple[int, int]:
    """Two numbers of the training, or two that were drawn by lot to be kept out of it."""
    while True:
        a, b = number(random), number(random)
        if is_held_out(prompt("plus", f"{a} {b}")) == held_out:
            return a, b


def question(tokenizer: Tokenizer, pair: tuple[int, int]) -> types.ModelInput:
    return types.ModelInput.from_ints(tokenizer.encode(prompt("plus", f"{pair[0]} {pair[1]}")))


def reward(text: str, pair: tuple[int, int]) -> float:
    return float(text.strip() == str(sum(pair)))


def experience(asked: types.ModelInput, guess: types.SampledSequence, advantage: float) -> types.Datum:
    """What the loss needs: the tokens drawn, how likely they were when drawn, and how good they proved."""
    tokens = asked.to_ints() + guess.tokens
    given = asked.length - 1  # targets that are part of the question: nothing was decided there
    assert guess.logprobs is not None
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * given + guess.logprobs,
            "advantages": [0.0] * given + [advantage] * len(guess.tokens),
        },
    )


def accuracy(client: minitinker.SamplingClient, pairs: list[tuple[int, int]]) -> tuple[float, list[str]]:
    """The share of right answers, greedy, and the answers."""
    tokenizer = client.get_tokenizer()
    greedy = types.SamplingParams(max_tokens=5, temperature=0)
    futures = [client.sample(question(tokenizer, pair), 1, greedy) for pair in pairs]
    tokens = [future.result().sequences[0].tokens for future in futures]
    texts = [tokenizer.decode(each, skip_special_tokens=True) for each in tokens]
    return sum(reward(text, pair) for text, pair in zip(texts, pairs, strict=True)) / len(pairs), texts


def main() -> None:
    args = show.options(__doc__, steps=60, learning_rate=3e-3)
    began = time.perf_counter()
    random = Random(args.seed)
    tested = [draw_pair(random, held_out=True) for _ in range(TESTED)]

    service = minitinker.ServiceClient()
    client = service.create_lora_training_client(base_model=args.base_model, rank=32, seed=args.seed)
    tokenizer = client.get_tokenizer()
    before, answers_before = accuracy(client.save_weights_and_get_sampling_client(), tested)

    rewards = []
    with tqdm(range(args.steps), desc="training", unit="step") as progress:
        for step in progress:
            sampler = client.save_weights_and_get_sampling_client()
            pairs = [draw_pair(random, held_out=False) for _ in range(QUESTIONS)]
            asked = [question(tokenizer, pair) for pair in pairs]
            params = types.SamplingParams(max_tokens=5, temperature=1.0, seed=args.seed + step)
            futures = [sampler.sample(each, GUESSES, params) for each in asked]

            data, total = [], 0.0
            for pair, each, future in zip(pairs, asked, futures, strict=True):
                guesses = future.result().sequences
                got = [reward(tokenizer.decode(g.tokens, skip_special_tokens=True), pair) for g in guesses]
                mean = sum(got) / GUESSES  # what is above the mean of its group is good, the rest is bad
                total += mean
                if min(got) < max(got):  # else all advantages are zero
                    data += [experience(each, g, r - mean) for g, r in zip(guesses, got, strict=True)]
            rewards.append(total / QUESTIONS)
            progress.set_postfix(reward=f"{rewards[-1]:.2f}")
            if data:
                gradient = client.forward_backward(data, "importance_sampling")
                update = client.optim_step(types.AdamParams(learning_rate=args.learning_rate))
                gradient.result(), update.result()

    after, answers_after = accuracy(client.save_weights_and_get_sampling_client(), tested)
    print()
    shown = list(zip(tested, answers_before, answers_after, strict=True))[:8]
    rows = [[f"plus {a} {b}", one, two, str(a + b)] for (a, b), one, two in shown]
    show.table(["question", "before", "after", "sum"], rows)
    print(f"\nRight on {TESTED} pairs kept out of the training: {before:.0%} before, {after:.0%} after")
    print(f"{args.steps} steps of {QUESTIONS} x {GUESSES} guesses in {time.perf_counter() - began:.0f} s")
    show.plot(args.plot, rewards, "mean reward")
    service.close()


if __name__ == "__main__":
    main()
