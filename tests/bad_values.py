"""What the fuzz of bad input is made of: odd values of every kind, and what an argument may say to them.

Other test files import this one by name: `from bad_values import Case, odd`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from small_clients import datum, prompt

from minitinker.types import AdamParams, ImageChunk, SamplingParams, TensorData

FUZZ = int(os.environ.get("MINITINKER_FUZZ", "0"))  # inputs a law, for a longer search from another start
LIMIT = 60.0  # seconds within which every result must be there
MOST_WORDS = 1500  # characters of an error's text
FLOAT32_MAX = float(np.finfo(np.float32).max)

tried: dict[str, int] = {}  # inputs by law, counted


def fuzz(inputs: int) -> settings:
    """The settings of a law that the suite holds against so many inputs."""
    return settings(
        max_examples=FUZZ or inputs,
        derandomize=not FUZZ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def count(law: str) -> None:
    tried[law] = tried.get(law, 0) + 1


def summary() -> str:
    told = [f"{number:8,}  {law}" for law, number in tried.items()]
    return "\n".join([f"{sum(tried.values()):8,}  bad inputs tried, of which", *told])


def check_told(error: Exception, *names: str) -> None:
    """An error's text has one of the names, and is short."""
    assert any(name in str(error) for name in names), error
    assert len(str(error)) < MOST_WORDS


@dataclass(frozen=True)
class Case:
    """An argument's value, as a function that makes it, since making it may raise already.

    taken: whether a call has to take it; None: it may. names: what an error must name, one of these.
    """

    make: Callable[[], Any]
    taken: bool | None
    names: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Case(taken={self.taken}, names={self.names}, value={_shown(self.make)})"


@dataclass(frozen=True)
class Slot:
    """What an argument is given: cases that are drawn, and those near its rule, each of which is tried."""

    drawn: st.SearchStrategy[Case]
    listed: list[Case]

    def __or__(self, other: "Slot") -> "Slot":
        return Slot(self.drawn | other.drawn, [*self.listed, *other.listed])


def _shown(make: Callable[[], Any]) -> str:
    try:
        value = make()
        return f"{type(value).__name__} {value!r:.300}"
    except Exception as error:
        return repr(error)


class Number(float):
    """Another class of numbers."""


def _in_itself() -> list[Any]:
    nest: list[Any] = []
    nest.append(nest)
    return nest


def _deep(levels: int) -> list[Any]:
    nest: list[Any] = [1]
    for _ in range(levels):
        nest = [nest]
    return nest


SCALARS = [
    *(None, True, False, 0, 1, -1, 2, 3, 256, 264, 10**6, 10**9, 10**30, 10**400, -(10**400)),
    *(2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64, 2**64 - 1),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-320, 1e-40, 1e38, 1e300, math.nan, math.inf, -math.inf),
    *(
        "",
        "a",
        "1",
        "nan",
        "None",
        "tinker://x/weights/y",
        "..",
        "/",
        "~",
        "~nobody",
        "\0",
        "\ud800",
        "x" * 5000,
    ),
    *(b"", b"a", 1j, complex(math.nan, 1), Fraction(1, 3), Fraction(10**400), Decimal(1), Decimal("NaN")),
    *(Number(0.5), Ellipsis, NotImplemented, int, str, np.ndarray, torch.Tensor, TensorData, print, len),
    *(np.bool_(True), np.int8(-1), np.int64(1), np.uint64(2**64 - 1), np.float16(0.5), np.float32(np.nan)),
    *(np.longdouble("1e4000"), np.complex64(1), np.str_("a"), np.bytes_(b"a"), np.datetime64("2026-01-01")),
    *(np.timedelta64(1), np.void(b"a"), Path("a"), prompt(1, 2), prompt(), datum(1, 2, 3), AdamParams()),
    *(SamplingParams(), TensorData([1], "int64"), ImageChunk(data=b"", format="png")),
]
MADE: list[Callable[[], Any]] = [
    *(list, dict, set, tuple, object, bytearray, _in_itself, lambda: iter([1]), lambda: range(3)),
    *(
        lambda: [1, 2],
        lambda: ["a"],
        lambda: [None],
        lambda: [[1], [2, 3]],
        lambda: [[[1]]],
        lambda: [1, "a"],
    ),
    *(lambda: [math.nan], lambda: [True], lambda: [0.5], lambda: [10**30], lambda: [-1], lambda: [b"a"]),
    *(
        lambda: [1j],
        lambda: [datum(1, 2)],
        lambda: [prompt(1)],
        lambda: (1,),
        lambda: {1: 2},
        lambda: {"a": 1},
    ),
    *(lambda: {"a": "b"}, lambda: {"a": None}, lambda: {None: None}, lambda: {1, 2}, lambda: frozenset([1])),
    *(lambda: _deep(5), lambda: _deep(70), lambda: ["x" * 5000] * 3, lambda: list(range(5000))),
    *(lambda: memoryview(b"ab"), lambda: ValueError("a"), lambda: (x for x in [1]), lambda: {1: 2}.keys()),
    *(lambda: torch.tensor(1), lambda: torch.tensor([1j]), lambda: torch.tensor([True])),
    *(
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.empty(2, device="meta"),
        lambda: torch.ones(1, dtype=torch.bfloat16),
    ),
    *(lambda: TensorData([1], "int64", [1, 10**12], [0, 1], [5]), lambda: TensorData([], "float32")),
    *(lambda: datum(1, 2, weights=[math.nan]), lambda: prompt(-1, 10**30), lambda: prompt(*range(300))),
]
DTYPES = [
    "bool",
    "i1",
    "u8",
    ">i8",
    "<i4",
    "f2",
    "<f4",
    ">f8",
    "longdouble",
    "c8",
    "O",
    "S2",
    "U2",
    "M8[s]",
    "i4,f4",
]
SHAPES = [(), (0,), (1,), (2,), (3,), (5000,), (2, 2), (3, 1), (0, 3), (2, 1, 2), (1,) * 20]


@st.composite
def odd_arrays(draw: Any) -> Callable[[], np.ndarray]:
    """Arrays of any dtype, shape, byte order and layout."""
    dtype, shape, flaw = (draw(st.sampled_from(of)) for of in (DTYPES, SHAPES, ["", "strided", "read-only"]))

    def make() -> np.ndarray:
        x = np.zeros((*shape[:-1], 2 * shape[-1]) if shape else shape, dtype)
        x = x[..., ::2] if shape and flaw == "strided" else x[..., : shape[-1]] if shape else x
        x.flags.writeable = flaw != "read-only"
        return x

    return make


def _nested() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    )


def always(value: Any) -> Callable[[], Any]:
    return lambda: value


def these(*values: Any) -> list[Callable[[], Any]]:
    """Functions that give the values."""
    return [always(value) for value in values]


def one_of(made: list[Callable[[], Any]]) -> st.SearchStrategy[Callable[[], Any]]:
    """One of these functions. Hypothesis looks at indices: not all values can be hashed or shown."""
    return st.integers(0, len(made) - 1).map(lambda i: made[i])


# Functions that make a value: of each kind, and new ones each time, since some are used up.
odd: st.SearchStrategy[Callable[[], Any]] = st.one_of(
    one_of(these(*SCALARS)),
    one_of(MADE),
    odd_arrays(),
    one_of(these(*SCALARS)),
    _nested().map(always),
    st.integers().map(always),
    st.floats().map(always),
)


# What arguments take: of a value True, False, or None where either is right


def whole(least: float, most: float, none: bool = False) -> Callable[[Any], bool | None]:
    def takes(x: Any) -> bool | None:
        if x is None or isinstance(x, bool) or not isinstance(x, Real):
            return x is None and none
        if not isinstance(x, Integral) or isinstance(x, np.timedelta64):
            return (
                None
                if isinstance(x, float | np.floating)
                and math.isfinite(x)
                and x == int(x)
                and least <= x <= most
                else False
            )
        return bool(least <= int(x) <= most)

    return takes


def flag(x: Any) -> bool | None:
    return True if isinstance(x, bool) else None if isinstance(x, np.bool_) else False


def only(*values: Any) -> Callable[[Any], bool | None]:
    """One of these values, by type and value."""
    return lambda x: any(
        x is one or (isinstance(x, str) and isinstance(one, str) and x == one) for one in values
    )


def nothing(x: Any) -> bool:
    return x is None


def words(x: Any) -> bool:
    return x is None or isinstance(x, str)


def notes(x: Any) -> bool | None:
    if x is None:
        return True
    return isinstance(x, dict) and all(isinstance(part, str) for pair in x.items() for part in pair)


def nowhere(x: Any) -> bool | None:
    """Of what names nothing that there is: nothing drawn here is the name of it."""
    return False


def near(*bounds: float) -> list[Callable[[], Any]]:
    """Numbers beside these, and absurd ones."""
    around = [b + d for b in bounds for d in (-1, -0.5, 0, 0.5, 1)]
    return these(*around, 10**9, 10**30, -(10**30), 1e18, -1, 0.5, math.nan, math.inf)
