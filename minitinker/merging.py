"""From a trained adapter to a model that any library loads."""

import os
from pathlib import Path
from reprlib import repr as shortened

from minitinker.backend import storage_folder
from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.origin import merge_checkpoint, read_origin
from minitinker.errors import BadRequestError


def merge(checkpoint: str | Path, folder: str | Path, dtype: str | None = None) -> Path:
    """Write base model plus adapter, W + (alpha / rank) B A, as a new Hugging Face folder.

    Args:
        checkpoint: a tinker:// path, or a folder with an adapter in PEFT's format.
        folder: where to write; it must not exist or be empty.
        dtype: "float32" or "bfloat16"; None is the base model's own.

    A tied head that was adapted is written untied. Returns the folder.
    """
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise BadRequestError(f"folder is {shortened(folder)}; it must be the path of a folder")
    state = read_origin(checkpoint, CheckpointStore(storage_folder()))
    merge_checkpoint(state, Path(os.path.abspath(folder)), dtype)
    return Path(folder)
