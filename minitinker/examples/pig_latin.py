"""Supervised fine-tuning: teach a model Pig Latin, which it has never seen.

    python -m minitinker.examples.pig_latin

banana becomes ananabay, apple becomes appleway. The model is tested on words that the training leaves out.
"""

import time
from random import Random

from tqdm import tqdm

import minitinker
from minitinker import types
from minitinker.examples import show
from minitinker.model.tokenizer import Tokenizer
from minitinker.tiny.corpus import is_held_out, prompt
from minitinker.tiny.words import VOWELS, word

BATCH = 16
TESTED = 100


def pig_latin(english: str) -> str:
    """The consonants at the beginning go to the end, then comes "ay"; after a first vowel only "way"."""
    first_vowel = next((i for i, letter in enumerate(english) if letter in VOWELS), 0)
    return english + "way" if first_vowel == 0 else english[first_vowel:] + english[:first_vowel] + "ay"


def draw_word(random: Random, held_out: bool) -> str:
    """A word of the training, or one that was drawn by lot to be kept out of it."""
    while True:
        english = word(random)
        if is_held_out(prompt("pig", english)) == held_out:
            return english


def example(tokenizer: Tokenizer, english: str) -> types.Datum:
    """One training example: position i predicts token i + 1, and only the answer counts."""
    question = tokenizer.encode(prompt("pig", english))
    answer = [*tokenizer.encode(pig_latin(english), add_special_tokens=False), tokenizer.eos_token_id]
    tokens = question + answer
    weights = [0.0] * len(question) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def answers(client: minitinker.SamplingClient, words: list[str]) -> list[str]:
    """What the model takes to be Pig Latin for the words."""
    tokenizer = client.get_tokenizer()
    greedy = types.SamplingParams(max_tokens=20, temperature=0)
    asked = [types.ModelInput.from_ints(tokenizer.encode(prompt("pig", english))) for english in words]
    futures = [client.sample(question, 1, greedy) for question in asked]
    tokens = [future.result().sequences[0].tokens for future in futures]
    return [tokenizer.decode(each, skip_special_tokens=True) for each in tokens]


def main() -> None:
    args = show.options(__doc__, steps=500, learning_rate=4e-3)
    began = time.perf_counter()
    random = Random(args.seed)
    tested = [draw_word(random, held_out=True) for _ in range(TESTED)]

    service = minitinker.ServiceClient()
    client = service.create_lora_training_client(base_model=args.base_model, rank=32, seed=args.seed)
    tokenizer = client.get_tokenizer()
    before = answers(client.save_weights_and_get_sampling_client(), tested)

    losses = []
    with tqdm(range(args.steps), desc="training", unit="step") as progress:
        for step in progress:
            batch = [example(tokenizer, draw_word(random, held_out=False)) for _ in range(BATCH)]
            rate = args.learning_rate * (1 - step / args.steps)
            gradient = client.forward_backward(batch, "cross_entropy")
            update = client.optim_step(types.AdamParams(learning_rate=rate))
            losses.append(gradient.result().loss / BATCH)
            update.result()
            progress.set_postfix(loss=f"{losses[-1]:.3f}")

    after = answers(client.save_weights_and_get_sampling_client(), tested)
    right = [
        [given == pig_latin(english) for given, english in zip(each, tested, strict=True)]
        for each in (before, after)
    ]
    shown = list(zip(tested, before, after, strict=True))[:8]
    print()
    show.table(
        ["word", "before", "after", ""],
        [
            [english, b[:20], a, "right" if a == pig_latin(english) else f"it is {pig_latin(english)}"]
            for english, b, a in shown
        ],
    )
    print(
        f"\nExact match on {TESTED} words kept out of the training: {sum(right[0])} % before, {sum(right[1])} % after"
    )
    print(f"{args.steps} steps of {BATCH} words in {time.perf_counter() - began:.0f} s")
    show.plot(args.plot, losses, "loss per word")
    service.close()


if __name__ == "__main__":
    main()
