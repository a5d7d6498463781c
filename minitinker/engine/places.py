"""Which folders a storage folder has, and which names they may bear: the one place where a name becomes a path.

tinker://<run-id>/weights/<name>             <root>/<run-id>/weights/<name>/
tinker://<run-id>/sampler_weights/<name>     <root>/<run-id>/sampler_weights/<name>/
tinker://<run-id>/external_weights/<name>    <root>/<run-id>/external_weights/<name>/
"""

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from minitinker.engine.saved_state import KINDS
from minitinker.errors import BadRequestError
from minitinker.model.files import OLD, old_of
from minitinker.types import ParsedCheckpointTinkerPath

MAX_NAME_BYTES = 200


@dataclass(frozen=True)
class Place:
    """Where one checkpoint is, or would be."""

    root: Path
    run_id: str
    kind: str
    name: str

    @property
    def tinker_path(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def folder(self) -> Path:
        return self.root / self.run_id / self.kind / self.name


def place(root: Path, run_id: str, kind: str, name: str) -> Place:
    """The place of a checkpoint. Raises BadRequestError for a name or kind that cannot be, or a link outwards."""
    if kind not in KINDS:
        raise BadRequestError(f"the kind is {kind!r:.80}; it must be {' or '.join(KINDS)}")
    found = Place(root, check_name(run_id, "run id"), kind, check_name(name))
    check_inside(root, found.folder)
    return found


def place_of(root: Path, tinker_path: str) -> Place:
    """The place that a tinker path names. Raises BadRequestError as `place`, and where it is no tinker path."""
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
    kind, _, name = parsed.checkpoint_id.partition("/")
    return place(root, parsed.training_run_id, kind, name)


def run_ids(root: Path) -> list[str]:
    """The names of the run folders, in alphabetical order; a link that leaves the root is none."""
    return [run_id for run_id in _names(root) if inside(root, root / run_id)]


def places(root: Path, run_id: str) -> list[Place]:
    """The places of a run where something may be, by kind and name; a link that leaves the root is none."""
    found = [
        Place(root, run_id, kind, name)
        for kind in KINDS
        if inside(root, root / run_id / kind)
        for name in _names(root / run_id / kind)
    ]
    return [one for one in found if inside(root, one.folder) and inside(root, old_of(one.folder))]


def check_name(name: str, what: str = "name") -> str:
    """The name of a checkpoint or run, in Unicode's form NFC, if it can be one; else BadRequestError.

    One to 200 bytes of UTF-8, all printable, no slash or backslash, and no dot at the beginning. So the two
    ways to write an é are one name. Upper and lower case differ, where the file system lets them.
    """
    composed = unicodedata.normalize("NFC", name) if isinstance(name, str) else name
    if not _is_name(composed):
        raise BadRequestError(
            f"the {what} is {name!r:.80}; it must be 1 to {MAX_NAME_BYTES} bytes of printable UTF-8, with no"
            " slash or backslash, and not begin with a dot"
        )
    return composed


def namesake(folder: Path) -> str | None:
    """The other name that the file system takes for the folder's own; None if none.

    So it is with names that differ by case only, where the file system does not tell case.
    """
    try:
        here, swapped = os.lstat(folder), folder.with_name(folder.name.swapcase())
        if swapped == folder or not os.path.samestat(os.lstat(swapped), here):
            return None  # as nearly always, without a look at all the names
        names = os.listdir(folder.parent)
        alike = [name for name in names if name.casefold() == folder.name.casefold()]
        same = [name for name in alike if os.path.samestat(os.lstat(folder.parent / name), here)]
        return None if folder.name in names else next(iter(same), None)
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_inside(root: Path, *paths: Path) -> None:
    """Raise BadRequestError for a path that leaves the root where links are followed."""
    for path in paths:
        if not inside(root, path):
            raise BadRequestError(f"{path} goes through a link that leaves {root}; it is not followed")


def inside(root: Path, path: Path) -> bool:
    """Whether the path stays under the root when symbolic links are followed."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def _is_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()  # which nothing is that has no UTF-8 form
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
        and not name.startswith(".")
        and not set(name) & set("/\\")
    )


def _names(folder: Path) -> list[str]:
    """The names under which `folder` holds folders, sorted; those of temporary ones are none."""
    try:
        names = {entry.name.removeprefix(OLD) for entry in os.scandir(folder) if entry.is_dir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if _is_name(name))
