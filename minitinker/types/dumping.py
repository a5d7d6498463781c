"""What scripts call on the types that are pydantic models in the hosted service's library."""

import base64
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from reprlib import repr as shortened
from typing import Any, Literal, Self, TypeAlias

from minitinker.conform import Conforming, argument, conform

Mode: TypeAlias = Literal["python", "json"]


@dataclass(frozen=True)
class Dumpable(Conforming):
    """A Conforming dataclass with pydantic's methods to make plain dicts, JSON and changed copies of it.

    What does not conform is a TypeError, where pydantic raises its ValidationError.
    """

    def model_dump(
        self,
        *,
        mode: Mode = "python",
        include: Collection[str] | None = None,
        exclude: Collection[str] | None = None,
        exclude_none: bool = False,
    ) -> dict[str, Any]:
        """The fields in a dict, and so on inside of them; bytes as text in base64.

        Args:
            mode: "json" makes text of times too, so that the answer is what JSON can hold.
            include, exclude: a set of names of this class's own fields; pydantic's dicts, which choose inside of these,
                are a TypeError.
            exclude_none: leave out what is None, inside too.
        """
        argument(Mode, mode, "mode")
        for option, chosen in (("include", include), ("exclude", exclude)):
            if isinstance(chosen, str | Mapping) or not isinstance(chosen, Collection | None):
                raise TypeError(
                    f"{option} is {shortened(chosen)}; it must be a set of names of fields, or None"
                )
        names = [field.name for field in fields(self)]
        if include is not None:
            names = [name for name in names if name in include]
        return {
            name: _plain(getattr(self, name), mode, exclude_none)
            for name in names
            if name not in (exclude or ()) and not (exclude_none and getattr(self, name) is None)
        }

    def model_dump_json(self, *, indent: int | None = None, **options: Any) -> str:
        """The same in JSON, null for numbers that are not finite. options: those of `model_dump` but mode."""
        separators = (",", ":") if indent is None else None
        fields_ = _finite(self.model_dump(mode="json", **options))
        return json.dumps(fields_, indent=indent, separators=separators, ensure_ascii=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced, which must conform. deep has no effect: lists and dicts are copied."""
        return replace(self, **(update or {}))

    @classmethod
    def model_validate(cls, obj: Any) -> Self:
        """One made of a dict, with dicts in it for what it holds; one that is made already is returned."""
        made: Self = conform(cls, obj, cls.__name__)
        return made

    @classmethod
    def model_validate_json(cls, json_data: str | bytes) -> Self:
        """The same from JSON. Raises ValueError for what is none."""
        return cls.model_validate(json.loads(json_data))


def _plain(value: Any, mode: Mode, exclude_none: bool) -> Any:
    if isinstance(value, Dumpable):
        return value.model_dump(mode=mode, exclude_none=exclude_none)
    if isinstance(value, list):
        return [_plain(each, mode, exclude_none) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each, mode, exclude_none) for key, each in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if mode == "json" and isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    return value


def _finite(value: Any) -> Any:
    """A plain value with None for NaN and infinities, which JSON has no words for."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
