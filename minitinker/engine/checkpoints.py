"""Where checkpoints are: folders under one root, reached by tinker paths and by nothing that leaves it.

    tinker://<run-id>/weights/<name>            <root>/<run-id>/weights/<name>/
    tinker://<run-id>/sampler_weights/<name>    <root>/<run-id>/sampler_weights/<name>/

A checkpoint appears whole or not at all.
"""

from collections.abc import Collection
from pathlib import Path

from minitinker.engine.saved_state import KINDS, Kind, SavedState, read_state, write_state
from minitinker.errors import APIError, BadRequestError, ConflictError, NotFoundError
from minitinker.model.export import merge_adapter
from minitinker.model.files import OLD, present, written_aside
from minitinker.model.weights import load_base_model
from minitinker.types import ParsedCheckpointTinkerPath

__all__ = ["CheckpointStore", "SavedState", "check_name", "merge_checkpoint"]

MAX_NAME_BYTES = 200


class CheckpointStore:
    """The checkpoints under one folder. Nothing outside of it is read or written through a name or path."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def save(self, run_id: str, kind: Kind, name: str, state: SavedState, overwrite: bool = False) -> str:
        """Write a checkpoint and return its tinker path. Moments are kept where kind is "weights".

        Raises BadRequestError for a run id or name that `check_name` refuses, ConflictError where the
        checkpoint exists, unless `overwrite`, and APIError where the disk is full or fails; what was there
        before then still is.
        """
        folder, path = self._folder(run_id, kind, name), f"tinker://{run_id}/{kind}/{name}"
        if not overwrite and present(folder):
            raise ConflictError(f"{path} exists already; choose another name")
        try:
            with written_aside(folder, overwrite) as new:
                write_state(new, state, kind)
        except OSError as error:
            raise APIError(
                f"{path} was not saved in {self.root}: {error.strerror or error}; what was there is as it was"
            ) from error
        return path

    def load(self, path: str, kinds: Collection[Kind] = KINDS) -> SavedState:
        """Read a checkpoint. Raises what `find` and `read_state` raise."""
        return read_state(self.find(path, kinds))

    def find(self, path: str, kinds: Collection[Kind] = KINDS) -> Path:
        """The folder of a checkpoint.

        Raises BadRequestError for what is no tinker path, or of none of these kinds, and NotFoundError,
        saying what there is, where it does not exist.
        """
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
        kind, _, name = parsed.checkpoint_id.partition("/")
        if kind not in kinds:
            raise BadRequestError(f"{path} is of the kind {kind}; it must be {' or '.join(kinds)}")
        folder = present(self._folder(parsed.training_run_id, kind, name))
        if folder is None:
            there = self.paths(parsed.training_run_id) or self.paths()
            shown = ", ".join(there[-10:]) or "none"
            more = f", and {len(there) - 10} more" if len(there) > 10 else ""
            raise NotFoundError(f"there is no checkpoint {path} in {self.root}; there is: {shown}{more}")
        self._check_inside(folder, *folder.iterdir())
        return folder

    def paths(self, run_id: str | None = None) -> list[str]:
        """The tinker paths of all checkpoints, or of those of one run, in alphabetical order."""
        runs = _names(self.root) if run_id is None else [check_name(run_id, "run id")]
        return [
            f"tinker://{run}/{kind}/{name}"
            for run in runs
            for kind in KINDS
            if self._inside(self.root / run / kind)
            for name in _names(self.root / run / kind)
        ]

    def _folder(self, run_id: str, kind: str, name: str) -> Path:
        if kind not in KINDS:
            raise BadRequestError(f"the kind is {kind!r}; it must be {' or '.join(KINDS)}")
        folder = self.root / check_name(run_id, "run id") / kind / check_name(name)
        self._check_inside(folder)
        return folder

    def _check_inside(self, *paths: Path) -> None:
        for path in paths:
            if not self._inside(path):
                raise BadRequestError(
                    f"{path} goes through a link that leaves {self.root}; it is not followed"
                )

    def _inside(self, path: Path) -> bool:
        """Whether the path stays under the root when symbolic links are followed."""
        try:
            return path.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError):  # links in a circle
            return False


def check_name(name: str, what: str = "name") -> str:
    """The name of a checkpoint or run, if it can be one; else BadRequestError.

    One to 200 bytes of UTF-8, all printable, no slash or backslash, and no dot at the beginning.
    """
    if not _is_name(name):
        raise BadRequestError(
            f"the {what} is {name!r:.80}; it must be 1 to {MAX_NAME_BYTES} bytes of printable UTF-8, with no"
            " slash or backslash, and not begin with a dot"
        )
    return name


def _is_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()  # which nothing is that has no UTF-8 form
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
        and not name.startswith(".")
        and not set(name) & set("/\\")
    )


def merge_checkpoint(adapter_folder: Path, folder: Path, dtype: str | None = None) -> Path:
    """Merge a checkpoint into the base model that it was trained on, as a Hugging Face folder.

    Returns `folder`. dtype: see `merge_adapter`. Raises what `read_state`, `load_base_model` and
    `merge_adapter` raise.
    """
    state = read_state(adapter_folder)
    merge_adapter(load_base_model(state.base_model), state.spec, state.flat, folder, dtype)
    return Path(folder)


def _names(folder: Path) -> list[str]:
    """The names under which `folder` holds folders, sorted; those of temporary ones are none."""
    if not folder.is_dir():
        return []
    names = {path.name.removeprefix(OLD) for path in folder.iterdir() if path.is_dir()}
    return sorted(name for name in names if _is_name(name))
