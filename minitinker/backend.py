"""The one place that names the op folders and reads the environment.

A backend is a module of ops, chosen here and passed on as a value.
"""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

from minitinker.errors import BadRequestError

BACKENDS = ("reference",)


def load_backend(name: str | None = None) -> ModuleType:
    """The module of ops called `name`, else the one $MINITINKER_BACKEND names, else `reference`.

    Raises BadRequestError for a name that is none of BACKENDS.
    """
    name = name or os.environ.get("MINITINKER_BACKEND") or "reference"
    if name not in BACKENDS:
        raise BadRequestError(f"there is no backend {name!r}; there is: {', '.join(BACKENDS)}")
    return import_module(f"minitinker.{name}")


def storage_folder() -> Path:
    """Where checkpoints live: $MINITINKER_HOME, else ~/.minitinker."""
    home = os.environ.get("MINITINKER_HOME")
    return Path(home).expanduser().absolute() if home else Path.home() / ".minitinker"
