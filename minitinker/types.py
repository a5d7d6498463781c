"""What calls take and give: the classes of the Tinker API, with its names, fields and defaults.

All are frozen dataclasses that check the types of their fields when they are made, and copy the lists and
dicts they get, so that later edits by the caller change nothing. Ranges are checked where values are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from minitinker.conform import Conforming
from minitinker.errors import BadRequestError, RequestErrorCategory
from minitinker.tensors import TensorData, TensorDtype, TensorLike

__all__ = [
    "AdamParams",
    "Checkpoint",
    "CheckpointType",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "GetServerCapabilitiesResponse",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnInputs",
    "LossFnOutput",
    "LossFnType",
    "ModelData",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "RequestErrorCategory",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
]

CheckpointType: TypeAlias = Literal["training", "sampler", "external"]
LossFnInputs: TypeAlias = dict[str, TensorData]
LossFnOutput: TypeAlias = dict[str, TensorData]
LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
ModelID: TypeAlias = str
StopReason: TypeAlias = Literal["length", "stop"]

# What a plain list under these keys holds; under any other key its values decide.
_LIST_DTYPES: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
}

_CHECKPOINT_TYPES: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


# What goes in


@dataclass(frozen=True, kw_only=True)
class EncodedTextChunk(Conforming):
    """Tokens of text."""

    tokens: list[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        """How many tokens."""
        return len(self.tokens)


ModelInputChunk: TypeAlias = EncodedTextChunk


@dataclass(frozen=True, kw_only=True)
class ModelInput(Conforming):
    """What the model reads: chunks, one after the other."""

    chunks: list[ModelInputChunk]

    @classmethod
    def from_ints(cls, tokens: list[int]) -> "ModelInput":
        """One chunk of these tokens."""
        return cls(chunks=[EncodedTextChunk(tokens=tokens)])

    @classmethod
    def empty(cls) -> "ModelInput":
        """No chunk at all."""
        return cls(chunks=[])

    def to_ints(self) -> list[int]:
        """The tokens of all chunks in one list."""
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        """How many tokens all chunks hold."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: ModelInputChunk) -> "ModelInput":
        """A new input with one more chunk."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> "ModelInput":
        """A new input with one more token, in a chunk of its own."""
        return self.append(EncodedTextChunk(tokens=[token]))


@dataclass(frozen=True, init=False)
class Datum:
    """One training example.

    Args:
        model_input: N tokens; position i predicts target_tokens[i].
        loss_fn_inputs: what the loss wants, per key a TensorData or what becomes one: an array, a torch
            tensor, (nested) lists of numbers, or a ModelInput for its tokens. Lists become int64 under
            "target_tokens", float32 under "weights", "advantages" and "logprobs", and elsewhere int64
            or float32 as their values are.

    Raises: TypeError or ValueError that names the key.
    """

    model_input: ModelInput
    loss_fn_inputs: LossFnInputs

    def __init__(
        self, model_input: ModelInput, loss_fn_inputs: "Mapping[str, TensorLike | ModelInput] | None" = None
    ) -> None:
        if not isinstance(model_input, ModelInput):
            given = type(model_input).__name__
            raise TypeError(
                f"Datum.model_input is of type {given}; make a ModelInput, for instance with from_ints"
            )
        inputs = {key: _loss_fn_input(key, value) for key, value in (loss_fn_inputs or {}).items()}
        object.__setattr__(self, "model_input", model_input)
        object.__setattr__(self, "loss_fn_inputs", inputs)


def _loss_fn_input(key: str, value: "TensorLike | ModelInput") -> TensorData:
    try:
        if isinstance(value, ModelInput):
            return TensorData(value.to_ints(), "int64")
        return TensorData.from_any(value, _LIST_DTYPES.get(key))
    except (TypeError, ValueError) as error:
        raise type(error)(f"loss_fn_inputs[{key!r}]: {error}") from None


@dataclass(frozen=True, kw_only=True)
class AdamParams(Conforming):
    """One step of AdamW. Every field may change at every step; grad_clip_norm 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Conforming):
    """Which linears get an adapter, and of which rank. A seed makes A the same each time."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Conforming):
    """How to draw tokens.

    Fields:
        max_tokens: None runs to the end of the context.
        seed: the same seed draws the same samples.
        stop: a string, strings or token ids; None stops at the end-of-sequence tokens, [] at nothing.
        temperature: 0 is greedy.
        top_k: -1 is no limit.
        top_p: 1 is no limit.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1


# What comes out of training


@dataclass(frozen=True)
class ForwardBackwardOutput(Conforming):
    """What a forward or forward_backward gives: per datum a dict of tensors, and metrics over all of them."""

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """metrics["loss:sum"], the loss summed over tokens and datums. KeyError where there is none."""
        return self.metrics["loss:sum"]


@dataclass(frozen=True, kw_only=True)
class OptimStepResponse(Conforming):
    """What an optimizer step gives."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class SaveWeightsResponse(Conforming):
    """Where save_state put the weights and the optimizer: a tinker:// path."""

    path: str
    type: Literal["save_weights"] | None = None


@dataclass(frozen=True, kw_only=True)
class SaveWeightsForSamplerResponse(Conforming):
    """Where save_weights_for_sampler put the weights: a tinker:// path."""

    path: str
    type: Literal["save_weights_for_sampler"] | None = None


@dataclass(frozen=True, kw_only=True)
class LoadWeightsResponse(Conforming):
    """What was loaded, and into which model."""

    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] | None = None


# What comes out of sampling


@dataclass(frozen=True)
class SampledSequence(Conforming):
    """One sample. `tokens` ends with the stop token or string, if that is why it stopped."""

    stop_reason: StopReason
    sequence_id: str
    tokens: list[int]
    logprobs: list[float] | None = None

    @property
    def tokens_np(self) -> npt.NDArray[np.int32]:
        """`tokens` as an array of shape (tokens,)."""
        return np.array(self.tokens, dtype=np.int32)

    @property
    def logprobs_np(self) -> npt.NDArray[np.float32] | None:
        """`logprobs` as an array of shape (tokens,), or None."""
        return None if self.logprobs is None else np.array(self.logprobs, dtype=np.float32)


@dataclass(frozen=True)
class SampleResponse(Conforming):
    """The samples of one prompt.

    Fields:
        sequences: as many as were asked for.
        prompt_logprobs: per token of the prompt its log probability, None for the first; None if not
            asked for.
        topk_prompt_logprobs: per token of the prompt the likeliest (token, logprob) in its place, None for
            the first; None if not asked for.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None

    @property
    def prompt_logprobs_np(self) -> npt.NDArray[np.float32] | None:
        """`prompt_logprobs` as an array of shape (tokens,), NaN where they say None; or None."""
        return None if self.prompt_logprobs is None else np.array(self.prompt_logprobs, dtype=np.float32)


# What there is


@dataclass(frozen=True, kw_only=True)
class ModelData(Conforming):
    """The base of a model, and what was added to it."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None
    model_id: ModelID | None = None
    lora_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class GetInfoResponse(Conforming):
    """What a training client trains."""

    model_data: ModelData
    model_id: ModelID
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    type: Literal["get_info"] | None = None


@dataclass(frozen=True, kw_only=True)
class SupportedModel(Conforming):
    """A base model that can be asked for. The context length is in tokens."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GetServerCapabilitiesResponse(Conforming):
    """The base models that can be asked for."""

    supported_models: list[SupportedModel]


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Conforming):
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
class ParsedCheckpointTinkerPath(Conforming):
    """The parts of tinker://<training_run_id>/<checkpoint_id>; the id is "weights/<name>" and the like."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> "ParsedCheckpointTinkerPath":
        """Raises: BadRequestError where the path is not of that form."""
        scheme, _, rest = str(tinker_path).partition("://")
        parts = rest.split("/")
        well_formed = scheme == "tinker" and len(parts) == 3 and not {"", ".", ".."}.intersection(parts)
        if not well_formed or parts[1] not in _CHECKPOINT_TYPES:
            raise BadRequestError(
                f"the path is {tinker_path!r}; it must be tinker://<run-id>/weights/<name> "
                "or tinker://<run-id>/sampler_weights/<name>"
            )
        return cls(
            tinker_path=tinker_path,
            training_run_id=parts[0],
            checkpoint_type=_CHECKPOINT_TYPES[parts[1]],
            checkpoint_id="/".join(parts[1:]),
        )
