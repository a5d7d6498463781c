"""run.json: what a training run is, noted in its folder when it begins, so that storage can list it."""

import getpass
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from minitinker.conform import conform
from minitinker.engine.metadata import Metadata, now
from minitinker.engine.places import check_inside, inside
from minitinker.engine.sharing import work_folder
from minitinker.errors import BadRequestError
from minitinker.model.config import read_json_object
from minitinker.model.files import make_folder

_FILE = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """A training run: its base model and rank, who began it and when, in which session, and the user's notes.

    created is a time in ISO 8601. session_metadata are the notes of the ServiceClient.
    """

    base_model: str
    rank: int
    owner: str
    created: str
    session_id: str | None = None
    user_metadata: dict[str, str] | None = None
    session_metadata: dict[str, str] | None = None

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.created)


def new_record(base_model: str, rank: int, **notes: Any) -> RunRecord:
    """The record of a run that begins now. notes: the fields from session_id on."""
    return RunRecord(base_model, rank, user_name(), now().isoformat(), **notes)


def record_of(metadata: Metadata) -> RunRecord:
    """What a checkpoint tells of a run that has no record, as those of earlier versions."""
    return RunRecord(metadata.base_model, metadata.spec.rank, user_name(), metadata.created.isoformat())


def write_record(root: Path, run_id: str, record: RunRecord) -> None:
    """Note a run. It is a note, not a checkpoint: it appears whole, but is not forced to the disk.

    Raises BadRequestError where the run's folder is a link that leaves the root.
    """
    check_inside(root, root / run_id)
    make_folder(root / run_id)
    with work_folder(root) as aside:
        (aside / _FILE).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        (aside / _FILE).replace(root / run_id / _FILE)


def read_record(root: Path, run_id: str) -> RunRecord | None:
    """The record of a run; None where there is none, or none that can be read."""
    path = root / run_id / _FILE
    if not inside(root, path) or not path.is_file():
        return None
    try:
        fields = read_json_object(path)
        record = RunRecord(**fields)
        for name, kind in RunRecord.__annotations__.items():
            conform(kind, getattr(record, name), name)
        return record if record.time.tzinfo else None
    except (OSError, BadRequestError, TypeError, ValueError):
        return None


def user_name() -> str:
    """The operating system's name for who runs this."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user, as in some containers
        return "unknown"
