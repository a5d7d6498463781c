"""A training run: what it is, what is told of it, and how a checkpoint is put into it."""

from dataclasses import dataclass
from types import ModuleType

from minitinker.conform import argument
from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.saved_state import SavedState
from minitinker.engine.trainer import Trainer
from minitinker.errors import BadRequestError
from minitinker.types import GetInfoResponse, LoadWeightsResponse, ModelData


@dataclass(frozen=True)
class Run:
    """A training run: its id, the base model's lasting name, and the trainer."""

    run_id: str
    base_model: str
    trainer: Trainer


def state_of(run: Run, ops: ModuleType, notes: dict[str, str] | None, whole: bool) -> SavedState:
    """What a checkpoint of the run holds now. whole: with the optimizer."""
    trainer = run.trainer
    return SavedState(
        spec=trainer.spec,
        flat=ops.to_numpy(trainer.flat),
        base_model=run.base_model,
        m=ops.to_numpy(trainer.m) if whole else None,
        v=ops.to_numpy(trainer.v) if whole else None,
        step=trainer.step,
        user_metadata=notes,
    )


def load_into(run: Run, store: CheckpointStore, path: str, with_optimizer: bool) -> LoadWeightsResponse:
    """Put a checkpoint into a run. Raises BadRequestError if it is another base model's or does not fit."""
    state = store.load(path)
    if state.base_model != run.base_model:
        raise BadRequestError(
            f"{path} was trained on {state.base_model}, and this run trains {run.base_model}"
        )
    restore(run.trainer, state, path, with_optimizer)
    return LoadWeightsResponse(path=path, model_id=run.run_id)


def restore(trainer: Trainer, state: SavedState, path: str, with_optimizer: bool) -> None:
    """Put a checkpoint into a trainer of the same shape. Raises BadRequestError if it does not fit."""
    if state.spec != trainer.spec:
        raise BadRequestError(
            f"{path} holds an adapter of rank {state.spec.rank} on {len(state.spec.shapes)} linears, this run "
            f"trains rank {trainer.spec.rank} on {len(trainer.spec.shapes)}; "
            "create_training_client_from_state makes a run that fits"
        )
    if not with_optimizer:
        trainer.restore(state.flat, None, None, 0)
    elif state.m is None or state.v is None:
        raise BadRequestError(f"{path} holds no optimizer state; save_state writes it, or use load_state")
    else:
        trainer.restore(state.flat, state.m, state.v, state.step)


def info_of(run: Run) -> GetInfoResponse:
    spec, config = run.trainer.spec, run.trainer.base.config
    data = ModelData(
        arch=config.architecture,
        model_name=run.base_model,
        tokenizer_id=run.base_model,
        model_id=run.run_id,
        lora_rank=spec.rank,
    )
    return GetInfoResponse(
        model_data=data,
        model_id=run.run_id,
        is_lora=True,
        lora_rank=spec.rank,
        model_name=run.base_model,
        type="get_info",
    )


def checked_notes(user_metadata: dict[str, str] | None) -> dict[str, str] | None:
    """A copy of the notes. Raises BadRequestError if they are not a dict of strings."""
    return argument(dict[str, str] | None, user_metadata, "user_metadata")  # type: ignore[no-any-return]
