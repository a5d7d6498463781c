"""A LoRA adapter that PEFT wrote, to train on from: adapter_config.json and adapter_model.safetensors.

Read is what this library can compute, W + (alpha / rank) B A on linears that are adapted in all layers or in
none; whatever else the config asks for is refused by the field's name. What an adapter was trained with
(lora_dropout, init_lora_weights of a new A and B) changes nothing that its numbers mean, and is not used here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from minitinker.engine.saved_state import ADAPTER, ADAPTER_CONFIG, SavedState
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.adapter import AdapterSpec, views
from minitinker.model.config import linear_shapes, read_json_object
from minitinker.model.tensor_files import Float32Array, Stored, check_tensors, read_header, read_tensor
from minitinker.model.weights import BaseModel

_READ = {"base_model_name_or_path", "r", "lora_alpha", "target_modules"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
}
# Fields that may say more than nothing. All others must be absent, null, false, zero or empty.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "revision": ("main",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # others change the base's weights
}
_PREFIX = "base_model.model."
_WEIGHT = _PREFIX + "{}.lora_{}.weight"


def peft_base_model(folder: Path) -> str:
    """The base model that an adapter's config names, or "" if it names none.

    Raises NotFoundError where there is no adapter_config.json, and BadRequestError for a malformed one.
    """
    return _Config.read(folder).base_model


def read_peft_adapter(folder: Path, base: BaseModel) -> SavedState:
    """The adapter in a folder, as a state without an optimizer; its numbers may be float32, float16 or bfloat16.

    Raises NotFoundError for a missing file, and BadRequestError, naming the file and the field or tensor, for
    what is damaged, does not fit the base model, or is not supported.
    """
    config = _Config.read(folder)
    spec = config.spec(base)
    path = folder / ADAPTER
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist; only safetensors files are loaded, never pickles (.bin)")
    stored = _without_copies_of_the_base(read_header(path), base)
    expected = {
        _WEIGHT.format(module, side): (spec.rank, d_in) if side == "A" else (d_out, spec.rank)
        for module, (d_out, d_in) in spec.shapes.items()
        for side in "AB"
    }
    check_tensors(stored, expected, path, ADAPTER_CONFIG)
    flat = np.empty(spec.size, np.float32)
    for module, pair in views(spec, flat).items():
        for side, stack in zip("AB", pair, strict=True):
            name = _WEIGHT.format(module, side)
            stack[0] = read_tensor(name, stored[name])
    if not np.isfinite(flat).all():
        raise BadRequestError(f"{path} holds numbers that are not finite; an adapter's must be")
    return SavedState(spec, flat, base.name)


def _without_copies_of_the_base(stored: Mapping[str, Stored], base: BaseModel) -> dict[str, Stored]:
    """The tensors without those that PEFT copies from the base, as it does with an adapted head's weights."""
    kept = {}
    for name, tensor in stored.items():
        own = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if own == "lm_head.weight" and own not in base.weights:  # it is tied
            own = "model.embed_tokens.weight"
        if own not in base.weights:
            kept[name] = tensor
        elif not _equal(read_tensor(name, tensor), base.weights[own]):
            raise BadRequestError(
                f"{tensor.path}: tensor {name!r} differs from the base model's {own!r}; it must be the same, for"
                " only A and B are trained here"
            )
    return kept


def _equal(a: Float32Array, b: Float32Array) -> bool:
    """Whether two tensors are the same, up to what bfloat16 rounds off."""
    return a.shape == b.shape and np.allclose(a, b, rtol=2**-8, atol=1e-6)


@dataclass(frozen=True)
class _Config:
    """An adapter_config.json, checked."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "_Config":
        path = folder / ADAPTER_CONFIG
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist; a folder in PEFT's format has it")
        config = cls(path, read_json_object(path))
        for key, value in config.fields.items():
            if key in _READ | _WITHOUT_EFFECT or not value:
                continue
            allowed = _ALLOWED.get(key, ())
            if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
                config.fail(key, " or ".join(map(repr, allowed)) or "absent, for it is not supported here")
        if config.fields.get("peft_type") != "LORA":
            config.fail("peft_type", "'LORA'")
        return config

    def fail(self, key: str, right: str) -> NoReturn:
        value = repr(self.fields[key]) if key in self.fields else "missing"
        raise BadRequestError(f"{self.path}: {key} is {value:.200}; it must be {right}")

    @property
    def base_model(self) -> str:
        name = self.fields.get("base_model_name_or_path")
        if name is not None and not isinstance(name, str):
            self.fail("base_model_name_or_path", "a string or null")
        return name or ""

    def spec(self, base: BaseModel) -> AdapterSpec:
        rank, alpha = self.fields.get("r"), self.fields.get("lora_alpha")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            self.fail("r", "a whole number of at least 1")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
            self.fail("lora_alpha", "a positive number")
        linears = linear_shapes(base.config)
        shapes = {module: shape for module, shape in linears.items() if self._targets(module)}
        if not shapes:
            self.fail("target_modules", f"such that it meets linears of {base.name}: it meets none")
        for kind in {module.rpartition(".")[2] for module in shapes}:
            there = [module for module in linears if module.endswith(kind)]
            missing = [module for module in there if module not in shapes]
            if missing:
                self.fail(
                    "target_modules", f"such that {kind} is met in all layers or in none; not {missing[0]}"
                )
        return AdapterSpec(rank, shapes, alpha)

    def _targets(self, module: str) -> bool:
        """Whether PEFT would adapt this linear: by a regular expression, or by (the end of) a name in a list."""
        targets = self.fields.get("target_modules")
        if targets == "all-linear":
            return module != "lm_head"
        if isinstance(targets, str):
            try:
                return re.fullmatch(targets, module) is not None
            except re.error as error:
                self.fail("target_modules", f"a regular expression, or a list of names: {error}")
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            self.fail("target_modules", "a list of names, or a regular expression")
        return any(module == name or module.endswith(f".{name}") for name in targets)
