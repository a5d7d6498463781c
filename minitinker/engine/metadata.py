"""minitinker.json: what a checkpoint's numbers belong to, how long it is kept, and the checksums of its files.

The file's checksum of itself is over its other fields. Checkpoints of earlier versions have no checksums, and
are read without.
"""

import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.adapter import AdapterSpec
from minitinker.model.config import read_json_object
from minitinker.model.sums import METADATA, SUMS, sha256_of

_FORMAT = 1


@dataclass(frozen=True)
class Metadata:
    """What a minitinker.json says.

    kind: "weights" and the like. optimizer: whether Adam's moments are there. user_metadata: the user's notes.
    expires_at: None means never. public: a note without effect. sums: file name -> sha256 of its bytes.
    """

    kind: str
    created: datetime
    base_model: str
    spec: AdapterSpec
    step: int
    optimizer: bool
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None
    public: bool = False
    sums: dict[str, str] = field(default_factory=dict)

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= now()


def now() -> datetime:
    return datetime.now(UTC)


def metadata_text(metadata: Metadata) -> str:
    """The content of the file, its checksum of itself included."""
    fields = {
        "format": _FORMAT,
        "kind": metadata.kind,
        "created": metadata.created.isoformat(),
        "expires": metadata.expires_at and metadata.expires_at.isoformat(),
        "public": metadata.public,
        "base_model": metadata.base_model,
        "step": metadata.step,
        "optimizer": metadata.optimizer,
        "rank": metadata.spec.rank,
        "alpha": metadata.spec.alpha,
        "shapes": metadata.spec.shapes,
        "user_metadata": metadata.user_metadata,
        SUMS: metadata.sums,
    }
    fields[SUMS] = metadata.sums | {METADATA: _own_sum(fields)}
    return json.dumps(fields, indent=2) + "\n"


def read_metadata(folder: Path) -> Metadata:
    """What the folder's minitinker.json says.

    Raises NotFoundError where there is none, and BadRequestError, naming the file, the field and its value,
    where it is not what `metadata_text` writes.
    """
    fields = _Fields.read(folder / METADATA)
    created, expires = fields.time("created"), fields.time("expires", True)
    assert created is not None
    metadata = Metadata(
        kind=fields.text("kind"),
        created=created,
        base_model=fields.text("base_model"),
        spec=fields.spec(),
        step=fields.integer("step", at_least=0),
        optimizer=fields.flag("optimizer"),
        user_metadata=fields.strings("user_metadata"),
        expires_at=expires,
        public=fields.flag("public", False),
        sums=fields.strings(SUMS) or {},
    )
    own = metadata.sums.pop(METADATA, None)
    if own is not None and own != _own_sum(fields.fields):
        raise BadRequestError(
            f"{fields.path} is not as it was saved: its sha256 of itself does not fit, so it was altered or"
            f" damaged; to keep a change of your own, remove {METADATA} from its {SUMS}"
        )
    return metadata


def _own_sum(fields: dict[str, Any]) -> str:
    sums = {name: value for name, value in (fields.get(SUMS) or {}).items() if name != METADATA}
    return sha256_of(json.dumps(fields | {SUMS: sums}, sort_keys=True))


@dataclass(frozen=True)
class _Fields:
    """The fields of the file, checked where they are read."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "_Fields":
        try:
            fields = cls(path, read_json_object(path))
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"{path} does not exist; a checkpoint folder must have it") from None
        if fields.fields.get("format") != _FORMAT:
            fields.fail("format", f"{_FORMAT}, the one that this version reads")
        return fields

    def fail(self, key: str, right: str) -> NoReturn:
        value = json.dumps(self.fields[key]) if key in self.fields else "missing"
        raise BadRequestError(f"{self.path}: {key} is {value:.200}; it must be {right}")

    def integer(self, key: str, at_least: int) -> int:
        value: Any = self.fields.get(key)
        if not _is_integer(value, at_least):
            self.fail(key, f"an integer of at least {at_least}")
        return int(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str):
            self.fail(key, "a string")
        return value

    def strings(self, key: str) -> dict[str, str] | None:
        value = self.fields.get(key)
        if value is not None and not (
            isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())
        ):
            self.fail(key, "an object of strings, or null")
        return value

    def time(self, key: str, or_none: bool = False) -> datetime | None:
        value = self.fields.get(key)
        if value is None and or_none:
            return None
        try:
            time = datetime.fromisoformat(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            time = None
        if time is None or time.tzinfo is None:
            self.fail(key, "a time with its zone, as in 2026-01-31T12:00:00+00:00")
        return time

    def spec(self) -> AdapterSpec:
        alpha, shapes = self.fields.get("alpha"), self.fields.get("shapes")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            self.fail("alpha", "a positive number")
        if not isinstance(shapes, dict) or not shapes or not all(map(_is_shape, shapes.values())):
            self.fail("shapes", "an object that gives each adapted linear its [d_out, d_in]")
        pairs = {module: (d_out, d_in) for module, (d_out, d_in) in shapes.items()}
        return AdapterSpec(self.integer("rank", at_least=1), pairs, alpha)


def _is_integer(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_integer(side, 1) for side in value)
