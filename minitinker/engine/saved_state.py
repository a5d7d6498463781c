"""What a checkpoint holds, and the files that hold it: a PEFT adapter, the optimizer's state, metadata.

    adapter_model.safetensors, adapter_config.json    the adapter, as PEFT keeps it
    optimizer.safetensors                             Adam's moments; only in checkpoints to train on from
    minitinker.json                                   what the numbers belong to

Nothing is ever unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from minitinker.engine.metadata import (
    Metadata,
    metadata_text,
    now,
    read_metadata,
)
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.adapter import AdapterSpec, views
from minitinker.model.sums import METADATA, check_sum, sha256_of
from minitinker.model.tensor_files import (
    Float32Array,
    check_readable,
    check_tensors,
    read_header,
    read_tensor,
    write_tensors,
)

Kind = Literal["weights", "sampler_weights", "external_weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STATES: tuple[Kind, ...] = ("weights", "sampler_weights")  # the kinds that hold a SavedState

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
# The names of tensors, by module and by A or B.
_WEIGHT = "base_model.model.{}.lora_{}.weight"
_M, _V = "exp_avg.{}.lora_{}", "exp_avg_sq.{}.lora_{}"


@dataclass(frozen=True, eq=False)
class SavedState:
    """The state of a training run.

    flat: (spec.size,) float32, the adapter's A and B. m, v: the same shape, Adam's moments, or None where
    they are not kept. step: optimizer steps so far. base_model: the name it was asked for by. user_metadata:
    the notes of this checkpoint.
    """

    spec: AdapterSpec
    flat: Float32Array
    base_model: str
    step: int = 0
    m: Float32Array | None = None
    v: Float32Array | None = None
    user_metadata: dict[str, str] | None = None


def write_state(folder: Path, state: SavedState, kind: Kind, expires_at: datetime | None = None) -> None:
    """Put the files of a checkpoint into an existing folder. Moments are kept where kind is "weights"."""
    spec = state.spec
    sums = {ADAPTER: _write_buffers(folder / ADAPTER, spec, {_WEIGHT: state.flat})}
    config = json.dumps(_adapter_config(spec, state.base_model), indent=2) + "\n"
    sums[ADAPTER_CONFIG] = _write_text(folder / ADAPTER_CONFIG, config)
    if kind == "weights" and state.m is not None and state.v is not None:
        sums[OPTIMIZER] = _write_buffers(folder / OPTIMIZER, spec, {_M: state.m, _V: state.v})
    write_metadata(folder, state, kind, sums, expires_at)


def write_metadata(
    folder: Path, state: SavedState, kind: Kind, sums: dict[str, str], expires_at: datetime | None
) -> None:
    """Put the minitinker.json of a checkpoint into its folder. sums: file name -> sha256."""
    metadata = Metadata(
        kind=kind,
        created=now(),
        base_model=state.base_model,
        spec=state.spec,
        step=state.step,
        optimizer=OPTIMIZER in sums,
        user_metadata=state.user_metadata,
        expires_at=expires_at,
        sums=sums,
    )
    _write_text(folder / METADATA, metadata_text(metadata))


def read_state(folder: Path) -> SavedState:
    """What a checkpoint folder holds.

    Raises NotFoundError where a file is missing, and BadRequestError where one is damaged or a tensor is
    missing, not expected or of the wrong shape or dtype. Each message names the file, and the tensor.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    if metadata.kind not in STATES:
        raise BadRequestError(
            f"{folder} is of the kind {metadata.kind:.80}; it must be {' or '.join(STATES)} (a merged model is a"
            " base_model of its own)"
        )
    if ADAPTER_CONFIG in metadata.sums:  # nothing is read from it here, but others would believe it
        check_sum(folder / ADAPTER_CONFIG, metadata.sums[ADAPTER_CONFIG])
    (flat,) = _read_buffers(folder / ADAPTER, metadata, _WEIGHT)
    m = v = None
    if metadata.optimizer:
        m, v = _read_buffers(folder / OPTIMIZER, metadata, _M, _V)
    return SavedState(
        spec=metadata.spec,
        flat=flat,
        base_model=metadata.base_model,
        step=metadata.step,
        m=m,
        v=v,
        user_metadata=metadata.user_metadata,
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


def _write_text(path: Path, text: str) -> str:
    """Write a file, and return the sha256 of its bytes."""
    path.write_text(text, encoding="utf-8", newline="")
    return sha256_of(text)


def _tensors(spec: AdapterSpec, flat: Float32Array, form: str) -> dict[str, Float32Array]:
    """Each A: (rank, d_in) and B: (d_out, rank) of a buffer by its name in a file, as views."""
    return {
        form.format(module, side): stack[0]
        for module, pair in views(spec, flat).items()
        for side, stack in zip("AB", pair, strict=True)
    }


def _write_buffers(path: Path, spec: AdapterSpec, buffers: Mapping[str, Float32Array]) -> str:
    tensors: dict[str, Float32Array] = {}
    for form, flat in buffers.items():
        if flat.shape != (spec.size,):
            raise BadRequestError(f"an array of the state has shape {flat.shape}; it must be {(spec.size,)}")
        tensors |= _tensors(spec, flat, form)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return write_tensors(path, shapes, tensors.values(), "float32")


def _there(path: Path) -> Path:
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist; by {METADATA} it must")
    return path


def _read_buffers(path: Path, metadata: Metadata, *forms: str) -> list[Float32Array]:
    """A flat buffer of (spec.size,) for each form of names; the file must hold these tensors and no others."""
    spec = metadata.spec
    stored = read_header(_there(path))
    expected = {
        form.format(module, side): (spec.rank, d_in) if side == "A" else (d_out, spec.rank)
        for form in forms
        for module, (d_out, d_in) in spec.shapes.items()
        for side in "AB"
    }
    check_tensors(stored, expected, path, METADATA)
    for name in expected:
        check_readable(name, stored[name])
    if path.name in metadata.sums:  # last, since the others say more
        check_sum(path, metadata.sums[path.name])
    buffers = [np.empty(spec.size, np.float32) for _ in forms]
    for form, flat in zip(forms, buffers, strict=True):
        for name, tensor in _tensors(spec, flat, form).items():
            tensor[...] = read_tensor(name, stored[name])
    return buffers
