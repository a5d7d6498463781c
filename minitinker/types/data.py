"""What the model reads and learns from: Datum, and ModelInput with its chunks."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import repr as shortened
from typing import Literal, TypeAlias

from minitinker.errors import BadRequestError
from minitinker.tensors import TensorData, TensorDtype, TensorLike
from minitinker.types.dumping import Dumpable
from minitinker.types.provenance import ProvenanceSpans, checked_spans

LossFnInputs: TypeAlias = dict[str, TensorData]

# What a plain list under these keys holds; under any other key its values decide.
_LIST_DTYPES: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}


@dataclass(frozen=True, kw_only=True)
class EncodedTextChunk(Dumpable):
    """Tokens of text."""

    tokens: list[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        """How many tokens."""
        return len(self.tokens)


class _Pictured:
    """How long an image is, as far as its maker says."""

    expected_tokens: int | None

    @property
    def length(self) -> int:
        """`expected_tokens`. Raises BadRequestError where it is None."""
        if self.expected_tokens is None:
            raise BadRequestError(f"{type(self).__name__}.expected_tokens is None, so it has no length")
        return self.expected_tokens


@dataclass(frozen=True, kw_only=True)
class ImageChunk(_Pictured, Dumpable):
    """An image: the file's bytes, or these in base64. The models here read text alone and refuse it."""

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _decoded("ImageChunk.data", self.data))
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ImageAssetPointerChunk(_Pictured, Dumpable):
    """Where an image lies. The models here read text alone and refuse it."""

    format: Literal["png", "jpeg"]
    location: str
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"


@dataclass(frozen=True, kw_only=True)
class DmelChunk(Dumpable):
    """Sound, as the hosted service's models hear it. The models here read text alone and refuse it."""

    dmel: bytes
    type: Literal["dmel"] = "dmel"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dmel", _decoded("DmelChunk.dmel", self.dmel))
        super().__post_init__()

    @property
    def length(self) -> int:
        """Raises BadRequestError: how many tokens sound makes is known to models that hear."""
        raise BadRequestError("a DmelChunk has no length here: no model of this library hears")


ModelInputChunk: TypeAlias = EncodedTextChunk | ImageAssetPointerChunk | ImageChunk | DmelChunk


@dataclass(frozen=True, kw_only=True)
class ModelInput(Dumpable):
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
        """The tokens of all chunks in one list. Raises BadRequestError where a chunk is not text."""
        tokens: list[int] = []
        for i, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise BadRequestError(
                    f"chunks[{i}] is of type {type(chunk).__name__}; the models here read text alone, EncodedTextChunk"
                )
            tokens += chunk.tokens
        return tokens

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
            "target_tokens", float32 under the keys of the other losses, and elsewhere int64 or float32 as
            their values are.
        model_input_spans, loss_fn_input_spans: where the tokens came from, both or neither; see
            `with_provenance`. Nothing here reads them.

    Raises: TypeError or ValueError that names the key.
    """

    model_input: ModelInput
    loss_fn_inputs: LossFnInputs
    model_input_spans: ProvenanceSpans | None = None
    loss_fn_input_spans: ProvenanceSpans | None = None

    def __init__(
        self,
        model_input: ModelInput,
        loss_fn_inputs: "Mapping[str, TensorLike | ModelInput] | None" = None,
        model_input_spans: ProvenanceSpans | None = None,
        loss_fn_input_spans: ProvenanceSpans | None = None,
    ) -> None:
        if not isinstance(model_input, ModelInput):
            given = type(model_input).__name__
            raise TypeError(
                f"Datum.model_input is of type {given}; make a ModelInput, for instance with from_ints"
            )
        if not isinstance(loss_fn_inputs, Mapping | None):
            given = type(loss_fn_inputs).__name__
            raise TypeError(
                f"Datum.loss_fn_inputs is of type {given}; it must be a dict of tensors by their keys"
            )
        inputs = {key: _loss_fn_input(key, value) for key, value in (loss_fn_inputs or {}).items()}
        if (model_input_spans is None) != (loss_fn_input_spans is None):
            raise ValueError("Datum: model_input_spans and loss_fn_input_spans come together or not at all")
        object.__setattr__(self, "model_input", model_input)
        object.__setattr__(self, "loss_fn_inputs", inputs)
        for name, spans in (
            ("model_input_spans", model_input_spans),
            ("loss_fn_input_spans", loss_fn_input_spans),
        ):
            object.__setattr__(self, name, checked_spans(name, spans))

    def with_provenance(self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans) -> "Datum":
        """A copy with spans that cover every position of model_input, and of target_tokens where these are (N,).

        Raises: ValueError where they cover more or fewer.
        """
        checked_spans("model_input", model_input, self.model_input.length)
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is not None and len(targets.shape) == 1:
            checked_spans("loss_fn_inputs", loss_fn_inputs, targets.shape[0])
        return replace(self, model_input_spans=model_input, loss_fn_input_spans=loss_fn_inputs)


def _loss_fn_input(key: str, value: "TensorLike | ModelInput") -> TensorData:
    if not isinstance(key, str):
        raise TypeError(f"Datum.loss_fn_inputs has the key {shortened(key)}; a key must be a str")
    try:
        if isinstance(value, ModelInput):
            return TensorData(value.to_ints(), "int64")
        return TensorData.from_any(value, _LIST_DTYPES.get(key))
    except (TypeError, ValueError) as error:
        raise type(error)(f"loss_fn_inputs[{key!r}]: {error}") from None


def _decoded(name: str, data: object) -> object:
    """Bytes, where text holds them in base64."""
    if not isinstance(data, str):
        return data
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise ValueError(f"{name} is text that is not base64; give the bytes themselves") from None
