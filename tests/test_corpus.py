"""The corpus of the embedded model, against answers worked out another way, and its held-out prompts."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import islice, product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitinker.tiny import corpus, words
from minitinker.tiny.scaffold import END

PLURAL_RULES = (  # first match wins
    (r"(.*)(ss|s|x|z|ch|sh)", r"\1\2es"),
    (r"(.*[^aeiou])y", r"\1ies"),
    (r"(.*)", r"\1s"),
)


def add_s(stem: str) -> str:
    pattern, form = next((p, f) for p, f in PLURAL_RULES if re.fullmatch(p, stem))
    return re.sub(f"^{pattern}$", form, stem)


def bare_verb(third_person: str) -> str:
    (bare,) = (verb for verb in words.VERBS if add_s(verb) == third_person)
    return bare


def sort_by_insertion(word: str) -> str:
    out: list[str] = []
    for letter in word:
        out.insert(sum(other <= letter for other in out), letter)
    return "".join(out)


def who(_the: str, subject: str, _verb: str, _the_too: str, _thing: str) -> str:
    return f"the {subject}"


def deny(_the: str, subject: str, verb: str, _the_too: str, thing: str) -> str:
    return f"the {subject} does not {bare_verb(verb)} the {thing}"


def color(asked: str, *told: str) -> str:
    (found,) = re.findall(rf"the {asked.rstrip(':')} is (\w+)", " ".join(told))
    return str(found)


# task -> the answer, from the prompt's fields; written independently of the corpus
ANSWERS: dict[str, Callable[..., str]] = {
    "copy": lambda w: re.sub(r"(.)", r"\1", w),
    "reverse": lambda w: "".join(w[len(w) - 1 - i] for i in range(len(w))),
    "spell": lambda w: re.sub(r"(?<=.)(?=.)", " ", w),
    "sort": sort_by_insertion,
    "length": lambda w: str(sum(1 for _ in w)),
    "count": lambda c, w: str(len(w) - len(w.replace(c, ""))),
    "vowels": lambda w: re.sub(r"[^aeiou]", "", w),
    "consonants": lambda w: re.sub(r"[aeiou]", "", w),
    "first": lambda w: re.sub(r"(.).*", r"\1", w),
    "last": lambda w: re.sub(r".*(.)", r"\1", w),
    "upper": lambda w: "".join(chr(ord(c) - 32) for c in w),
    "repeat": lambda n, w: "".join(w for _ in range(int(n))),
    "swap": lambda w: re.sub(r"^(.)(.*)(.)$", r"\3\2\1", w),
    "letter": lambda n, w: re.sub(rf".{{{int(n) - 1}}}(.).*", r"\1", w),
    "rotate": lambda w: re.sub(r"(.)(.*)", r"\2\1", w),
    "join": lambda a, b: f"{a}{b}",
    "many": add_s,
    "add": lambda a, b: str(len([*range(int(a)), *range(int(b))])),
    "sub": lambda a, b: str(len(range(int(b), int(a)))),
    "mul": lambda a, b: str(len(list(product(range(int(a)), range(int(b)))))),
    "max": lambda a, b: a if range(int(b), int(a)) else b,
    "compare": lambda a, b: "same" if a == b else "more" if range(int(b), int(a)) else "less",
    "next": lambda n: str(len(range(int(n) + 1))),
    "even": lambda n: "yes" if n[-1] in "02468" else "no",
    "say": lambda s, v, t: f"the {s} {add_s(v)} the {t}",
    "who": who,
    "deny": deny,
    "color": color,
}


@pytest.fixture(scope="module")
def training() -> list[tuple[str, str]]:
    return list(islice(corpus.documents(Random(1)), 30_000))


def test_the_same_seed_gives_the_same_documents() -> None:
    def first(seed: int) -> list[tuple[str, str]]:
        return list(islice(corpus.documents(Random(seed)), 300))

    assert first(3) == first(3)
    assert first(3) != first(4)


@pytest.mark.parametrize("task", corpus.TASKS)
@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_is_right(task: str, held_out: bool) -> None:
    rng = Random(5)
    for _ in range(150):
        prompt, answer = corpus.example(task, rng, held_out)
        name, _, text = prompt.removesuffix("\n").partition(" ")
        assert name == task
        assert prompt == corpus.prompt(name, text)
        assert answer == ANSWERS[task](*text.split()), prompt
        assert answer


def test_training_never_meets_a_held_out_prompt(training: list[tuple[str, str]]) -> None:
    kept_out = {
        corpus.example(task, rng, held_out=True)[0]
        for rng in [Random(6)]
        for task in corpus.TASKS
        for _ in range(100)
    }
    assert all(corpus.is_held_out(prompt) for prompt in kept_out)
    assert not kept_out & {prompt for prompt, _ in training}


def test_the_held_out_prompts_never_change() -> None:
    assert [b for b in range(100) if corpus.is_held_out(corpus.prompt("plus", f"40 {b}"))] == [
        7,
        11,
        14,
        24,
        37,
        44,
        49,
        51,
        55,
        66,
        73,
        74,
        75,
        77,
        92,
    ]


@pytest.mark.parametrize("task", corpus.TASKS)
def test_about_a_tenth_of_each_tasks_inputs_is_held_out(task: str) -> None:
    draw, rng = corpus.TASKS[task].draw, Random(7)
    prompts = {corpus.prompt(task, draw(rng)[0]) for _ in range(4000)}
    share = sum(map(corpus.is_held_out, prompts)) / len(prompts)
    deviation = (0.1 * 0.9 / len(prompts)) ** 0.5
    assert len(prompts) >= 270
    assert abs(share - 0.1) < 4 * deviation


def test_held_out_sums_miss_no_digit() -> None:
    rng = Random(8)
    prompts = [corpus.example("add", rng, held_out=True)[0].split() for _ in range(2000)]
    for place, operand in product((-1, 0), (1, 2)):
        assert {fields[operand][place] for fields in prompts} >= set("123456789")


def test_documents_are_short_lower_case_lines(training: list[tuple[str, str]]) -> None:
    lengths = [len(corpus.encode(*document)[0]) for document in training]
    assert max(lengths) <= 96
    assert sum(lengths) / len(lengths) < 25
    for prompt, answer in training:
        assert re.fullmatch(r"[a-z]+ [a-z0-9:, ]+\n", prompt)
        assert re.fullmatch(r"[a-z0-9 ]+|[A-Z]+", answer)


def test_no_document_holds_a_reserved_word(training: list[tuple[str, str]]) -> None:
    assert not re.search("pig|plus", " ".join(prompt + answer for prompt, answer in training))
    assert not re.search("pig|plus", " ".join(words.WORDS))


def test_a_reserved_word_that_is_drawn_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([("gip", "pig"), ("surplus", "x"), ("cat", "tac"), ("dog", "god"), ("hen", "neh")])
    monkeypatch.setitem(corpus.TASKS, "reverse", corpus.Task(1, lambda rng: next(drawn)))
    assert corpus.example("reverse", Random(0))[0] in {"reverse cat\n", "reverse dog\n"}


def test_tasks_are_mixed_by_their_weights(training: list[tuple[str, str]]) -> None:
    total = sum(task.weight for task in corpus.TASKS.values())
    seen = Counter(prompt.split()[0] for prompt, _ in training)
    for name, task in corpus.TASKS.items():
        assert seen[name] / len(training) == pytest.approx(task.weight / total, rel=0.2)


def test_no_task_is_named_like_the_reserved_words() -> None:
    assert not [name for name in corpus.TASKS if name.startswith("p")]


def test_an_unknown_task_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="plus"):
        corpus.example("plus", Random(0))


@given(st.text(), st.text())
def test_a_document_is_its_bytes_and_the_end_token(prompt: str, answer: str) -> None:
    tokens, weights = corpus.encode(prompt, answer)
    asked = len(prompt.encode())
    assert bytes(tokens[:-1]) == (prompt + answer).encode()
    assert tokens[-1] == 258
    assert weights == [0.1] * asked + [1.0] * (len(tokens) - asked)


def test_only_the_exact_answer_is_graded_right() -> None:
    assert corpus.grade("42", "42")
    assert corpus.grade("42", "42" + END)
    assert not any(corpus.grade("42", sampled) for sampled in ("", "4", "421", " 42", "42\n", "42" + END * 2))


@given(st.integers(0, 2**32), st.integers(3, 7))
def test_made_up_words_can_be_pronounced(seed: int, length: int) -> None:
    word = words.made_up_word(Random(seed), length)
    assert re.fullmatch(r"[a-z]+", word)
    assert len(word) == length
    assert not re.search(r"[aeiou]{3}|[^aeiou]{3}", word)


@given(st.integers(0, 2**32), st.integers(3, 7), st.integers(0, 4))
def test_words_keep_to_the_lengths_asked_for(seed: int, shortest: int, more: int) -> None:
    longest = min(7, shortest + more)
    assert shortest <= len(words.word(Random(seed), shortest, longest)) <= longest


def test_listed_words_have_three_to_seven_letters_and_a_vowel() -> None:
    assert len(words.WORDS) > 300
    assert all(re.fullmatch(r"(?=.*[aeiou])(?=.*[^aeiou])[a-z]{3,7}", word) for word in words.WORDS)
