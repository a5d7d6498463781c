"""The Tinker training API on one machine, with every numeric step written out by hand."""

import typing as _typing
from pathlib import Path as _Path

from minitinker import types
from minitinker.drop_in import install_as_tinker
from minitinker.errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BillingError,
    ConflictError,
    ExperimentalWarning,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestFailedError,
    TinkerError,
    UnprocessableEntityError,
)
from minitinker.futures import APIFuture
from minitinker.hosted import HostedServiceError, RetryConfig
from minitinker.left_out import no_attribute as _no_attribute
from minitinker.loss_handles import LossHandle, PerDatumLossFn
from minitinker.merging import merge
from minitinker.rest_client import RestClient
from minitinker.sampling_client import BackcompatSamplingClientFuture, SamplingClient
from minitinker.service_client import ServiceClient
from minitinker.training_client import BackcompatTrainingClientFuture, TrainingClient
from minitinker.types import (
    AdamOptimizerConfig,
    AdamParams,
    Checkpoint,
    CheckpointType,
    Datum,
    DimuonOptimizerConfig,
    DimuonParams,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardOutput,
    LoraConfig,
    ModelID,
    ModelInput,
    ModelInputChunk,
    OptimParams,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    StopReason,
    TensorData,
    TensorDtype,
    TrainingRun,
)

__title__ = "minitinker"
__version__ = "0.1.0"

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AuthenticationError",
    "BackcompatSamplingClientFuture",
    "BackcompatTrainingClientFuture",
    "BadRequestError",
    "BillingError",
    "Checkpoint",
    "CheckpointType",
    "ConflictError",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "EncodedTextChunk",
    "ExperimentalWarning",
    "ForwardBackwardOutput",
    "HostedServiceError",
    "InternalServerError",
    "LoraConfig",
    "LossHandle",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OptimParams",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PerDatumLossFn",
    "PermissionDeniedError",
    "PromptProvenanceSpan",
    "RateLimitError",
    "RequestFailedError",
    "RestClient",
    "RetryConfig",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TrainingClient",
    "TrainingRun",
    "UnprocessableEntityError",
    "__title__",
    "__version__",
    "install_as_tinker",
    "merge",
    "types",
]

# In the source tree the op folders stand beside this package, not inside it: let `minitinker.reference`
# be found there too, so that the tree works as it lies, whichever way it was installed.
if not (_Path(__file__).parent / "reference").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

if not _typing.TYPE_CHECKING:  # it would take every name for one that is there

    def __getattr__(name: str) -> _typing.NoReturn:
        raise _no_attribute(__name__, name)
