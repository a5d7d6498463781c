"""Whatever the types of the API are made of, they hold what their annotations say, or refuse it by name.

See test_bad_input.py for how to try more.
"""

import dataclasses
import typing
from datetime import UTC, datetime
from types import NoneType, UnionType
from typing import Any

import numpy as np
import pytest
from bad_values import MADE, SCALARS, check_told, count, fuzz, odd, one_of, summary, these
from hypothesis import given
from hypothesis import strategies as st
from small_clients import prompt

from minitinker import types
from minitinker.types import ModelInput, ParsedCheckpointTinkerPath, TensorData

CLASSES = [getattr(types, name) for name in types.__all__ if dataclasses.is_dataclass(getattr(types, name))]
TOP = types.TopkLogprobs(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))
# What a field of this name holds that is right.
RIGHT = {
    "training_run_id": "a",
    "checkpoint_type": "training",
    "format": "png",
    "stop_reason": "stop",
    "token_ids": np.zeros((1, 1)).astype(np.int32),
    "logprobs": np.zeros((1, 1), np.float32),
    "rank": 1,
    "loss_fn_inputs": {},
}
BY_KIND: dict[Any, Any] = {str: "a", int: 1, float: 1.0, bool: True, bytes: b"a", datetime: datetime.now(UTC)}


def right(cls: type) -> dict[str, Any]:
    """Arguments that make one."""
    made = {}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            made[field.name] = right_value(cls, field.name, field.type)
    return made


def right_value(cls: type, name: str, kind: Any) -> Any:
    if cls is types.PromptAltTokens:
        return TensorData([1], "int64")
    if name in RIGHT:
        return RIGHT[name]
    if kind in BY_KIND:
        return BY_KIND[kind]
    if typing.get_origin(kind) in (list, dict):
        return typing.get_origin(kind)()
    return kind(**right(kind))


def holds(kind: Any, value: Any) -> bool:
    """Whether a value is what the annotation says, to the last element."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return any(holds(one, value) for one in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is list:
        return type(value) is list and all(holds(arguments[0], one) for one in value)
    if origin is dict:
        return type(value) is dict and all(
            holds(arguments[0], k) and holds(arguments[1], v) for k, v in value.items()
        )
    if origin is np.ndarray:
        return isinstance(value, np.ndarray) and value.dtype == typing.get_args(arguments[1])[0]
    if kind in (int, float, bool, NoneType):
        return type(value) is kind
    return isinstance(value, kind)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_right_fields_make_one(cls):
    made = cls(**right(cls))
    for field in dataclasses.fields(cls):
        assert holds(field.type, getattr(made, field.name)), field.name


def check_field(cls: type, field: Any, value: Any) -> None:
    """A field holds what its annotation says, or the error names it."""
    count("fields of types")
    fields = right(cls)
    if field.name.endswith("_spans"):
        fields |= {key: [] for key in ("model_input_spans", "loss_fn_input_spans")}
    try:
        made = cls(**fields | {field.name: value})
    except (TypeError, ValueError) as error:
        check_told(error, field.name)
    else:
        held = getattr(made, field.name)
        assert holds(field.type, held), held
        assert type(held) is bool or not isinstance(value, bool | np.bool_), "a truth counts as a number"
        assert repr(made)
        assert made == dataclasses.replace(made)


FIELDS = [(cls, field) for cls in CLASSES for field in dataclasses.fields(cls)]


@fuzz(700)
@given(where=st.sampled_from(FIELDS), make=odd)
def test_a_field_holds_what_its_annotation_says_or_is_refused_by_name(where, make):
    check_field(*where, make())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_is_given_every_odd_value(cls):
    for field in dataclasses.fields(cls):
        for make in [*these(*SCALARS), *MADE]:
            check_field(cls, field, make())


LENGTHS = st.one_of(
    st.lists(
        st.sampled_from([-1, 0, 1, 2, 3, 4, 2**32, 2**62, 10**30, 0.5, None, "1", True]), max_size=4
    ).map(lambda x: lambda: x),
    st.lists(st.integers(0, 3), max_size=4).map(lambda x: lambda: x),
    st.just(lambda: None),
    odd,
)
DATA = one_of(these([], [1], [1, 2], [1, 2, 3, 4], [[1, 2]], [0.5], [np.nan], [2**63], [[]], [True]))


@fuzz(1000)
@given(data=DATA | odd, dtype=st.sampled_from(["int64", "float32"]), shape=LENGTHS, crow=LENGTHS, col=LENGTHS)
def test_a_tensor_holds_its_numbers_or_is_refused_by_name(data, dtype, shape, crow, col):
    count("tensors")
    given = {"data": data(), "shape": shape(), "sparse_crow_indices": crow(), "sparse_col_indices": col()}
    try:
        made = TensorData(dtype=dtype, **given)
    except (TypeError, ValueError) as error:
        check_told(error, *given)
        return
    assert made.dtype == dtype
    assert all(type(length) is int and length >= 0 for length in made.shape)
    assert (made.sparse_crow_indices is None) == (made.sparse_col_indices is None)
    if np.prod([float(length) for length in made.shape]) > 1e6:
        return  # a sparse one that no memory holds whole
    assert list(made.to_numpy().shape) == made.shape
    assert TensorData(made.data, dtype, made.shape, made.sparse_crow_indices, made.sparse_col_indices) == made


@pytest.mark.parametrize(
    ("data", "shape", "crow", "col"),
    [
        ([], [-1, 2], [], []),
        ([], [0, -1], [0], []),
        ([1], [1, 2], [0, 1], [2]),
        ([1], [1, 2], [0, 1], [-1]),
        ([1], [1, 2], [0, 1], None),
        ([1], [1, 2], None, [0]),
        ([1], [1, 2], [0, 1.5], [0]),
        ([1], [1, 2], [0, 1], [0.5]),
        ([1], [1, 2.5], [0, 1], [0]),
        ([1], [1, 2], [1, 1], [0]),
        ([1], [1, 2], [0, 10**30], [0]),
        ([1, 2], [1, 2], [0, 2], [1, 0]),
        ([1, 2], [1, 2], [0, 2], [1, 1]),
        ([1, 2], [3, 2], [0, 2, 1, 2], [0, 1]),
        ([1], [10**30, 2], [0, 1], [0]),
        ([1], [2], [0, 1], [0]),
        ([1], 2, [0, 1], [0]),
        ([1], None, [0, 1], [0]),
        ([], [2**32, 2**32], None, None),
        ([1], [-1, -1], None, None),
        ([1], [1] * 100, None, None),
    ],
)
def test_a_broken_layout_is_refused_by_name(data, shape, crow, col):
    count("tensors")
    with pytest.raises(ValueError, match=r"shape|sparse_crow_indices|sparse_col_indices"):
        TensorData(data, "int64", shape, crow, col)


@fuzz(300)
@given(make=odd, name=st.sampled_from(["from_any", "from_numpy", "from_torch", "from_torch_sparse", "dtype"]))
def test_what_is_no_tensor_is_refused_by_a_typed_error(make, name):
    count("makers of tensors")
    value = make()
    try:
        made = TensorData([1], value) if name == "dtype" else getattr(TensorData, name)(value)
    except (TypeError, ValueError) as error:
        check_told(error, "data", "tensor", "array", "dtype")
    else:
        assert made.dtype in ("int64", "float32")


@fuzz(300)
@given(
    make=odd,
    name=st.sampled_from(["from_ints", "append", "append_int", "from_tinker_path", "with_provenance"]),
)
def test_what_is_no_text_path_or_span_is_refused_by_name(make, name):
    count("makers of inputs")
    value = make()
    calls = {
        "from_ints": (lambda: ModelInput.from_ints(value), "tokens"),
        "append": (lambda: prompt(1).append(value), "chunks"),
        "append_int": (lambda: prompt(1).append_int(value), "tokens"),
        "from_tinker_path": (lambda: ParsedCheckpointTinkerPath.from_tinker_path(value), "path"),
        "with_provenance": (lambda: types.Datum(prompt(1)).with_provenance(value, []), "model_input"),
    }
    call, named = calls[name]
    try:
        call()
    except (TypeError, ValueError) as error:
        check_told(error, named)


@pytest.fixture(scope="module", autouse=True)
def told():
    yield
    print(f"\n{summary()}")
