"""Taking checkpoints away: those that are deleted, those that have expired, and what killed processes left."""

import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from minitinker.engine.metadata import read_metadata
from minitinker.engine.places import Place, inside, places, run_ids
from minitinker.engine.saved_state import KINDS
from minitinker.engine.sharing import PART, locked, sweep_work_folders
from minitinker.errors import APIError, BadRequestError, NotFoundError
from minitinker.model.files import ASIDE, fsync, old_of, present
from minitinker.model.sums import METADATA

_LEFT = (
    86400.0  # seconds after which a work folder of an earlier version, which held no lock, was left behind
)


def remove(target: Place, only_if: Callable[[Path], bool] = lambda folder: True) -> None:
    """Take a checkpoint away at once, and then its files from the disk. Needs no room on a full disk.

    only_if: asked, of its folder, when nobody can change it any more. Raises OSError where the disk fails.
    """
    gone = [_gone(target.root) for _ in range(2)]
    with locked(target.root):
        folder = present(target.folder)
        if folder is None or not only_if(folder):
            return
        # What waits as old goes first, since it would be found again after the other.
        for source, aside in zip((old_of(target.folder), target.folder), gone, strict=True):
            with suppress(FileNotFoundError):
                os.rename(source, aside)
        fsync(target.folder.parent)
    for aside in gone:
        if aside.is_symlink():
            aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)


def expired(root: Path, folder: Path) -> bool:
    """Whether a checkpoint's metadata says so; if they cannot be read, they do not."""
    try:
        return inside(root, folder / METADATA) and _may_expire(folder) and read_metadata(folder).expired
    except (BadRequestError, NotFoundError, OSError):
        return False


def _may_expire(folder: Path) -> bool:
    """A look at the file that is ten times faster than to read it: a save asks this of all that are of its run."""
    text = (folder / METADATA).read_bytes()
    return b'"expires"' in text and b'"expires": null' not in text


def sweep(root: Path, run_id: str | None = None) -> None:
    """Remove what has expired and what killed processes left behind, everywhere or in one run.

    What a living process is writing is not touched. What cannot be removed stays.
    """
    for run in run_ids(root) if run_id is None else [run_id]:
        for target in places(root, run):
            with suppress(OSError, APIError):
                _end_overwriting(target)
                if expired(root, target.folder):
                    remove(target, only_if=lambda folder: expired(root, folder))
        for kind in KINDS if run_id is None else ():
            with suppress(OSError):
                _sweep_earlier_versions(root / run / kind)
    with suppress(OSError, APIError):
        sweep_work_folders(root)


def _end_overwriting(target: Place) -> None:
    """Where a killed process left a checkpoint waiting as old: put it back, or away if the new one is there."""
    old = old_of(target.folder)
    if old.exists():
        with locked(target.root) as alone:
            if alone and old.exists():
                os.rename(old, _gone(target.root) if target.folder.exists() else target.folder)


def _sweep_earlier_versions(folder: Path) -> None:
    """Remove the work folders of versions that put them beside the checkpoints."""
    for path in folder.glob(f"{ASIDE}*"):
        if path.is_dir() and not path.is_symlink() and time.time() - path.stat().st_mtime > _LEFT:
            shutil.rmtree(path, ignore_errors=True)


def _gone(root: Path) -> Path:
    """A name under which a folder waits to be removed: that of a work folder that nobody works in."""
    return root / f"{PART}{uuid.uuid4().hex}"
