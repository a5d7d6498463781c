"""Folders that appear whole or not at all: written aside, forced to the disk, then renamed.

A rename happens at once or not at all, but none takes the place of a folder that holds something. So an
overwriting takes two, and the folder it replaces waits in between as `.old-<name>`: whoever looks through
`present` finds the old or the new one at every moment, also after a power failure.
"""

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from minitinker.errors import ConflictError

ASIDE, OLD = ".new-", ".old-"  # how the names of folders begin that are on their way in, and out
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def written_aside(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to put files into; it becomes `folder` when the block ends without an exception.

    Raises ConflictError where something is there, other than an empty folder, unless `overwrite` replaces
    it. Whatever fails, `folder` then is as it was, or, if only the last fsync failed, whole and new.
    """
    if not overwrite:
        _check_free(folder)
    make_folder(folder.parent)
    with (
        tempfile.TemporaryDirectory(prefix=ASIDE, dir=folder.parent) as aside,
        placed(Path(aside), folder, overwrite) as new,
    ):
        yield new


@contextlib.contextmanager
def placed(
    aside: Path, folder: Path, overwrite: bool, lock: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[Path]:
    """An empty folder within `aside` to put files into; it becomes `folder` as in `written_aside`.

    `lock()` is held while names change; the parent of `folder` must be there by then.
    """
    new = aside / "new"  # inside, since a temporary folder itself is closed to other users
    new.mkdir()
    yield new
    for path in (*new.iterdir(), new):
        fsync(path)
    with lock():
        if not overwrite:
            _check_free(folder)
        _put(new, folder, aside, overwrite)
        fsync(folder.parent)


def present(folder: Path) -> Path | None:
    """Where the content of `folder` lies: there, or, if an overwriting was cut off, beside it; or nowhere."""
    for path in (folder, old_of(folder), folder):  # the last, if an overwriting ended between the two looks
        if path.is_dir():
            return path
    return None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each to last."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def old_of(folder: Path) -> Path:
    """Where the content of `folder` waits while it is replaced."""
    return folder.with_name(OLD + folder.name)


def _check_free(folder: Path) -> None:
    there = present(folder) or folder
    if there.exists() and not (there.is_dir() and not any(there.iterdir())):
        raise ConflictError(f"{folder} exists and is not an empty folder; choose another or remove it")


def _put(new: Path, folder: Path, aside: Path, overwrite: bool) -> None:
    """Rename `new` to `folder`; what was there ends up in `aside`, which goes with all that is in it."""
    for attempt in itertools.count():  # more than two only if another process overwrites at the same time
        try:
            os.rename(new, folder)  # takes the place of an empty folder too
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
            if not overwrite:
                _check_free(folder)  # another process was faster
        with contextlib.suppress(FileNotFoundError):
            os.rename(old_of(folder), aside / f"old-{attempt}")
        if not new.exists():
            return
        os.rename(folder, old_of(folder))


def fsync(path: Path) -> None:
    """Force a file's or a folder's contents to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
