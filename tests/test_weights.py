"""model/weights.py against transformers, safetensors and torch, and against files that are damaged."""

import gc
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import CONFIGS, SIZES, loaded, random_model, saved
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from minitinker import reference
from minitinker.errors import BadRequestError, NotFoundError, PermissionDeniedError
from minitinker.model import weights
from minitinker.model.config import read_config, tensor_shapes
from minitinker.model.weights import find_model, load_base_model, read_weights

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def change_tensors(path: Path, change) -> None:
    """Rewrite a safetensors file after `change` has edited the dict of its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_refused(folder: Path, *said: object, error: type[Exception] = BadRequestError) -> None:
    with pytest.raises(error) as caught:
        loaded(folder)
    for words in said:
        assert str(words) in str(caught.value)


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_loaded_tensors_equal_those_of_torch(name, dtype, shards, tmp_path):
    saved(tmp_path, name, dtype, shards)
    theirs = {key: value.float().numpy() for key, value in random_model(name, dtype).state_dict().items()}
    if CONFIGS[name].tie_word_embeddings:
        del theirs["lm_head.weight"]
    ours = loaded(tmp_path)
    assert list(ours) == list(tensor_shapes(read_config(tmp_path)))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, theirs[key])


def test_a_folder_with_a_transformers_4_config_loads_the_same(tmp_path):
    saved(tmp_path, "llama3")
    before = read_config(tmp_path), loaded(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["torch_dtype"] = fields.pop("dtype")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = rope
    path.write_text(json.dumps(fields))
    assert read_config(tmp_path) == before[0]
    for key, value in loaded(tmp_path).items():
        np.testing.assert_array_equal(value, before[1][key])


def test_loaded_arrays_cannot_be_written_to(tmp_path):
    for array in loaded(saved(tmp_path)).values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_loading_bfloat16_takes_little_more_memory_than_the_float32_result(tmp_path):
    config = LlamaConfig(**(SIZES | {"vocab_size": 200_000, "hidden_size": 64, "num_hidden_layers": 1}))
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    script = """if True:
        import sys, tracemalloc
        from pathlib import Path
        from minitinker.model.config import read_config
        from minitinker.model.weights import read_weights
        folder = Path(sys.argv[1])
        tracemalloc.start()
        weights = read_weights(folder, read_config(folder))
        print(tracemalloc.get_traced_memory()[1] / sum(w.nbytes for w in weights.values()))
    """
    out = subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True, text=True)
    assert float(out.stdout) < 1.05


def test_rope_tables_and_a_copy_of_a_tied_head_are_ignored(tmp_path):
    saved(tmp_path, "llama-tied")
    before = loaded(tmp_path)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(tmp_path / "model.safetensors", add)
    assert loaded(tmp_path).keys() == before.keys()


def test_a_stored_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    saved(tmp_path, "llama-tied")
    path = tmp_path / "model.safetensors"
    change_tensors(path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(40, 24)}))
    assert_refused(tmp_path, path, "lm_head.weight", "tie_word_embeddings")


def test_a_missing_tensor_is_named_with_its_file(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    change_tensors(path, lambda tensors: tensors.pop(Q_PROJ))
    assert_refused(tmp_path, path, Q_PROJ, "missing")


def test_an_untied_model_without_a_head_is_refused(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    change_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert_refused(tmp_path, path, "lm_head.weight", "missing")


def test_a_misnamed_tensor_is_named_with_the_name_that_it_should_have(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    wrong = Q_PROJ.replace("q_proj", "query_proj")
    change_tensors(path, lambda tensors: tensors.update({wrong: tensors.pop(Q_PROJ)}))
    assert_refused(tmp_path, path, repr(wrong), f"nearest expected name is {Q_PROJ!r}, which is missing")


def test_a_bias_that_the_config_does_not_announce_is_refused(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    extra = "model.layers.0.self_attn.o_proj.bias"
    change_tensors(path, lambda tensors: tensors.update({extra: torch.ones(24)}))
    assert_refused(tmp_path, path, extra, "model.layers.0.self_attn.o_proj.weight")


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    change_tensors(path, lambda tensors: tensors.update({Q_PROJ: torch.ones(24, 32)}))
    assert_refused(tmp_path, path, Q_PROJ, "(24, 32)", "(32, 24)")


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_a_tensor_of_another_dtype_is_refused_by_its_name(dtype, stored, tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    change_tensors(path, lambda tensors: tensors.update({Q_PROJ: torch.ones(32, 24).to(dtype)}))
    assert_refused(tmp_path, path, Q_PROJ, stored, "BF16")


@pytest.mark.parametrize("kept", [0, 4, 20, 0.2, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused_with_the_first_tensor_that_it_cuts_off(kept, tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    size = int(kept * len(data)) if isinstance(kept, float) else kept % len(data) if kept < 0 else kept
    path.write_bytes(data[:size])
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    del header["__metadata__"]
    if size < start:
        assert_refused(tmp_path, path, "header")
    else:
        cut = [tensor for tensor in header if start + header[tensor]["data_offsets"][1] > size]
        first = min(cut, key=lambda tensor: header[tensor]["data_offsets"])
        assert_refused(tmp_path, path, repr(first), f"the file at byte {size}")


@settings(deadline=None)
@given(position=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless_and_never_crashes(position, byte, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    path = folder / "model.safetensors"
    if not path.exists():
        saved(folder, "qwen3")
        (folder / "whole").write_bytes(path.read_bytes())
    data = bytearray((folder / "whole").read_bytes())
    data[position] = byte
    path.write_bytes(data)
    refused = ""
    try:
        loaded(folder)
    except BadRequestError as error:
        refused = str(error)
    assert not refused or str(path) in refused


def test_a_shard_that_is_not_there_is_refused_with_a_tensor_that_it_should_hold(tmp_path):
    saved(tmp_path, shards=True)
    shard = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][Q_PROJ]
    (tmp_path / shard).unlink()
    assert_refused(tmp_path, tmp_path / shard, "does not exist", "model.layers.1.", error=NotFoundError)


def test_a_shard_without_a_tensor_that_the_index_puts_there_is_refused(tmp_path):
    saved(tmp_path, shards=True)
    shard = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][Q_PROJ]
    change_tensors(tmp_path / shard, lambda tensors: tensors.pop(Q_PROJ))
    assert_refused(tmp_path, tmp_path / shard, Q_PROJ, "model.safetensors.index.json")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/model.safetensors", "", 3, "."], ids=repr)
def test_an_index_that_leaves_its_folder_is_refused(shard, tmp_path):
    index = saved(tmp_path, shards=True) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q_PROJ] = shard
    index.write_text(json.dumps(content))
    assert_refused(tmp_path, index, Q_PROJ, repr(shard))


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_refused(content, tmp_path):
    index = saved(tmp_path, shards=True) / "model.safetensors.index.json"
    index.write_text(content)
    assert_refused(tmp_path, index)


def test_pickles_are_never_loaded(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, tmp_path, "only pytorch_model.bin", "never pickles", error=NotFoundError)


def test_a_folder_without_weights_is_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert_refused(tmp_path, tmp_path, "no weights", error=NotFoundError)


def test_every_client_shares_one_base_model_until_the_last_has_gone(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    reads = []
    monkeypatch.setattr(weights, "read_weights", lambda *a: reads.append(a) or read_weights(*a))
    models = []
    names = [str(tmp_path / "model"), "model", "./model", "../" + tmp_path.name + "/model"]
    threads = [
        threading.Thread(target=lambda name=name: models.append(load_base_model(name))) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4
    assert len({id(model) for model in models}) == 1
    assert len(reads) == 1
    assert models[0].folder == (tmp_path / "model").resolve()
    models.clear()
    gc.collect()
    load_base_model("model")
    assert len(reads) == 2


def test_the_embedded_model_is_found_from_any_folder(tmp_path, monkeypatch):
    embedded = saved(tmp_path / "tiny")
    monkeypatch.setattr(weights, "_EMBEDDED_FOLDER", embedded)
    monkeypatch.chdir(tmp_path)
    assert find_model("minitinker/tiny") == embedded


def test_the_embedded_model_stands_in_the_package():
    assert (weights._EMBEDDED_FOLDER / "__init__.py").is_file()


def test_a_local_folder_must_hold_a_config(tmp_path):
    with pytest.raises(NotFoundError, match=r"has no config\.json"):
        find_model(str(tmp_path))


def test_a_file_is_not_a_model(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    with pytest.raises(NotFoundError, match="is a file; give the folder"):
        find_model(str(path))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, shards: bool = False) -> Path:
    """Put a model into the cache as owner/name, laid out as the hub's client does: links to blobs."""
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = saved(repository / "snapshots" / COMMIT, shards=shards)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = path.rename(repository / "blobs" / str(number))
        path.symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
def test_a_model_in_the_hugging_face_cache_is_found_without_the_hub(shards, cache):
    snapshot = cached(cache, shards)
    assert find_model("owner/name").resolve() == snapshot.resolve()
    assert load_base_model("owner/name").weights.keys() == loaded(snapshot).keys()


@pytest.mark.parametrize("file", ["model-00001-of-*.safetensors", "model.safetensors.index.json"])
def test_a_model_of_which_the_cache_has_a_part_is_not_taken_from_it(file, cache):
    (gone,) = cached(cache, shards=True).glob(file)
    gone.unlink()
    lacking = "model.safetensors" if file.endswith("index.json") else gone.name
    with pytest.raises(NotFoundError, match="could not be reached") as caught:
        find_model("owner/name")
    assert f"the Hugging Face cache has it without {lacking}" in str(caught.value)


def test_a_cache_with_the_weights_and_no_tokenizer_is_completed_from_the_hub(cache, tmp_path, monkeypatch):
    snapshot = cached(cache)
    (snapshot / "tokenizer.json").unlink()
    whole = saved(tmp_path / "whole")
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, local_files_only=False, **asked: str(snapshot if local_files_only else whole),
    )
    assert find_model("owner/name") == whole


def test_a_name_that_is_nowhere_gets_an_error_that_says_where_it_was_looked_for(cache):
    with pytest.raises(NotFoundError) as caught:
        find_model("owner/name")
    for words in (
        "'owner/name'",
        "minitinker/tiny",
        "local folder",
        "Hugging Face cache",
        "could not be reached",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "./missing", "/missing/model", "a/b/c", "what is this?", "x" * 5000, "a\0b"]
)
def test_a_name_that_can_be_nothing_says_so_without_asking_the_hub(name, cache):
    with pytest.raises(NotFoundError, match="owner/name that the Hugging Face hub has"):
        find_model(name)


def hub_that(answers):
    """A stand-in for snapshot_download: nothing is cached, and the hub does what `answers(**asked)` does."""

    def snapshot_download(name, *, local_files_only=False, **asked):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return answers(**asked)

    return snapshot_download


def test_only_what_is_needed_is_fetched_from_the_hub(tmp_path, monkeypatch):
    saved(tmp_path)
    asked = {}
    answer = hub_that(lambda **kwargs: asked.update(kwargs) or str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    assert find_model("owner/name") == tmp_path
    hub = ["config.json", "model-1.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"]
    others = [
        "pytorch_model.bin",
        "original/consolidated.safetensors",
        "onnx/config.json",
        "README.md",
        "x.pth",
    ]
    fetched = huggingface_hub.utils.filter_repo_objects(hub + others, **asked)
    assert sorted(fetched) == sorted(hub)


def test_a_repository_of_pickles_is_refused(tmp_path, monkeypatch):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_that(lambda **asked: str(tmp_path)))
    with pytest.raises(NotFoundError, match=r"'owner/name'.*lacks model\.safetensors.* never pickles"):
        find_model("owner/name")


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        ("RepositoryNotFoundError", NotFoundError, "no such repository"),
        ("GatedRepoError", PermissionDeniedError, "accept its licence"),
        ("LocalEntryNotFoundError", NotFoundError, "could not be reached"),
    ],
)
def test_each_answer_of_the_hub_gets_its_error(failure, error, said, monkeypatch):
    kind = getattr(huggingface_hub.errors, failure)

    def fail(**asked):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_that(fail))
    with pytest.raises(error, match=said):
        find_model("owner/name")


def test_a_tensor_is_read_when_it_is_asked_for_and_cannot_be_written_to(tmp_path):
    weights = read_weights(saved(tmp_path), read_config(tmp_path))
    one, other = weights["model.norm.weight"], weights["model.norm.weight"]
    assert one is not other
    np.testing.assert_array_equal(one, other)
    assert not one.flags.writeable
    assert weights.numbers == sum(w.size for w in weights.values())
    with pytest.raises(KeyError):
        weights["lora"]


def test_what_a_backend_computes_with_is_made_once_for_all_who_ask(tmp_path):
    base = load_base_model(str(saved(tmp_path)))
    placed = base.placed(reference)
    assert base.placed(reference) is placed
    assert placed.keys() == base.weights.keys()
    for name, w in placed.items():
        np.testing.assert_array_equal(w, base.weights[name])
    assert placed["model.layers.0.mlp.up_proj.weight"].flags.f_contiguous
