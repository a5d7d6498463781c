"""The base model: where its folder is, and its tensors, in files and on the device that computes."""

import math
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from types import ModuleType
from typing import Any

import numpy as np

from minitinker.errors import BadRequestError, NotFoundError, PermissionDeniedError
from minitinker.model.config import ModelConfig, read_config, read_json_object, tensor_shapes
from minitinker.model.fused import fuse, unfused
from minitinker.model.sums import check_sums
from minitinker.model.tensor_files import (
    Float32Array,
    Stored,
    check_readable,
    check_tensors,
    read_header,
    read_tensor,
)

EMBEDDED_MODEL = "minitinker/tiny"
_EMBEDDED_FOLDER = Path(__file__).parent.parent / "tiny"
SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NO_PICKLES = (
    "only safetensors files are loaded, never pickles (.bin, .pt, .pth), since loading one runs its code"
)
SIDE_FILES = (  # what belongs to a model beside config.json and the weights
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Weights(Mapping[str, Float32Array]):
    """A model's tensors by their Hugging Face names, read from the files whenever one is asked for: a new, read-only
    float32 array. So nothing stays in memory but what a backend makes of them."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Float32Array:
        tensor = read_tensor(name, self._stored[name])
        tensor.flags.writeable = False
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def numbers(self) -> int:
        """How many numbers all tensors hold."""
        return sum(math.prod(tensor.shape) for tensor in self._stored.values())


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen model. For a tied head there is no weight "lm_head.weight". `name` is the one by which the folder was
    first loaded."""

    name: str
    folder: Path
    config: ModelConfig
    weights: Weights
    _placed: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict, repr=False)

    def placed(self, ops: ModuleType) -> dict[str, Any]:
        """The weights as arrays of a backend, on its device and in its dtype: the same ones for all who ask."""
        with _loading:
            place = (ops.__name__, ops.DEVICE, ops.DTYPE)
            if place not in self._placed:
                placed = {
                    name: ops.lora_weight(w, ops.DTYPE)
                    if name.endswith("_proj.weight") or name == "lm_head.weight"
                    else ops.array(w, ops.DTYPE)
                    for name, w in self.weights.items()
                }
                if ops.BATCH_INVARIANT:  # sampling takes them put together, and with the same bits
                    fused = fuse(self.config, placed, ops)
                    placed = fused | unfused(self.config, fused)
                self._placed[place] = placed
            return self._placed[place]


_loaded: weakref.WeakValueDictionary[Path, BaseModel] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def load_base_model(name: str) -> BaseModel:
    """The base model of that name. As long as anyone holds it, everyone who asks gets the same object.

    Raises what `find_model`, `read_config`, `read_weights` and `check_sums` raise. Safe to call from any thread.
    """
    with _loading:  # held while loading, so that two clients who start together do not load twice
        folder = find_model(name).resolve()
        model = _loaded.get(folder)
        if model is None:
            config = read_config(folder)
            model = BaseModel(name, folder, config, read_weights(folder, config))
            check_sums(folder)  # of save_weights_external; last, since the others say more
            _loaded[folder] = model
        return model


def lasting_name(name: str | os.PathLike[str]) -> str:
    """The name under which the model is found from any working directory: a local folder's path, made whole.

    Raises BadRequestError if it is no name at all.
    """
    if not isinstance(name, str | os.PathLike) or not isinstance(os.fspath(name), str) or not os.fspath(name):
        raise BadRequestError(f"base_model is {shortened(name)}; it must be a model's name or folder")
    text, path = os.fspath(name), os.path.expanduser(name)
    return text if text == EMBEDDED_MODEL or not os.path.isdir(path) else os.path.abspath(path)


def find_model(name: str) -> Path:
    """The folder of a model: the embedded one, a local folder, the Hugging Face cache, or the hub.

    Raises NotFoundError, saying where it looked, and PermissionDeniedError for a gated repository.
    """
    if name == EMBEDDED_MODEL:
        if not (_EMBEDDED_FOLDER / "config.json").is_file():
            raise NotFoundError(f"{EMBEDDED_MODEL} is not installed: {_EMBEDDED_FOLDER} has no config.json")
        return _EMBEDDED_FOLDER
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise NotFoundError(f"the folder {path} has no config.json; a model folder must have one")
        return Path(path)
    if os.path.isfile(path):
        raise NotFoundError(f"{path} is a file; give the folder that holds config.json and the weights")
    return _find_in_cache_or_hub(name)


def _find_in_cache_or_hub(name: str) -> Path:
    # Imported here, since it takes as long as everything else together and most runs do without.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    tried = f"no model {name!r:.300}: it is neither the embedded {EMBEDDED_MODEL!r} nor a local folder"
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=["config.json"]))
        lacking = _lacking(folder)
        if not lacking:
            return folder
        tried += f", the Hugging Face cache has it without {lacking[0]}"
    except HFValidationError as error:
        raise NotFoundError(f"{tried}, nor of the form owner/name that the Hugging Face hub has") from error
    except LocalEntryNotFoundError:
        tried += ", it is not in the Hugging Face cache"
    patterns = ["config.json", *SIDE_FILES, "*.safetensors", _INDEX]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise PermissionDeniedError(
            f"the model {name!r} is gated: accept its licence on the Hugging Face hub and log in"
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(f"{tried}, and the hub has no such repository, or it is private") from error
    except Exception as error:  # what a broken connection raises differs between versions of the client
        raise NotFoundError(f"{tried}, and the hub could not be reached or failed: {error}") from error
    lacking = [file for file in _lacking(folder) if file != "tokenizer.json"]
    if lacking:
        # Without a connection the client may hand out what the cache has, so it could be either.
        raise NotFoundError(
            f"{tried}, and {folder} still lacks {lacking[0]} after asking the hub: it could not be reached,"
            f" or the repository has no such file; {_NO_PICKLES}"
        )
    return folder


def _lacking(folder: Path) -> list[str]:
    """The files that a model folder needs and this one does not have; a cache may hold a part of a model."""
    needed = ["config.json", "tokenizer.json", SINGLE_FILE]
    if not (folder / SINGLE_FILE).is_file() and (folder / _INDEX).is_file():
        needed[2:] = sorted(set(_read_index(folder / _INDEX).values()))
    return [file for file in needed if not (folder / file).is_file()]


def read_weights(folder: Path, config: ModelConfig) -> Weights:
    """Every tensor of `tensor_shapes(config)`, from model.safetensors or the shards that its index names.

    Names, shapes and dtypes are checked here, numbers read later. Raises NotFoundError for a missing file, and
    BadRequestError for a damaged file and for a tensor that is missing, not expected, or of another shape or
    dtype than float32, float16 and bfloat16. Each message names the file and, where there is one, the tensor.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        listing = folder / SINGLE_FILE
        stored = read_header(listing)
    elif (folder / _INDEX).is_file():
        listing = folder / _INDEX
        stored = _read_shards(listing)
    else:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")]
        found = f"only {pickles[0]}" if pickles else "no weights"
        raise NotFoundError(f"{folder} has neither {SINGLE_FILE} nor {_INDEX}, but {found}; {_NO_PICKLES}")
    expected = tensor_shapes(config)
    stored = _leave_out_duplicates(stored, config)
    check_tensors(stored, expected, listing, "config.json")
    for name in expected:
        check_readable(name, stored[name])
    return Weights({name: stored[name] for name in expected})


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of the shard, both as text, and the shard a file of the same folder."""
    shards = read_json_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise BadRequestError(f"{path}: weight_map must be an object, from each tensor's name to its file")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise BadRequestError(
                f"{path}: weight_map has {shard!r} for tensor {tensor!r}; it must be a file name"
            )
    return shards


def _read_shards(index: Path) -> dict[str, Stored]:
    shards = _read_index(index)
    stored: dict[str, Stored] = {}
    for shard in sorted(set(shards.values())):
        path = index.with_name(shard)
        listed = [tensor for tensor, file in shards.items() if file == shard]
        if not path.is_file():
            raise NotFoundError(
                f"{path} does not exist; {index.name} says that it holds tensor {listed[0]!r}"
            )
        held = read_header(path)
        for tensor in listed:
            if tensor not in held:
                raise BadRequestError(
                    f"{path}: tensor {tensor!r} is missing; {index.name} says that it is there"
                )
        # A tensor that the index puts elsewhere is left to that shard.
        stored |= {name: tensor for name, tensor in held.items() if shards.get(name, shard) == shard}
    return stored


def _leave_out_duplicates(stored: dict[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """Without what some writers store though it follows from the rest: RoPE tables, a copy of a tied head."""
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in stored and "model.embed_tokens.weight" in stored:
        head = stored.pop("lm_head.weight")
        if not _equal(head, stored["model.embed_tokens.weight"]):
            raise BadRequestError(
                f"{head.path}: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', but"
                " config.json ties them; its tie_word_embeddings must be false"
            )
    return stored


def _equal(a: Stored, b: Stored) -> bool:
    if a.shape != b.shape or not (a.readable and b.readable):
        return False
    one, other = a.map(), b.map()
    rows = range(0, len(one), 1024)  # in blocks: a head may be a quarter of a model
    return all(
        np.array_equal(a.to_float32(one[i : i + 1024]), b.to_float32(other[i : i + 1024])) for i in rows
    )
