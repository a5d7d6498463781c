"""Where a run may begin: a checkpoint in storage, a checkpoint's folder, or an adapter that PEFT wrote."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.peft_adapter import peft_base_model, read_peft_adapter
from minitinker.engine.saved_state import ADAPTER_CONFIG, SavedState, read_state
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.export import merge_adapter
from minitinker.model.sums import METADATA
from minitinker.model.weights import BaseModel, lasting_name, load_base_model

LoadBase = Callable[[str], BaseModel]


def read_origin(
    path: str | os.PathLike[str],
    store: CheckpointStore,
    base_model: str | None = None,
    load_base: LoadBase = load_base_model,
) -> SavedState:
    """The state at a tinker path or in a local folder. Its base_model is the one to train on: see `agreed_base`.

    Raises BadRequestError for what is neither, and what `CheckpointStore.load`, `read_state` and
    `read_peft_adapter` raise.
    """
    if str(path).startswith("tinker://"):
        state = store.load(str(path))
        return replace(state, base_model=agreed_base(state.base_model, base_model, path))
    folder = Path(os.path.expanduser(path)) if isinstance(path, str | os.PathLike) and str(path) else None
    if folder is None or not os.path.isdir(folder):
        raise BadRequestError(
            f"the path is {path!r:.300}; it must be a tinker:// path, or a folder with an adapter"
        )
    if (folder / METADATA).is_file():
        state = read_state(folder)
        return replace(state, base_model=agreed_base(state.base_model, base_model, path))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise NotFoundError(f"{folder} has neither {METADATA} nor {ADAPTER_CONFIG}; it holds no adapter")
    base = agreed_base(peft_base_model(folder), base_model, path)
    return replace(read_peft_adapter(folder, load_base(base)), base_model=base)


def agreed_base(named: str, given: str | None, path: str | os.PathLike[str]) -> str:
    """The base model of an adapter that names one, or none (""), where the caller gives one, or none.

    `given` stands in for a folder that is not on this machine. Raises BadRequestError where the two differ,
    and where there is neither.
    """
    if given is None:
        if not named:
            raise BadRequestError(f"{path} names no base model; give base_model")
        return lasting_name(named)
    given = lasting_name(given)
    elsewhere = os.path.isabs(named) and not os.path.isdir(named)
    if named and not elsewhere and not _same(lasting_name(named), given):
        raise BadRequestError(
            f"base_model is {given!r:.300}; {path} was trained on {named!r}, and it must be the same"
        )
    return given if elsewhere or not named else lasting_name(named)


def merge_checkpoint(state: SavedState, folder: Path, dtype: str | None = None) -> Path:
    """Merge a state into the base model that it was trained on, as a Hugging Face folder.

    Returns `folder`. dtype: see `merge_adapter`. Raises what `load_base_model` and `merge_adapter` raise.
    """
    merge_adapter(load_base_model(state.base_model), state.spec, state.flat, folder, dtype)
    return Path(folder)


def _same(one: str, other: str) -> bool:
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))
