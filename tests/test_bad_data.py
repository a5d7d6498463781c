"""A datum that is wrong in one place is refused by its index and the key, and leaves no trace.

See test_bad_input.py for how to try more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import pytest
from bad_calls import CONTEXT
from bad_values import FLOAT32_MAX, LIMIT, SCALARS, check_told, count, fuzz, odd, one_of, these
from bad_world import World
from hypothesis import given
from hypothesis import strategies as st
from small_clients import datum, prompt
from tiny_models import VOCAB

from minitinker.errors import BadRequestError
from minitinker.types import Datum, EncodedTextChunk, ImageChunk, ModelInput, TensorData

N = 3
INPUTS = {
    "cross_entropy": ["weights"],
    "importance_sampling": ["logprobs", "advantages"],
    "ppo": ["logprobs", "advantages", "clip_low_threshold", "clip_high_threshold"],
    "cispo": ["logprobs", "advantages"],
    "dro": ["logprobs", "advantages"],
    "gspo": ["logprobs", "advantages", "sequence_ratio_mask"],
}
CONFIGS = {"dro": {"beta": 0.1}}
ONES = {"logprobs": -1.0, "clip_low_threshold": 0.5, "clip_high_threshold": 2.0}


def inputs_of(loss: str, n: int = N) -> dict[str, Any]:
    """What is right for a loss: of n tokens."""
    floats = {key: [ONES.get(key, 1.0)] * n for key in INPUTS[loss]}
    return {"target_tokens": list(range(1, n + 1)), **floats}


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a datum: how to make it, and the words of which the error must have one."""

    make: Callable[[], Datum]
    words: tuple[str, ...]

    def __repr__(self) -> str:
        try:
            return f"Flaw({self.words}, {self.make()!r:.400})"
        except Exception as error:
            return f"Flaw({self.words}, {error!r:.400})"


def _numbers(key: str) -> st.SearchStrategy[Callable[[], Any]]:
    """What cannot stand under a key of N numbers: made anew each time."""
    target, one = key == "target_tokens", ONES.get(key, 1.0)
    right = [1, 2, 3] if target else [one] * N
    odd_numbers = (
        [np.nan, np.inf, -np.inf]
        if not target
        else [-1, VOCAB, 2**63 - 1, -(2**63), 2**63, 10**400, 1.5, np.nan]
    )
    lists = [[*right[:-1], x] for x in (*odd_numbers, None, "1", 1j, [1], {})]
    others = [
        [],
        right[:-1],
        [*right, right[0]],
        [right],
        [[[x]] for x in right],
        right[0],
        "123",
        b"123",
        {1: 2},
        None,
    ]
    arrays: list[Callable[[], Any]] = [
        lambda: np.array(right, object),
        lambda: np.array(right, complex),
        lambda: np.array(right, bool),
        lambda: np.array(right, str),
        lambda: np.array(right)[None],
        lambda: np.array(right[0]),
        lambda: TensorData([], "int64" if target else "float32"),
        lambda: TensorData([right[0]], "int64" if target else "float32", [N, 1], [0, 1, 1, 1], [0]),
        lambda: TensorData([right[0]], "int64" if target else "float32", [N, 10**12], [0, 1, 1, 1], [5]),
        lambda: TensorData([right[0]], "int64" if target else "float32", [N, 2**62], [0, 1, 1, 1], [5]),
        lambda: TensorData(right, "float32") if target else TensorData([np.nan] * N, "float32"),
    ]
    return one_of([*these(*lists, *others), *arrays])


TEXTS = [
    *((), (-1, 1, 2), (VOCAB, 1, 2), (10**30, 1, 2), (1, 2), (1, 2, 3, 4), (1,) * (CONTEXT + 1), (1,) * 9999),
]


@st.composite
def flaws(draw: Any, loss: str) -> Flaw:
    """A datum of a loss with one flaw."""
    keys = ["target_tokens", *INPUTS[loss]]
    kind = draw(
        st.sampled_from(["numbers", "numbers", "numbers", "text", "missing", "unknown", "image", "odd"])
    )
    good, text = inputs_of(loss), prompt(1, 2, 3)
    if kind == "numbers":
        key = draw(st.sampled_from(keys))
        value = draw(_numbers(key))
        return Flaw(lambda: Datum(text, good | {key: value()}), (f"'{key}'", "target_tokens"))
    if kind == "missing":
        absent = {"weights", "clip_low_threshold", "clip_high_threshold"}
        key = draw(st.sampled_from([key for key in keys if key not in absent]))
        return Flaw(lambda: Datum(text, {k: x for k, x in good.items() if k != key}), (f"'{key}'",))
    if kind == "unknown":
        key = draw(st.sampled_from(["weigths", "", "\ud800", "mask", "x" * 5000, 5, None, ("weights",)]))
        return Flaw(lambda: Datum(text, good | {key: [1.0] * N}), ("takes no input", "loss_fn_inputs"))
    if kind == "text":
        tokens = draw(st.sampled_from(TEXTS))
        return Flaw(lambda: Datum(prompt(*tokens), good), ("model_input",))
    if kind == "image":
        image = ImageChunk(data=b"", format="png", expected_tokens=1)
        chunks = [EncodedTextChunk(tokens=[1, 2]), image]
        return Flaw(lambda: Datum(ModelInput(chunks=chunks), good), ("model_input",))
    value = draw(odd.filter(lambda make: not isinstance(make(), Datum)))
    return Flaw(value, ("Datum",))


def called(world: World, loss: str, method: str, data: list[Any]) -> Callable[[], Any]:
    if method == "forward_backward_custom":
        return lambda: world.training.forward_backward_custom(
            data, lambda data, lp: (sum(x.sum() for x in lp), {})
        )
    return lambda: getattr(world.training, method)(data, loss, CONFIGS.get(loss))


@fuzz(400)
@given(data=st.data())
def test_a_datum_with_one_flaw_is_refused_by_its_index_and_key(world, data):
    loss = data.draw(st.sampled_from(list(INPUTS)))
    method = data.draw(st.sampled_from(["forward", "forward_backward"]))
    flaw = data.draw(flaws(loss))
    index, others = data.draw(st.integers(0, 2)), [Datum(prompt(1, 2, 3), inputs_of(loss))] * 2
    count("data with one flaw")
    try:
        bad = flaw.make()
    except (TypeError, ValueError) as error:
        check_told(error, *flaw.words)
        return
    raised = world.checked(called(world, loss, method, [*others[:index], bad, *others[index:]]))
    assert raised is not None, "it was taken"
    assert f"data[{index}]" in str(raised), raised
    check_told(raised, *flaw.words)


@fuzz(120)
@given(data=st.data())
def test_extreme_numbers_are_taken_with_finite_gradients_or_leave_no_trace(world, data):
    loss = data.draw(st.sampled_from(list(INPUTS)))
    method = data.draw(st.sampled_from(["forward", "forward_backward"]))
    extreme = st.sampled_from([0, 1, -1, 1e-45, 1e30, -1e30, FLOAT32_MAX, -FLOAT32_MAX, 88, -88, 750, -750])
    drawn = st.lists(extreme, min_size=N, max_size=N)
    keys = [key for key in INPUTS[loss] if "threshold" not in key]
    given_numbers = inputs_of(loss) | {key: data.draw(drawn) for key in keys}
    count("extreme numbers")
    future = None

    def call() -> Any:
        nonlocal future
        one = Datum(prompt(1, 2, 3), given_numbers)
        future = called(world, loss, method, [one])()
        return future

    before = world.trainer.grad
    raised = world.checked(call)
    if raised is not None:
        check_told(raised, "data[0]", "finite", "loss is")
        assert world.trainer.grad is before
    else:
        assert np.isfinite(future.result().loss)


@fuzz(60)
@given(make=odd, where=st.sampled_from(["answer", "loss", "metrics", "metric", "data"]))
def test_data_for_a_custom_loss_and_what_the_loss_returns_may_be_anything(world, make, where):
    check_custom_loss(world, make, where)


@pytest.mark.parametrize("where", ["metric", "loss"])
def test_a_custom_loss_returns_every_odd_number(world, where):
    for value in SCALARS:
        if isinstance(value, Number):
            check_custom_loss(world, lambda value=value: value, where)


def check_custom_loss(world: World, make: Callable[[], Any], where: str) -> None:
    count("custom losses")

    def loss(data: Any, logprobs: list[Any]) -> Any:
        total = sum(lp.sum() for lp in logprobs)
        return {
            "answer": make,
            "loss": lambda: (make(), {}),
            "metrics": lambda: (total, make()),
            "metric": lambda: (total, {"a": make()}),
            "data": lambda: (total, {}),
        }[where]()

    items = [datum(1, 2, 3), make()] if where == "data" else [datum(1, 2, 3)]
    raised = world.checked(lambda: world.training.forward_backward_custom(items, loss))
    if raised is not None:
        check_told(raised, "custom loss", "data[1]")


FORMS = {
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "narrow": lambda x: x.astype(np.int16 if x.dtype.kind == "i" else np.float16),
    "wide": lambda x: x.astype(np.longdouble) if x.dtype.kind == "f" else x.astype(np.uint64),
    "strided": lambda x: np.repeat(x, 2)[::2],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype),
    "a list of NumPy's numbers": list,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", INPUTS)
def test_an_array_of_another_form_gives_the_same_bits(world, loss, form):
    arrays = {
        key: np.array(x, int if key == "target_tokens" else float) for key, x in inputs_of(loss).items()
    }
    changed = {key: FORMS[form](x) for key, x in arrays.items()}
    plain, other = (
        world.training.forward([Datum(prompt(1, 2, 3), given)], loss, CONFIGS.get(loss)).result(LIMIT)
        for given in (arrays, changed)
    )
    assert plain == other


def test_the_largest_datum_and_the_most_targets_are_taken(world):
    whole = Datum(prompt(*[VOCAB - 1] * CONTEXT), {"target_tokens": [VOCAB - 1] * CONTEXT})
    assert world.training.forward([whole], "cross_entropy").result(LIMIT).loss > 0
    every = np.tile(np.arange(VOCAB), (N, 1))
    many = Datum(prompt(1, 2, 3), {"target_tokens": every})
    output = world.training.forward([many], "cross_entropy").result(LIMIT)
    np.testing.assert_allclose(np.exp(output.loss_fn_outputs[0]["logprobs"].to_numpy()).sum(1), 1, rtol=1e-5)
    more = Datum(prompt(1, 2, 3), {"target_tokens": np.zeros((N, VOCAB + 1), int)})
    with pytest.raises(BadRequestError, match=f"K up to {VOCAB}"):
        world.training.forward([more], "cross_entropy").result(LIMIT)
