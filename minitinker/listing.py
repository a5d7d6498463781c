"""What storage holds, in the types of the API: runs, checkpoints, sessions."""

from reprlib import repr as shortened
from typing import TypeVar

from minitinker.conform import is_whole
from minitinker.engine.checkpoints import CheckpointStore, Entry
from minitinker.engine.runs import RunRecord, user_name
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.config import read_config
from minitinker.model.weights import EMBEDDED_MODEL, find_model
from minitinker.types import (
    Checkpoint,
    CurrentCheckpointStorageUsageItem,
    CurrentCheckpointStorageUsageResponse,
    Cursor,
    GetServerCapabilitiesResponse,
    ParsedCheckpointTinkerPath,
    SupportedModel,
    TrainingRun,
    WeightsInfoResponse,
)

T = TypeVar("T")


def training_run(store: CheckpointStore, run_id: str) -> TrainingRun:
    """A run. Raises BadRequestError for what cannot be a run's id, NotFoundError for one that is not known."""
    record = store.run(run_id)
    if record is None:
        raise NotFoundError(f"there is no training run {run_id!r} in {store.root}")
    return _training_run(store, run_id, record)


def training_runs(store: CheckpointStore) -> list[TrainingRun]:
    """All runs, the one last used first."""
    found = [_training_run(store, run_id, record) for run_id, record in store.runs().items()]
    return sorted(found, key=lambda run: run.last_request_time, reverse=True)


def checkpoints(store: CheckpointStore, run_id: str | None = None) -> list[Checkpoint]:
    """The checkpoints of a run, or all, the newest first."""
    return [_checkpoint(entry) for entry in _newest_first(store, run_id)]


def weights_info(store: CheckpointStore, path: str) -> WeightsInfoResponse:
    """What a checkpoint's weights belong to. Raises what `CheckpointStore.info` raises."""
    metadata = store.info(path)
    modules = metadata.spec.modules
    return WeightsInfoResponse(
        base_model=metadata.base_model,
        is_lora=True,
        lora_rank=metadata.spec.rank,
        train_unembed=modules["train_unembed"],
        train_mlp=modules["train_mlp"],
        train_attn=modules["train_attn"],
    )


def sessions(store: CheckpointStore) -> list[str]:
    """The ids of the sessions that the runs in storage are of, the newest first."""
    records = sorted(store.runs().values(), key=lambda record: record.time, reverse=True)
    return list(dict.fromkeys(record.session_id for record in records if record.session_id))


def storage_usage(store: CheckpointStore) -> CurrentCheckpointStorageUsageResponse:
    """What all checkpoints take."""
    sizes = [entry.size for entry in store.entries()]
    item = CurrentCheckpointStorageUsageItem(
        user_name=user_name(),
        checkpoint_count=len(sizes),
        size_bytes=sum(sizes),
        size_gigabytes=sum(sizes) / 1e9,
    )
    return CurrentCheckpointStorageUsageResponse(data=[item])


def server_capabilities() -> GetServerCapabilitiesResponse:
    """The base model that is always there."""
    model = SupportedModel(
        model_name=EMBEDDED_MODEL,
        max_context_length=read_config(find_model(EMBEDDED_MODEL)).max_position_embeddings,
        trainable=True,
        sampleable=True,
    )
    return GetServerCapabilitiesResponse(supported_models=[model])


def page(found: list[T], limit: int, offset: int) -> tuple[list[T], Cursor]:
    """A part of a list, and which part it is. Raises BadRequestError for a limit or offset that cannot be."""
    for name, value in (("limit", limit), ("offset", offset)):
        if not is_whole(value) or int(value) < 0:
            raise BadRequestError(f"{name} is {shortened(value)}; it must be a whole number of at least 0")
    limit, offset = int(limit), int(offset)
    return found[offset : offset + limit], Cursor(offset=offset, limit=limit, total_count=len(found))


def _training_run(store: CheckpointStore, run_id: str, record: RunRecord) -> TrainingRun:
    entries = _newest_first(store, run_id)
    last: dict[str, Checkpoint] = {}
    for entry in entries:
        last.setdefault(entry.place.kind, _checkpoint(entry))
    return TrainingRun(
        training_run_id=run_id,
        base_model=record.base_model,
        model_owner=record.owner,
        is_lora=True,
        corrupted=any(entry.metadata is None for entry in entries),
        lora_rank=record.rank,
        last_request_time=max([record.time, *(entry.time for entry in entries)]),
        last_checkpoint=last.get("weights"),
        last_sampler_checkpoint=last.get("sampler_weights"),
        user_metadata=record.user_metadata,
    )


def _newest_first(store: CheckpointStore, run_id: str | None) -> list[Entry]:
    return sorted(store.entries(run_id), key=lambda entry: entry.time, reverse=True)


def _checkpoint(entry: Entry) -> Checkpoint:
    path, metadata = entry.place.tinker_path, entry.metadata
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
    return Checkpoint(
        checkpoint_id=parsed.checkpoint_id,
        checkpoint_type=parsed.checkpoint_type,
        time=entry.time,
        tinker_path=path,
        size_bytes=entry.size,
        public=metadata.public if metadata else False,
        user_metadata=metadata.user_metadata if metadata else None,
        expires_at=metadata.expires_at if metadata else None,
    )
