"""What training takes and gives."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from minitinker.conform import Conforming
from minitinker.hosted import hosted
from minitinker.tensors import TensorData
from minitinker.types.dumping import Dumpable
from minitinker.types.optimizer import AdamOptimizerConfig, OptimizerConfig

LossFnOutput: TypeAlias = dict[str, TensorData]
LossFnType: TypeAlias = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce", "custom"
]
CustomLossInputRank: TypeAlias = Literal[0, 1, 2]
ModelID: TypeAlias = str


@dataclass(frozen=True, kw_only=True)
class CustomLossInput(Dumpable):
    """One input of a loss made by create_custom_loss: its name, and 0 for a number, 1 for (N,), 2 for (N, K)."""

    name: str
    rank: CustomLossInputRank


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Dumpable):
    """Which linears get an adapter, and of which rank. A seed makes A the same each time."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


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
class OptimStepResponse(Dumpable):
    """What an optimizer step gives."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class SaveWeightsResponse(Dumpable):
    """Where save_state put the weights and the optimizer: a tinker:// path."""

    path: str
    type: Literal["save_weights"] | None = None

    def get_console_url(self) -> str:
        """Raises HostedServiceError."""
        raise hosted("SaveWeightsResponse.get_console_url()", "the path is all there is")


@dataclass(frozen=True, kw_only=True)
class SaveWeightsForSamplerResponse(Dumpable):
    """Where save_weights_for_sampler put the weights: a tinker:// path."""

    path: str
    type: Literal["save_weights_for_sampler"] | None = None

    def get_console_url(self) -> str:
        """Raises HostedServiceError."""
        raise hosted("SaveWeightsForSamplerResponse.get_console_url()", "the path is all there is")

    def get_playground_url(self) -> str:
        """Raises HostedServiceError."""
        raise hosted("SaveWeightsForSamplerResponse.get_playground_url()", "sample from the path")


@dataclass(frozen=True, kw_only=True)
class LoadWeightsResponse(Dumpable):
    """What was loaded, and into which model."""

    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelData(Dumpable):
    """The base of a model, and what was added to it."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None
    model_id: ModelID | None = None
    lora_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class GetInfoResponse(Dumpable):
    """What a training client trains."""

    model_data: ModelData
    model_id: ModelID
    optimizer_config: OptimizerConfig = field(default_factory=AdamOptimizerConfig)
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    type: Literal["get_info"] | None = None


@dataclass(frozen=True, kw_only=True)
class SupportedModel(Dumpable):
    """A base model that can be asked for. The context length is in tokens."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GetServerCapabilitiesResponse(Dumpable):
    """The base models that can be asked for."""

    supported_models: list[SupportedModel]
