"""What storage holds, and what a RestClient says of it: checkpoints and their paths, runs, sessions, samplers."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

from minitinker.errors import BadRequestError
from minitinker.types.dumping import Dumpable
from minitinker.types.optimizer import AdamOptimizerConfig
from minitinker.types.training import ModelID

CheckpointType: TypeAlias = Literal["training", "sampler", "external"]

_CHECKPOINT_TYPES: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Dumpable):
    """A checkpoint in storage. `expires_at` None means never."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class ParsedCheckpointTinkerPath(Dumpable):
    """The parts of tinker://<training_run_id>/<checkpoint_id>; the id is "weights/<name>" and the like."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> "ParsedCheckpointTinkerPath":
        """Raises: BadRequestError where the path is not of that form."""
        scheme, _, rest = (tinker_path if isinstance(tinker_path, str) else "").partition("://")
        parts = rest.split("/")
        well_formed = scheme == "tinker" and len(parts) == 3 and not {"", ".", ".."}.intersection(parts)
        if not well_formed or parts[1] not in _CHECKPOINT_TYPES:
            raise BadRequestError(
                f"the path is {tinker_path!r:.300}; it must be tinker://<run-id>/weights/<name>, "
                "or the same with sampler_weights or external_weights"
            )
        return cls(
            tinker_path=tinker_path,
            training_run_id=parts[0],
            checkpoint_type=_CHECKPOINT_TYPES[parts[1]],
            checkpoint_id="/".join(parts[1:]),
        )


@dataclass(frozen=True, kw_only=True)
class Cursor(Dumpable):
    """Which part of a list this is: at most `limit` items from `offset` on, of `total_count`."""

    offset: int
    limit: int
    total_count: int


@dataclass(frozen=True, kw_only=True)
class CheckpointsListResponse(Dumpable):
    """Checkpoints, the newest first. `cursor` None: these are all."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Dumpable):
    """A training run, as storage knows it.

    model_owner is the operating system's user who began it, last_request_time the time of its last checkpoint
    or, without any, of its beginning, and corrupted says that the metadata of a checkpoint cannot be read.
    """

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRunsResponse(Dumpable):
    """Training runs, the one last used first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class WeightsInfoResponse(Dumpable):
    """What a checkpoint's weights belong to. train_attn says that a linear of the attention is adapted, and so on."""

    base_model: str
    optimizer_config: AdamOptimizerConfig = field(default_factory=AdamOptimizerConfig)
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ExternalWeightsUrlsResponse(Dumpable):
    """A URL for each file, by its path within the checkpoint. Here they are file:// URLs, of use on this machine."""

    urls: dict[str, str]
    expires: datetime


@dataclass(frozen=True, kw_only=True)
class SaveWeightsExternalResponse(Dumpable):
    """Where save_weights_external put the merged model: a tinker:// path."""

    path: str
    type: Literal["save_weights_external"] | None = None


@dataclass(frozen=True, kw_only=True)
class GetSessionResponse(Dumpable):
    """What one ServiceClient made. Samplers are known only to the process that has them."""

    training_run_ids: list[ModelID]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class ListSessionsResponse(Dumpable):
    """Ids of sessions, the newest first."""

    sessions: list[str]


@dataclass(frozen=True, kw_only=True)
class GetSamplerResponse(Dumpable):
    """What a SamplingClient draws from; model_path None where the weights were never saved."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class WhoamiResponse(Dumpable):
    """Who asks: here, the operating system's user on this machine."""

    user_urn: str
    org_urn: str
    email: str | None = None


@dataclass(frozen=True, kw_only=True)
class CurrentCheckpointStorageUsageItem(Dumpable):
    """What checkpoints take on the disk. A gigabyte is 10^9 bytes."""

    project_id: str | None = None
    org_user_urn: str | None = None
    user_email: str | None = None
    user_name: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None = None


@dataclass(frozen=True, kw_only=True)
class CurrentCheckpointStorageUsageResponse(Dumpable):
    """The whole storage folder, as one item. There is no price."""

    effective_rate_usd_per_gigabyte_month: float | None = None
    data: list[CurrentCheckpointStorageUsageItem]
