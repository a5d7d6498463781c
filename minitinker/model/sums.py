"""Checksums of a saved folder's files, in the minitinker.json beside them: sha256 of their bytes, by name."""

import hashlib
from pathlib import Path

from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.config import read_json_object

METADATA = "minitinker.json"
SUMS = "sha256"  # the field of the file that holds them


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_sum(path: Path, saved: str) -> None:
    """Raise NotFoundError or BadRequestError, naming the file, where its bytes are not those with this sum."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist; by {METADATA} it must")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != saved:
        raise BadRequestError(
            f"{path} is not as it was saved: it has {path.stat().st_size} bytes with the sha256 {found:.16}...,"
            f" and {METADATA} says {saved:.16}...; it was altered or damaged; to keep a change of your own, remove"
            f" {path.name} from the {SUMS} of {METADATA}"
        )


def check_sums(folder: Path) -> None:
    """Check all files of a folder that its minitinker.json has sums of; where there is none, nothing.

    Raises what `check_sum` raises, and BadRequestError where the json itself is damaged.
    """
    path = folder / METADATA
    if not path.is_file():
        return
    sums = read_json_object(path).get(SUMS, {})
    if not isinstance(sums, dict):
        raise BadRequestError(f"{path}: {SUMS} is {sums!r:.80}; it must be an object of strings")
    for name, saved in sums.items():
        if Path(name).name != name or not isinstance(saved, str):
            raise BadRequestError(
                f"{path}: {SUMS} has {saved!r:.80} for {name!r:.80}; it must give a file's sum by its name"
            )
        if name != METADATA:
            check_sum(folder / name, saved)
