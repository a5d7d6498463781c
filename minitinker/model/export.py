"""A base model, as it is or with an adapter merged into it, written as a Hugging Face folder."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from minitinker.errors import BadRequestError
from minitinker.model.adapter import AdapterSpec, views
from minitinker.model.config import linear_shapes, read_config, read_json_object, tensor_shapes
from minitinker.model.files import written_aside
from minitinker.model.tensor_files import Float32Array, Shape, Stored, check_tensors, write_tensors
from minitinker.model.weights import SIDE_FILES, SINGLE_FILE, BaseModel

DTYPES = ("float32", "bfloat16")


def merge_adapter(
    base: BaseModel, spec: AdapterSpec, flat: Float32Array, folder: Path, dtype: str | None = None
) -> dict[str, str]:
    """Write the base model with W + scale B A for the weight W of each adapted linear, added in float32.

    flat: (spec.size,) float32. A tied head that is adapted is written untied, and the embedding stays as it
    was. dtype: "float32" or "bfloat16"; None is bfloat16 where the base's config.json says so, else float32.
    Tensors are merged one at a time, while they are written. Returns file name -> sha256 of its bytes.

    Raises BadRequestError where the adapter is not one of this base, and what `write_model` raises.
    """
    linears = linear_shapes(base.config)
    for module, shape in spec.shapes.items():
        if linears.get(module) != shape:
            raise BadRequestError(
                f"the adapter stands on {module!r} of shape {shape}; in {base.name} that is"
                f" {linears.get(module, 'no linear')}"
            )
    if flat.shape != (spec.size,):
        raise BadRequestError(f"the adapter's numbers have shape {flat.shape}; it must be {(spec.size,)}")
    lora = views(spec, flat)
    tied = base.config.tie_word_embeddings and "lm_head" not in lora
    shapes = tensor_shapes(replace(base.config, tie_word_embeddings=tied))

    def merged() -> Iterator[Float32Array]:
        for name in shapes:
            # Only a head that was tied has no weight of its own.
            w = base.weights[name if name in base.weights else "model.embed_tokens.weight"]
            module = name.removesuffix(".weight")
            if module not in lora:
                yield w
                continue
            a, b = lora[module]
            product = b[0] @ a[0]
            product *= spec.scale
            product += w
            yield product

    return _write(folder, base.folder, shapes, merged(), dtype or _dtype_of(base.folder), tied)


def write_model(
    folder: Path,
    source_folder: Path,
    tensors: Mapping[str, Float32Array],
    dtype: str,
    tie_word_embeddings: bool,
) -> None:
    """Write a Hugging Face folder: these tensors, with the configuration and tokenizer of `source_folder`.

    `tensors` has the names and shapes of `tensor_shapes` for the configuration with this
    `tie_word_embeddings`; numbers are rounded to the nearest of `dtype`, "float32" or "bfloat16", ties to
    even. The folder appears whole or not at all. Raises ConflictError where it exists and is not empty, and
    BadRequestError where the tensors are not the model's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _write(folder, source_folder, shapes, tensors.values(), dtype, tie_word_embeddings)


def _write(
    folder: Path,
    source_folder: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[Float32Array],
    dtype: str,
    tie_word_embeddings: bool,
) -> dict[str, str]:
    folder, source_folder = Path(folder), Path(source_folder)
    if dtype not in DTYPES:
        raise BadRequestError(f'dtype is {dtype!r}; it must be "float32" or "bfloat16"')
    fields = read_json_object(source_folder / "config.json")
    # transformers 5 calls it dtype and transformers 4 torch_dtype; both read the latter.
    fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
    fields["tie_word_embeddings"] = tie_word_embeddings
    with written_aside(folder) as new:
        (new / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for name in SIDE_FILES:
            if (source_folder / name).is_file():
                shutil.copyfile(source_folder / name, new / name)
        file = folder / SINGLE_FILE
        stored = {name: Stored(file, dtype, shape, 0) for name, shape in shapes.items()}
        check_tensors(stored, tensor_shapes(read_config(new)), file, "config.json")
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in new.iterdir()}
        sums[SINGLE_FILE] = write_tensors(new / SINGLE_FILE, shapes, tensors, dtype)
    return sums


def _dtype_of(folder: Path) -> str:
    fields = read_json_object(folder / "config.json")
    return "bfloat16" if "bfloat16" in (fields.get("dtype"), fields.get("torch_dtype")) else "float32"
