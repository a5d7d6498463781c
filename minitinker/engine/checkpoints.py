"""The checkpoints in a storage folder: saved, loaded, listed, copied, deleted, and let expire.

A checkpoint appears whole or not at all, and goes the same way, whenever a process is killed and whatever
other processes do in the same folder meanwhile: see model/files.py and sharing.py. Nothing outside of the
folder is read, written or deleted through a name or path: see places.py.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from reprlib import repr as shortened
from typing import TypeVar

from minitinker.conform import is_whole
from minitinker.engine.metadata import Metadata, metadata_text, now, read_metadata
from minitinker.engine.places import (
    Place,
    check_inside,
    check_name,
    inside,
    namesake,
    place,
    place_of,
    places,
    run_ids,
)
from minitinker.engine.runs import RunRecord, read_record, record_of, write_record
from minitinker.engine.saved_state import (
    KINDS,
    STATES,
    Kind,
    SavedState,
    read_state,
    write_metadata,
    write_state,
)
from minitinker.engine.settled import settled
from minitinker.engine.sharing import locked, work_folder
from minitinker.engine.sweeping import expired, remove, sweep
from minitinker.errors import APIError, BadRequestError, ConflictError, NotFoundError
from minitinker.model.export import merge_adapter
from minitinker.model.files import fsync, make_folder, placed, present
from minitinker.model.sums import METADATA
from minitinker.model.weights import BaseModel

__all__ = ["CheckpointStore", "Entry", "SavedState", "check_name"]

T = TypeVar("T")

MAX_TTL = 10 * 366 * 86400  # seconds, ten years: as long as the hosted service keeps anything


@dataclass(frozen=True)
class Entry:
    """A checkpoint as it is listed. metadata None: it cannot be read. size: bytes of its files."""

    place: Place
    metadata: Metadata | None
    time: datetime
    size: int


class CheckpointStore:
    """The checkpoints under one folder, which is made when the first is saved."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def save(
        self,
        run_id: str,
        kind: Kind,
        name: str,
        state: SavedState,
        overwrite: bool = False,
        ttl_seconds: int | None = None,
    ) -> str:
        """Write a checkpoint and return its tinker path. Moments are kept where kind is "weights".

        ttl_seconds: how long it is kept; None: for good. Raises BadRequestError for a run id or name that
        `check_name` refuses or a ttl that cannot be, ConflictError where the checkpoint exists, unless
        `overwrite`, and APIError where the disk is full or fails; what was there before then still is.
        """
        expires = expiry(ttl_seconds)
        with self._saved(run_id, kind, name, overwrite) as (target, new):
            write_state(new, state, kind, expires)
        return target.tinker_path

    def save_merged(
        self, run_id: str, name: str, state: SavedState, base: BaseModel, ttl_seconds: int | None = None
    ) -> str:
        """Write base + adapter as a Hugging Face folder, of the kind "external_weights". See `save`."""
        expires = expiry(ttl_seconds)
        with self._saved(run_id, "external_weights", name, overwrite=False) as (target, new):
            sums = merge_adapter(base, state.spec, state.flat, new)
            write_metadata(new, state, "external_weights", sums, expires)
        return target.tinker_path

    def load(self, path: str, kinds: Collection[Kind] = STATES) -> SavedState:
        """Read a checkpoint. Raises what `find` and `read_state` raise."""
        return self._steadily(path, read_state, kinds)

    def info(self, path: str) -> Metadata:
        """What a checkpoint is, without its numbers. Raises what `find` and `read_metadata` raise."""
        return self._steadily(path, read_metadata, KINDS)

    def find(self, path: str, kinds: Collection[Kind] = STATES) -> Path:
        """The folder of a checkpoint.

        Raises BadRequestError for what is no tinker path, or of none of these kinds, and NotFoundError,
        saying what there is, where it does not exist or has expired.
        """
        return self._steadily(path, lambda folder: folder, kinds)

    def delete(self, path: str) -> None:
        """Remove a checkpoint, at once and whole. Raises what `find` raises, and APIError if the disk fails."""
        self.find(path, KINDS)
        target = place_of(self.root, path)
        with self._disk(f"{path} was not deleted from"):
            remove(target)

    def copy(self, path: str, ttl_seconds: int | None = None, **notes: str | None) -> str:
        """Copy a checkpoint of any kind into a new run, and return the copy's path. See `find` and `save`.

        The copy shares the files on the disk where the file system can, keeps kind, name, and notes, and does
        not inherit the expiry. notes: fields of the new run's record that differ from those of the source's.
        """
        expires = expiry(ttl_seconds)
        self.info(path)
        source, run_id = place_of(self.root, path), uuid.uuid4().hex
        with self._saved(run_id, source.kind, source.name, overwrite=False) as (target, new):

            def link(folder: Path) -> Metadata:
                for file in new.iterdir():
                    file.unlink()  # of an earlier try
                for file in folder.iterdir():
                    if file.name != METADATA:
                        check_inside(self.root, file)
                        _link(file.resolve(), new / file.name)
                return read_metadata(folder)

            try:
                metadata = settled(source, link)
            except FileNotFoundError:
                raise self._not_found(source) from None
            metadata = replace(metadata, created=now(), expires_at=expires, public=False)
            (new / METADATA).write_text(metadata_text(metadata), encoding="utf-8", newline="")
        record = read_record(self.root, source.run_id) or record_of(metadata)
        self.note_run(run_id, replace(record, created=now().isoformat(), **notes))  # type: ignore[arg-type]
        return target.tinker_path

    def set_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire so many seconds from now, or never (None). Raises what `find` raises."""
        expires = expiry(ttl_seconds)
        self._change(path, lambda metadata: replace(metadata, expires_at=expires))

    def set_public(self, path: str, public: bool) -> None:
        """Note whether a checkpoint is public. Raises what `find` raises, and ConflictError where it is already."""

        def change(metadata: Metadata) -> Metadata:
            if metadata.public == public:
                raise ConflictError(f"{path} is {'public' if public else 'private'} already")
            return replace(metadata, public=public)

        self._change(path, change)

    def entries(self, run_id: str | None = None) -> list[Entry]:
        """All checkpoints that have not expired, or those of one run, by run, kind and name."""
        runs = run_ids(self.root) if run_id is None else [check_name(run_id, "run id")]
        found = (self._entry(target) for run in runs for target in places(self.root, run))
        return [entry for entry in found if entry is not None]

    def paths(self, run_id: str | None = None) -> list[str]:
        """The tinker paths of `entries`."""
        return [entry.place.tinker_path for entry in self.entries(run_id)]

    def note_run(self, run_id: str, record: RunRecord) -> None:
        """Note a run, so that it is listed. Where the disk fails it is not, and its first checkpoint tells of it."""
        with suppress(OSError, APIError):
            write_record(self.root, check_name(run_id, "run id"), record)

    def runs(self) -> dict[str, RunRecord]:
        """The runs of which anything is known, in alphabetical order."""
        known = ((run_id, self.run(run_id)) for run_id in run_ids(self.root))
        return {run_id: record for run_id, record in known if record is not None}

    def run(self, run_id: str) -> RunRecord | None:
        """What is known of a run, from its record, else from its checkpoints."""
        record = read_record(self.root, check_name(run_id, "run id"))
        if record is not None or not inside(self.root, self.root / run_id):
            return record
        told = [entry.metadata for entry in self.entries(run_id) if entry.metadata]
        return record_of(min(told, key=lambda metadata: metadata.created)) if told else None

    def sweep(self) -> None:
        """Remove what has expired and what killed processes left behind; see sweeping.py."""
        sweep(self.root)

    @contextmanager
    def _saved(self, run_id: str, kind: str, name: str, overwrite: bool) -> Iterator[tuple[Place, Path]]:
        """The place of a new checkpoint, and the folder to put its files into; see `save`."""
        target = place(self.root, run_id, kind, name)
        path = target.tinker_path
        with self._disk(f"{path} was not saved in", "what was there is as it was"):
            sweep(self.root, target.run_id)
            if (other := namesake(target.folder)) is not None:
                raise ConflictError(
                    f"{path}: this file system takes {other!r} for the same name; choose another"
                )
            if not overwrite and present(target.folder):
                raise ConflictError(f"{path} exists already; choose another name")
            with (
                work_folder(self.root) as aside,
                placed(aside, target.folder, overwrite, lambda: self._parent(target)) as new,
            ):
                yield target, new

    @contextmanager
    def _parent(self, target: Place) -> Iterator[None]:
        """The folder that a checkpoint comes into is there, and nobody else changes what is in it."""
        with locked(self.root):
            make_folder(target.folder.parent)
            yield

    @contextmanager
    def _disk(self, failed: str, remark: str = "") -> Iterator[None]:
        """Say what could not be done where the disk fails."""
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror or error}{'; ' if remark else ''}{remark}"
            raise APIError(f"{failed} {self.root}: {reason}") from error

    def _change(self, path: str, change: Callable[[Metadata], Metadata]) -> None:
        """Replace a checkpoint's metadata, at once."""
        self.find(path, KINDS)
        target = place_of(self.root, path)
        with self._disk(f"{path} was not changed in"), work_folder(self.root) as aside, locked(self.root):
            folder = present(target.folder)
            if folder is None:
                raise self._not_found(target)
            check_inside(self.root, folder, *folder.iterdir())
            text = metadata_text(change(read_metadata(folder)))
            (aside / METADATA).write_text(text, encoding="utf-8", newline="")
            fsync(aside / METADATA)
            os.replace(aside / METADATA, folder / METADATA)
            fsync(folder)

    def _entry(self, target: Place) -> Entry | None:
        """What there is at a place; None if nothing, or nothing any more."""

        def look(folder: Path) -> Entry | None:
            files = list(folder.iterdir())
            size = sum(file.lstat().st_size for file in files if file.is_file())
            try:
                metadata = read_metadata(folder) if inside(self.root, folder / METADATA) else None
            except (BadRequestError, NotFoundError, OSError):
                metadata = None
            if metadata is None:
                return Entry(target, None, datetime.fromtimestamp(folder.stat().st_mtime, UTC), size)
            return None if metadata.expired else Entry(target, metadata, metadata.created, size)

        try:
            return settled(target, look)
        except OSError:
            return None

    def _steadily(self, path: str, read: Callable[[Path], T], kinds: Collection[Kind]) -> T:
        """What `read` makes of a checkpoint's folder; see `find` for what is raised else."""
        target = place_of(self.root, path)
        if target.kind not in kinds:
            raise BadRequestError(f"{path} is of the kind {target.kind}; it must be {' or '.join(kinds)}")

        def look(folder: Path) -> T:
            check_inside(self.root, folder, *folder.iterdir())
            if expired(self.root, folder):
                raise NotFoundError(
                    f"{path} expired at {read_metadata(folder).expires_at:%Y-%m-%d %H:%M} UTC"
                )
            return read(folder)

        with self._disk(f"{path} cannot be read in"):
            try:
                return settled(target, look)
            except FileNotFoundError:
                raise self._not_found(target) from None

    def _not_found(self, target: Place) -> NotFoundError:
        there = self.paths(target.run_id) or self.paths()
        shown = ", ".join(there[-10:]) or "none"
        more = f", and {len(there) - 10} more" if len(there) > 10 else ""
        return NotFoundError(
            f"there is no checkpoint {target.tinker_path} in {self.root}; there is: {shown}{more}"
        )


def expiry(ttl_seconds: int | None) -> datetime | None:
    """When something expires that is kept for so long from now; None: never.

    Raises BadRequestError unless it is a whole number of seconds from 1 to ten years.
    """
    if ttl_seconds is None:
        return None
    if not is_whole(ttl_seconds) or not 1 <= int(ttl_seconds) <= MAX_TTL:
        raise BadRequestError(
            f"ttl_seconds is {shortened(ttl_seconds)}; it must be None or a whole number of seconds from 1 to"
            f" {MAX_TTL}, ten years"
        )
    return now() + timedelta(seconds=int(ttl_seconds))


def _link(source: Path, target: Path) -> None:
    """Another name for the same file, which nobody ever writes to again; where that cannot be, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
