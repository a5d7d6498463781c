"""minitinker/examples: each one runs, on the embedded model and on another, and its rules are right."""

import sys
from importlib import import_module
from random import Random

import pytest
from tiny_models import make_model, with_tokenizer

from minitinker.examples import instruction_rl, pig_latin, show
from minitinker.tiny.corpus import is_held_out, prompt

EXAMPLES = ("pig_latin", "instruction_rl", "custom_loss")
LAST_LINE = {
    "pig_latin": "Exact match on",
    "instruction_rl": "Right on",
    "custom_loss": "answered in capitals",
}


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    import_module(f"minitinker.examples.{name}").main()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_shows_samples_and_says_how_well_it_went(name, monkeypatch, capsys, tmp_path):
    module = import_module(f"minitinker.examples.{name}")
    monkeypatch.setattr(module, "TESTED", 8)
    run(name, monkeypatch, "--steps", 2)
    printed = capsys.readouterr().out
    assert "before" in printed
    assert LAST_LINE[name] in printed
    assert printed.count("\n") >= 12  # the table and the summary


def test_an_example_runs_on_any_supported_model(monkeypatch, capsys):
    folder, _ = make_model("llama3-tied")
    monkeypatch.setattr(pig_latin, "TESTED", 2)
    run("pig_latin", monkeypatch, "--steps", 1, "--base-model", with_tokenizer(folder))
    assert "Exact match on 2 words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("english", "answer"),
    [
        ("banana", "ananabay"),
        ("apple", "appleway"),
        ("string", "ingstray"),
        ("hmm", "hmmway"),
        ("you", "ouyay"),
    ],
)
def test_pig_latin_moves_the_first_consonants_behind(english, answer):
    assert pig_latin.pig_latin(english) == answer


def test_held_out_words_and_pairs_are_never_trained_on():
    random = Random(0)
    for held_out in (False, True):
        for _ in range(200):
            word = pig_latin.draw_word(random, held_out)
            assert is_held_out(prompt("pig", word)) == held_out
            a, b = instruction_rl.draw_pair(random, held_out)
            assert is_held_out(prompt("plus", f"{a} {b}")) == held_out


def test_only_the_exact_sum_is_rewarded():
    assert instruction_rl.reward("7", (3, 4)) == 1
    assert instruction_rl.reward("8", (3, 4)) == instruction_rl.reward("", (3, 4)) == 0


def test_a_table_is_aligned(capsys):
    show.table(["word", "x"], [["a", "1"], ["longer", "22"]])
    assert capsys.readouterr().out.splitlines() == ["word    x", "------  --", "a       1", "longer  22"]


def test_a_plot_is_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    show.plot(tmp_path / "curve.png", [3.0, 2.0, 1.5], "loss")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
