"""What calls take and give: the classes of the Tinker API, with its names, fields and defaults.

All are frozen dataclasses that check the types of their fields when they are made, and copy the lists and
dicts they get, so that later edits by the caller change nothing. Ranges are checked where values are used.
"""

import typing as _typing

from minitinker.errors import RequestErrorCategory
from minitinker.left_out import no_attribute as _no_attribute
from minitinker.tensors import TensorData, TensorDtype
from minitinker.types.data import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    LossFnInputs,
    ModelInput,
    ModelInputChunk,
)
from minitinker.types.optimizer import (
    AdamOptimizerConfig,
    AdamParams,
    DimuonOptimizerConfig,
    DimuonParams,
    OptimizerConfig,
    OptimParams,
)
from minitinker.types.provenance import PromptProvenanceSpan, ProvenanceSpans, SampledProvenanceSpan
from minitinker.types.sampling import (
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SamplingClientKind,
    SamplingParams,
    StopReason,
    TopkLogprobs,
)
from minitinker.types.storage import (
    Checkpoint,
    CheckpointsListResponse,
    CheckpointType,
    CurrentCheckpointStorageUsageItem,
    CurrentCheckpointStorageUsageResponse,
    Cursor,
    ExternalWeightsUrlsResponse,
    GetSamplerResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ParsedCheckpointTinkerPath,
    SaveWeightsExternalResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)
from minitinker.types.training import (
    CustomLossInput,
    CustomLossInputRank,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    LoadWeightsResponse,
    LoraConfig,
    LossFnOutput,
    LossFnType,
    ModelData,
    ModelID,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    SupportedModel,
)

__all__ = [
    "AdamOptimizerConfig",
    "AdamParams",
    "Checkpoint",
    "CheckpointType",
    "CheckpointsListResponse",
    "CurrentCheckpointStorageUsageItem",
    "CurrentCheckpointStorageUsageResponse",
    "Cursor",
    "CustomLossInput",
    "CustomLossInputRank",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "EncodedTextChunk",
    "ExternalWeightsUrlsResponse",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "GetSamplerResponse",
    "GetServerCapabilitiesResponse",
    "GetSessionResponse",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "ListSessionsResponse",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnInputs",
    "LossFnOutput",
    "LossFnType",
    "ModelData",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OptimParams",
    "OptimStepResponse",
    "OptimizerConfig",
    "ParsedCheckpointTinkerPath",
    "PromptAltTokens",
    "PromptProvenanceSpan",
    "ProvenanceSpans",
    "RequestErrorCategory",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClientKind",
    "SamplingParams",
    "SaveWeightsExternalResponse",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
    "TopkLogprobs",
    "TrainingRun",
    "TrainingRunsResponse",
    "WeightsInfoResponse",
    "WhoamiResponse",
]

if not _typing.TYPE_CHECKING:  # it would take every name for one that is there

    def __getattr__(name: str) -> _typing.NoReturn:
        raise _no_attribute(__name__, name)
