"""What a checkpoint holds, and the files that hold it: a PEFT adapter, the optimizer's state, metadata.

    adapter_model.safetensors, adapter_config.json    the adapter, as PEFT keeps it
    optimizer.safetensors                             Adam's moments; only in checkpoints to train on from
    minitinker.json                                   what the numbers belong to

Nothing is ever unpickled.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.adapter import AdapterSpec, views
from minitinker.model.config import read_json_object
from minitinker.model.tensor_files import Float32Array, check_tensors, read_header, read_tensor, write_tensors

Kind = Literal["weights", "sampler_weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, METADATA = "optimizer.safetensors", "minitinker.json"
_FORMAT = 1
# The names of tensors, by module and by A or B.
_WEIGHT = "base_model.model.{}.lora_{}.weight"
_M, _V = "exp_avg.{}.lora_{}", "exp_avg_sq.{}.lora_{}"


@dataclass(frozen=True, eq=False)
class SavedState:
    """The state of a training run.

    flat: (spec.size,) float32, the adapter's A and B. m, v: the same shape, Adam's moments, or None where
    they are not kept. step: optimizer steps so far. base_model: the name it was asked for by.
    """

    spec: AdapterSpec
    flat: Float32Array
    base_model: str
    step: int = 0
    m: Float32Array | None = None
    v: Float32Array | None = None
    user_metadata: dict[str, str] | None = None


def write_state(folder: Path, state: SavedState, kind: Kind) -> None:
    """Put the files of a checkpoint into an existing folder. Moments are kept where kind is "weights"."""
    spec = state.spec
    _write_buffers(folder / ADAPTER, spec, {_WEIGHT: state.flat})
    _write_json(folder / ADAPTER_CONFIG, _adapter_config(spec, state.base_model))
    moments = None
    if kind == "weights" and state.m is not None and state.v is not None:
        moments = {_M: state.m, _V: state.v}
        _write_buffers(folder / OPTIMIZER, spec, moments)
    metadata = {
        "format": _FORMAT,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(),
        "base_model": state.base_model,
        "step": state.step,
        "optimizer": moments is not None,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "shapes": spec.shapes,
        "user_metadata": state.user_metadata,
    }
    _write_json(folder / METADATA, metadata)


def read_state(folder: Path) -> SavedState:
    """What a checkpoint folder holds.

    Raises NotFoundError where a file is missing, and BadRequestError where one is damaged or a tensor is
    missing, not expected or of the wrong shape or dtype. Each message names the file, and the tensor.
    """
    metadata = _Metadata.read(Path(folder) / METADATA)
    spec = metadata.spec()
    (flat,) = _read_buffers(Path(folder) / ADAPTER, spec, _WEIGHT)
    m = v = None
    if metadata.flag("optimizer"):
        m, v = _read_buffers(Path(folder) / OPTIMIZER, spec, _M, _V)
    return SavedState(
        spec=spec,
        flat=flat,
        base_model=metadata.text("base_model"),
        step=metadata.integer("step", at_least=0),
        m=m,
        v=v,
        user_metadata=metadata.notes("user_metadata"),
    )


def _adapter_config(spec: AdapterSpec, base_model: str) -> dict[str, Any]:
    """What PEFT needs to build the same adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # PEFT adapts every linear of such a name; that is what the spec does too, in all layers or in none.
        "target_modules": sorted({module.rpartition(".")[2] for module in spec.shapes}),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensors(spec: AdapterSpec, flat: Float32Array, form: str) -> dict[str, Float32Array]:
    """Each A: (rank, d_in) and B: (d_out, rank) of a buffer by its name in a file, as views."""
    return {
        form.format(module, side): stack[0]
        for module, pair in views(spec, flat).items()
        for side, stack in zip("AB", pair, strict=True)
    }


def _write_buffers(path: Path, spec: AdapterSpec, buffers: Mapping[str, Float32Array]) -> None:
    tensors: dict[str, Float32Array] = {}
    for form, flat in buffers.items():
        if flat.shape != (spec.size,):
            raise BadRequestError(f"an array of the state has shape {flat.shape}; it must be {(spec.size,)}")
        tensors |= _tensors(spec, flat, form)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_tensors(path, shapes, tensors.values(), "float32")


def _read_buffers(path: Path, spec: AdapterSpec, *forms: str) -> list[Float32Array]:
    """A flat buffer of (spec.size,) for each form of names; the file must hold these tensors and no others."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist; by {METADATA} it must")
    stored = read_header(path)
    expected = {
        form.format(module, side): (spec.rank, d_in) if side == "A" else (d_out, spec.rank)
        for form in forms
        for module, (d_out, d_in) in spec.shapes.items()
        for side in "AB"
    }
    check_tensors(stored, expected, path, METADATA)
    buffers = [np.empty(spec.size, np.float32) for _ in forms]
    for form, flat in zip(forms, buffers, strict=True):
        for name, tensor in _tensors(spec, flat, form).items():
            tensor[...] = read_tensor(name, stored[name])
    return buffers


@dataclass(frozen=True)
class _Metadata:
    """The fields of a minitinker.json, checked where they are read."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "_Metadata":
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist; a checkpoint folder must have it")
        metadata = cls(path, read_json_object(path))
        if metadata.fields.get("format") != _FORMAT:
            metadata.fail("format", f"{_FORMAT}, the one that this version reads")
        return metadata

    def fail(self, key: str, right: str) -> NoReturn:
        value = json.dumps(self.fields[key]) if key in self.fields else "missing"
        raise BadRequestError(f"{self.path}: {key} is {value:.200}; it must be {right}")

    def integer(self, key: str, at_least: int) -> int:
        value: Any = self.fields.get(key)
        if not _is_integer(value, at_least):
            self.fail(key, f"an integer of at least {at_least}")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self.fields.get(key)
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str):
            self.fail(key, "a string")
        return value

    def notes(self, key: str) -> dict[str, str] | None:
        value = self.fields.get(key)
        if value is not None and not isinstance(value, dict):
            self.fail(key, "an object or null")
        return value

    def spec(self) -> AdapterSpec:
        alpha, shapes = self.fields.get("alpha"), self.fields.get("shapes")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            self.fail("alpha", "a positive number")
        if not isinstance(shapes, dict) or not shapes or not all(map(_is_shape, shapes.values())):
            self.fail("shapes", "an object that gives each adapted linear its [d_out, d_in]")
        pairs = {module: (d_out, d_in) for module, (d_out, d_in) in shapes.items()}
        return AdapterSpec(self.integer("rank", at_least=1), pairs, alpha)


def _is_integer(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_integer(side, 1) for side in value)
