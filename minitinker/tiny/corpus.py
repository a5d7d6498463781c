r"""The corpus of the embedded base model: small tasks on words and numbers, generated from rules.

A document is one line that asks and one that answers, closed by the end token:

    reverse hello\n
    olleh<|im_end|>

`prompt` writes the first line, for the tasks here and for any task that the model has yet to learn. The
name of the task comes first and its input follows, so `add 3 4`, `sub 9 2` and `max 5 8` differ in their
name only.

**Held-out prompts.** `is_held_out` throws a coin for each prompt: a keyed hash of its text, below one tenth
of the hash's range. Training documents leave these prompts out; `example(..., held_out=True)` draws nothing
else. Both repeat the same draw until the coin falls right, so a held-out prompt is like any other of its
task and hides no pattern: no residue class, no digit, no word. This works for tasks that are not here, too.
The smallest tasks have 300 prompts (mul) and 1000 (next, even), so about 30 and 100 are held out; the
others have thousands.

**Reserved words.** The examples teach the model `pig` (Pig Latin) and `plus` (addition, from a reward
alone). The letters of neither occur in a row anywhere in a document, and no task's name begins with a p.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from minitinker.tiny.scaffold import END, END_ID
from minitinker.tiny.words import COLORS, NOUNS, VERBS, VOWELS, with_s, word

RESERVED = ("pig", "plus")
HELD_OUT_SHARE = 0.1
PROMPT_WEIGHT = 0.1  # prompts are mostly chance, but learning to read them helps

Draw = Callable[[Random], tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """A rule of the corpus.

    weight: its share of the documents, relative to the other tasks; more for what is harder to learn
    draw: makes an input and its answer
    """

    weight: int
    draw: Draw


def number(rng: Random) -> int:
    """A number of 0 to 99, small ones more often."""
    return rng.randrange(rng.choice((10, 30, 100, 100)))


def _on_word(rule: Callable[[str], str], longest: int = 7) -> Draw:
    def draw(rng: Random) -> tuple[str, str]:
        text = word(rng, longest=longest)
        return text, rule(text)

    return draw


def _on_pair(rule: Callable[[int, int], int]) -> Draw:
    def draw(rng: Random) -> tuple[str, str]:
        a, b = number(rng), number(rng)
        return f"{a} {b}", str(rule(a, b))

    return draw


def _count(rng: Random) -> tuple[str, str]:
    text = word(rng)
    letter = rng.choice(text) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    return f"{letter} {text}", str(text.count(letter))


def _letter(rng: Random) -> tuple[str, str]:
    text = word(rng)
    place = rng.randint(1, len(text))
    return f"{place} {text}", text[place - 1]


def _repeat(rng: Random) -> tuple[str, str]:
    text, times = word(rng, longest=4), rng.randint(2, 4)
    return f"{times} {text}", text * times


def _join(rng: Random) -> tuple[str, str]:
    left, right = word(rng, longest=5), word(rng, longest=5)
    return f"{left} {right}", left + right


def _many(rng: Random) -> tuple[str, str]:
    noun = rng.choice(NOUNS) if rng.random() < 0.5 else word(rng)
    return noun, with_s(noun)


def _sub(rng: Random) -> tuple[str, str]:
    less, more = sorted((number(rng), number(rng)))
    return f"{more} {less}", str(more - less)


def _mul(rng: Random) -> tuple[str, str]:
    a, b = number(rng), rng.randint(2, 4)
    return f"{a} {b}", str(a * b)


def _compare(rng: Random) -> tuple[str, str]:
    a = number(rng)
    b = a if rng.random() < 0.2 else number(rng)
    return f"{a} {b}", "less" if a < b else "more" if a > b else "same"


def _next(rng: Random) -> tuple[str, str]:
    n = rng.randrange(1000)
    return str(n), str(n + 1)


def _even(rng: Random) -> tuple[str, str]:
    n = rng.randrange(1000)
    return str(n), "no" if n % 2 else "yes"


def _say(rng: Random) -> tuple[str, str]:
    subject, verb, thing = rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS)
    return f"{subject} {verb} {thing}", f"the {subject} {with_s(verb)} the {thing}"


def _who(rng: Random) -> tuple[str, str]:
    subject, verb, thing = rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS)
    return f"the {subject} {with_s(verb)} the {thing}", f"the {subject}"


def _deny(rng: Random) -> tuple[str, str]:
    subject, verb, thing = rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS)
    return f"the {subject} {with_s(verb)} the {thing}", f"the {subject} does not {verb} the {thing}"


def _color(rng: Random) -> tuple[str, str]:
    things, colors = rng.sample(NOUNS, 2), rng.sample(COLORS, 2)
    asked = rng.randrange(2)
    told = ", ".join(f"the {thing} is {color}" for thing, color in zip(things, colors, strict=True))
    return f"{things[asked]}: {told}", colors[asked]


TASKS: dict[str, Task] = {
    "copy": Task(1, _on_word(lambda w: w)),
    "reverse": Task(3, _on_word(lambda w: w[::-1])),
    "spell": Task(1, _on_word(" ".join)),
    "sort": Task(3, _on_word(lambda w: "".join(sorted(w)), longest=5)),
    "length": Task(1, _on_word(lambda w: str(len(w)))),
    "count": Task(2, _count),
    "vowels": Task(2, _on_word(lambda w: "".join(c for c in w if c in VOWELS))),
    "consonants": Task(2, _on_word(lambda w: "".join(c for c in w if c not in VOWELS))),
    "first": Task(1, _on_word(lambda w: w[0])),
    "last": Task(1, _on_word(lambda w: w[-1])),
    "upper": Task(1, _on_word(str.upper)),
    "repeat": Task(2, _repeat),
    "swap": Task(2, _on_word(lambda w: w[-1] + w[1:-1] + w[0])),  # first and last letter
    "letter": Task(2, _letter),
    "rotate": Task(2, _on_word(lambda w: w[1:] + w[0])),
    "join": Task(1, _join),
    "many": Task(1, _many),
    "add": Task(4, _on_pair(lambda a, b: a + b)),
    "sub": Task(4, _sub),
    "mul": Task(2, _mul),
    "max": Task(1, _on_pair(max)),
    "compare": Task(1, _compare),
    "next": Task(1, _next),
    "even": Task(1, _even),
    "say": Task(1, _say),
    "who": Task(1, _who),
    "deny": Task(1, _deny),
    "color": Task(1, _color),
}


def prompt(task: str, text: str) -> str:
    r"""The line that asks: `prompt("add", "3 4")` is "add 3 4\n". The answer follows it at once."""
    return f"{task} {text}\n"


def is_held_out(prompt: str) -> bool:
    """Whether the prompt is kept out of the training: one tenth of all prompts, for good and by chance."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8, key=b"held out").digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def example(task: str, rng: Random, held_out: bool = False) -> tuple[str, str]:
    """A prompt of the task and its answer: from the training's prompts, or from those kept out of it.

    Raises KeyError if the corpus has no such task.
    """
    draw = TASKS[task].draw
    while True:
        text, answer = draw(rng)
        asked = prompt(task, text)
        if is_held_out(asked) == held_out and not any(r in asked or r in answer for r in RESERVED):
            return asked, answer


def documents(rng: Random) -> Iterator[tuple[str, str]]:
    """Training examples without end, (prompt, answer), the tasks mixed by their weights."""
    names = list(TASKS)
    weights = [task.weight for task in TASKS.values()]
    while True:
        yield example(rng.choices(names, weights)[0], rng)


def encode(prompt: str, answer: str) -> tuple[list[int], list[float]]:
    """A document's token ids, end token included, and the weight of each as a target.

    Both lists have one entry for each byte of the text and one for the end token. The answer and the end
    token weigh 1, the prompt PROMPT_WEIGHT. Nothing is shifted yet: `weights[i]` is for the prediction of
    `tokens[i]`.
    """
    asked, answered = list(prompt.encode()), [*answer.encode(), END_ID]
    return asked + answered, [PROMPT_WEIGHT] * len(asked) + [1.0] * len(answered)


def grade(answer: str, sampled: str) -> bool:
    """Whether the sampled text is the answer, to the letter. An end token decoded with it does not count."""
    return sampled.removesuffix(END) == answer
