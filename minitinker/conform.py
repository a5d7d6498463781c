"""Dataclasses that check what they are given against their annotations."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from numbers import Integral, Real
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

import numpy as np

from minitinker.errors import BadRequestError


@dataclass(frozen=True)
class Conforming:
    """Base of frozen dataclasses whose fields hold what their annotations say, from the moment they are made.

    Annotations may be classes, Literal, list, tuple, dict, and unions of these. Lists and dicts are copied.
    What is the same in another type is taken and converted: 1 for a float, 3.0 or np.int32(3) for an int,
    a tuple or an array for a list, a dict of its fields for a Conforming, text in ISO 8601 for a datetime. Booleans
    are not numbers here, and strings are neither numbers nor lists.

    Raises: TypeError that names the class, the field, the value and what it must be.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = conform(field.type, getattr(self, field.name), f"{type(self).__name__}.{field.name}")
            object.__setattr__(self, field.name, value)


def argument(kind: Any, value: Any, name: str) -> Any:
    """`conform` for an argument of a call: what does not conform is a BadRequestError."""
    try:
        return conform(kind, value, name)
    except TypeError as error:
        raise BadRequestError(str(error)) from None


def conform(kind: Any, value: Any, name: str) -> Any:
    """`value` as the annotation `kind` wants it. `name` is what the TypeError calls it."""
    members = _members(kind)
    if type(value) in members:
        return value
    choices = [member for member in members if member is not NoneType]
    if len(choices) == 1:  # its own error says more than that of the union: which element is wrong
        return _convert(choices[0], value, name, kind)
    for choice in choices:
        try:
            return _convert(choice, value, name, kind)
        except TypeError:
            continue
    raise _mismatch(kind, value, name)


def is_whole(value: object) -> TypeGuard[Integral]:
    """Whether it is a whole number by its type. Booleans are none, nor is a time, which NumPy counts among them."""
    return isinstance(value, Integral) and not isinstance(value, bool | np.timedelta64)


def _convert(member: Any, value: Any, name: str, kind: Any) -> Any:
    """`value` as `member`, which is not a union but part of the annotation `kind`."""
    origin, arguments = get_origin(member), get_args(member)
    if member is Any:
        return value
    if origin is list:
        return _list_of(arguments[0], value, name, kind)
    if origin is tuple and isinstance(value, tuple) and len(value) == len(arguments):
        return tuple(
            conform(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(arguments, value, strict=True))
        )
    if origin is dict and isinstance(value, Mapping):
        keys, values = arguments
        return {
            conform(keys, k, f"a key of {name}"): conform(values, v, f"{name}[{shortened(k)}]")
            for k, v in value.items()
        }
    if (
        origin is Literal
        and isinstance(value, str | int)
        and not isinstance(value, bool)
        and value in arguments
    ):
        return value
    if member is int or member is float:
        if isinstance(value, Real) and not isinstance(value, bool | np.timedelta64):
            try:
                if member is float:
                    return float(value)
                if is_whole(value) or float(value).is_integer():
                    return math.floor(value)
            except OverflowError:  # a number that no float holds
                raise _mismatch(kind, value, name) from None
    elif member is bool and isinstance(value, np.bool_):
        return bool(value)
    elif isinstance(member, type) and origin is None:
        if isinstance(value, member):
            return value
        if issubclass(member, Conforming) and isinstance(value, Mapping):
            try:
                return member(**value)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
        if member is datetime and isinstance(value, str):
            with suppress(ValueError):
                return datetime.fromisoformat(value)
    raise _mismatch(kind, value, name)


def _list_of(item: Any, value: Any, name: str, kind: Any) -> list[Any]:
    if hasattr(value, "tolist"):
        try:
            value = value.tolist()
        except Exception:  # as of torch tensors without numbers, and of classes
            raise _mismatch(kind, value, name) from None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _mismatch(kind, value, name)
    # Token lists are long, and nearly always right.
    if set(map(type, value)).issubset(_members(item)):
        return list(value)
    return [conform(item, element, f"{name}[{i}]") for i, element in enumerate(value)]


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _mismatch(kind: Any, value: Any, name: str) -> TypeError:
    wanted = " | ".join(_described(member) for member in _members(kind))
    return TypeError(f"{name} is {shortened(value)} ({type(value).__name__}); it must be {wanted}")


def _described(member: Any) -> str:
    if member is NoneType:
        return "None"
    if get_origin(member) is None:
        return str(member.__name__)
    return str(member).removeprefix("typing.")
