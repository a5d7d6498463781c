"""Reading a checkpoint that other processes may replace or delete meanwhile, without a lock.

The metadata of two checkpoints never agree, for they hold the time and the checksums. What was read while a
folder had the same metadata before and after is of one checkpoint; else it is read again.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from minitinker.engine.places import Place, inside, namesake
from minitinker.errors import APIError, BadRequestError, NotFoundError
from minitinker.model.files import present
from minitinker.model.sums import METADATA

T = TypeVar("T")

_TRIES = 200


def settled(target: Place, look: Callable[[Path], T]) -> T:
    """What `look` says of a checkpoint's folder that nobody changes meanwhile.

    Raises what `look` raises twice over, and FileNotFoundError where there is no such checkpoint.
    """
    for attempt in range(_TRIES):
        error: Exception | None = None
        before = _stamp(target)
        if before is None:
            raise FileNotFoundError(target.folder)
        try:
            found = look(before[0])
        except (OSError, BadRequestError, NotFoundError) as raised:
            error = raised
        if _stamp(target) == before:
            if error is None:
                return found
            if attempt > 0:
                raise error
        time.sleep(0.0005 * attempt)
    raise APIError(f"{target.tinker_path} is overwritten again and again; it cannot be read meanwhile")


def _stamp(target: Place) -> tuple[Path, bytes | None] | None:
    """Where the checkpoint lies, and its metadata; None where there is none."""
    folder = present(target.folder)
    if folder is None or (folder == target.folder and namesake(folder) is not None):
        return None
    file = folder / METADATA
    try:
        return folder, file.read_bytes() if inside(target.root, file) else None
    except OSError:
        return folder, None
