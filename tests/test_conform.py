from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest

from minitinker.conform import Conforming, conform


@dataclass(frozen=True, kw_only=True)
class Recipe(Conforming):
    name: str
    minutes: int | None = None
    heat: float = 1
    steps: list[str] = field(default_factory=list)
    kind: Literal["sweet", "salty"] = "sweet"


@pytest.mark.parametrize(
    ("kind", "given", "kept"),
    [
        (int, 3.0, 3),
        (int, np.int32(3), 3),
        (int, np.float32(3), 3),
        (float, 1, 1.0),
        (float, np.float32(0.5), 0.5),
        (float, float("inf"), float("inf")),
        (int | None, None, None),
        (float | None, 2, 2.0),
        (bool, True, True),
        (list[int], (1, 2), [1, 2]),
        (list[int], range(3), [0, 1, 2]),
        (list[int], np.arange(3), [0, 1, 2]),
        (list[int], [np.int64(1), 2.0], [1, 2]),
        (list[float | None], [None, 1], [None, 1.0]),
        (list[tuple[int, float]], [(1, 2)], [(1, 2.0)]),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (str | list[str] | list[int] | None, [], []),
        (str | list[str] | list[int] | None, "a", "a"),
        (str | list[str] | list[int] | None, [1], [1]),
        (str | list[str] | list[int] | None, ("a",), ["a"]),
    ],
)
def test_what_is_the_same_in_another_type_is_converted(kind, given, kept):
    value = conform(kind, given, "x")
    assert value == kept
    assert repr(value) == repr(kept)  # tells 1 from 1.0, and np.int64(1) from 1


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (int, True, r"x is True \(bool\); it must be int"),
        (int, 3.5, r"x is 3.5 \(float\); it must be int"),
        (int, float("inf"), "it must be int"),
        (int, float("nan"), "it must be int"),
        (int, "3", "it must be int"),
        (float, "1e-4", "it must be float"),
        (float, False, "it must be float"),
        (float, None, r"x is None \(NoneType\); it must be float"),
        (bool, 1, "it must be bool"),
        (str, b"a", "it must be str"),
        (int | None, "a", r"it must be int \| None"),
        (Literal["a", "b"], "c", r"it must be Literal\['a', 'b'\]"),
        (Literal["a", "b"], np.zeros(2), "it must be Literal"),
        (list[int], "12", r"it must be list\[int\]"),
        (list[int], {1, 2}, r"it must be list\[int\]"),
        (list[int], 1, r"it must be list\[int\]"),
        (list[int], [1, "x", 2], r"x\[1\] is 'x' \(str\); it must be int"),
        (list[int], np.zeros((2, 2)), r"x\[0\] is \[0.0, 0.0\] \(list\); it must be int"),
        (list[int] | None, [1, "x"], r"x\[1\] is 'x'"),
        (list[tuple[int, float]], [(1,)], r"x\[0\] is"),
        (dict[str, float], {"a": "b"}, r"x\['a'\] is 'b' \(str\); it must be float"),
        (dict[str, float], {1: 2.0}, "a key of x is 1"),
        (dict[str, float], [], "it must be dict"),
        (
            str | list[str] | list[int] | None,
            ["a", 1],
            r"it must be str \| list\[str\] \| list\[int\] \| None",
        ),
    ],
)
def test_what_does_not_conform_is_refused_by_name_and_value(kind, given, message):
    with pytest.raises(TypeError, match=message):
        conform(kind, given, "x")


def test_the_error_names_the_class_and_the_field():
    with pytest.raises(TypeError, match=r"Recipe.minutes is 'ten' \(str\); it must be int \| None"):
        Recipe(name="soup", minutes="ten")
    with pytest.raises(TypeError, match=r"Recipe.kind is 'sour'"):
        replace(Recipe(name="soup"), kind="sour")


def test_a_long_wrong_value_is_shown_shortened():
    with pytest.raises(TypeError) as caught:
        Recipe(name=list(range(10_000)))
    assert len(str(caught.value)) < 200


def test_lists_are_copied():
    steps = ["boil"]
    recipe = Recipe(name="soup", steps=steps)
    steps.append("burn")
    assert recipe.steps == ["boil"]
