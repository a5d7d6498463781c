"""How several processes share one storage folder: a lock, and work folders that show who is alive.

    <root>/.lock            held, for moments only, while names change
    <root>/.part-<random>/  what one process is making; it holds the file `lock` in it for as long as it works

The operating system lets go of a lock when its process ends, however it ends: a work folder whose lock is
free was left by a process that is no more. Files stay where they are, only locks on them come and go, so no
process waits for one that is dead. Readers take no lock.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minitinker.errors import APIError
from minitinker.model.files import make_folder

PART = ".part-"
LOCK = ".lock"
_OURS = "lock"  # in a work folder
_PATIENCE = 60.0  # seconds; a lock is held for as long as some renames take
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

try:
    import fcntl

    def _try(descriptor: int) -> bool:
        """Take the lock of an open file, or say at once that another has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _let_go(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

except ImportError:  # Windows
    import msvcrt

    def _try(descriptor: int) -> bool:
        """Take the lock of an open file, or say at once that another has it."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError:
            return False
        return True

    def _let_go(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]


@contextlib.contextmanager
def locked(root: Path) -> Iterator[bool]:
    """Be the only one, among processes and threads, who changes names under `root`; not to be nested.

    Yields False where the file system has no locks, and nobody can be kept out. Raises APIError where another
    holds the lock for a minute.
    """
    make_folder(root)
    with _opened(root / LOCK) as descriptor:
        end = time.monotonic() + _PATIENCE
        while not (held := _locks(descriptor)):
            if held is None:
                yield False
                return
            if time.monotonic() > end:
                raise APIError(
                    f"another process has held {root / LOCK} for {_PATIENCE:.0f} s; end it and try again"
                )
            time.sleep(0.002)
        try:
            yield True
        finally:
            _let_go(descriptor)


@contextlib.contextmanager
def work_folder(root: Path) -> Iterator[Path]:
    """A new folder under `root`, gone at the end with all that is still in it; not within `locked`."""
    with locked(root):  # so that whoever sweeps finds it with its lock held, or not at all
        folder = Path(tempfile.mkdtemp(prefix=PART, dir=root))
        ours = os.open(folder / _OURS, os.O_RDWR | os.O_CREAT, 0o666)
        _locks(ours)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _let_go(ours)
        os.close(ours)
        shutil.rmtree(folder, ignore_errors=True)


def sweep_work_folders(root: Path) -> None:
    """Remove what processes that are no more left behind; a live one's work is not touched."""
    if not any(_work_folders(root)):
        return
    with locked(root) as alone:
        for folder in _work_folders(root) if alone else ():
            if _abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _work_folders(root: Path) -> Iterator[Path]:
    return (path for path in root.glob(f"{PART}*") if path.is_dir() and not path.is_symlink())


def _abandoned(folder: Path) -> bool:
    """Whether no process holds the folder's lock. In `locked`: no folder is without its lock for long."""
    try:
        with _opened(folder / _OURS, os.O_RDWR) as descriptor:
            if held := _locks(descriptor):
                _let_go(descriptor)
            return bool(held)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _locks(descriptor: int) -> bool | None:
    """Whether the lock was free, and now is ours; None where there are no locks."""
    try:
        return _try(descriptor)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
