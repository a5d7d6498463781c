"""engine/saved_state.py: files that PEFT reads too, and what is said about damaged ones."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel
from random_models import CONFIGS, our_logits, random_flat, random_model, saved, their_logits
from safetensors.torch import load_file, save_file

from minitinker.engine.saved_state import SavedState, read_state, write_metadata, write_state
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.adapter import AdapterSpec, adapter_spec
from minitinker.model.config import linear_shapes
from minitinker.model.weights import load_base_model

SPEC = AdapterSpec(2, {"model.layers.0.self_attn.q_proj": (6, 4), "lm_head": (10, 4)})
PARTS = {  # train_attn, train_mlp, train_unembed
    "all": (True, True, True),
    "layers": (True, True, False),
    "attn": (True, False, False),
    "head": (False, False, True),
}
TOKENS = np.random.default_rng(0).integers(0, 40, 23)
A = "base_model.model.lm_head.lora_A.weight"


def random_state(spec: AdapterSpec = SPEC, **fields) -> SavedState:
    flat, m, v = (random_flat(spec, seed) for seed in range(3))
    return SavedState(spec, flat, **({"base_model": "owner/name", "step": 7, "m": m, "v": v} | fields))


def written(folder, kind="weights", **fields):
    folder.mkdir(exist_ok=True)
    write_state(folder, random_state(**fields), kind)
    return folder


def change_tensors(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_metadata(folder, change) -> None:
    path = folder / "minitinker.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def assert_refused(folder, *said, error=BadRequestError) -> None:
    with pytest.raises(error) as caught:
        read_state(folder)
    for words in said:
        assert str(words) in str(caught.value)


@settings(deadline=None, max_examples=20)
@given(
    rank=st.integers(1, 4),
    sides=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    step=st.integers(0, 2**40),
    notes=st.none() | st.dictionaries(st.text(), st.text()),
    base=st.text(),
    data=st.data(),
)
def test_a_state_comes_back_to_the_last_bit(rank, sides, step, notes, base, data, tmp_path_factory):
    spec = AdapterSpec(rank, {f"model.layers.{i}.mlp.up_proj": shape for i, shape in enumerate(sides)})
    seed = data.draw(st.integers(0, 2**32))
    bits = np.random.default_rng(seed).integers(0, 2**32, (3, spec.size), np.uint32)
    flat, m, v = bits.view(np.float32)  # every float32 there is, NaN, infinities and denormals among them
    state = SavedState(spec, flat, base, step, m, v, notes)
    folder = tmp_path_factory.mktemp("state")
    write_state(folder, state, "weights")
    back = read_state(folder)
    for ours, theirs in ((back.flat, flat), (back.m, m), (back.v, v)):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert back.spec == spec
    assert list(back.spec.shapes) == list(spec.shapes)  # their order is the order of the numbers
    assert (back.base_model, back.step, back.user_metadata) == (base, step, notes)


def test_weights_for_a_sampler_have_no_moments(tmp_path):
    folder = written(tmp_path, "sampler_weights")
    assert not (folder / "optimizer.safetensors").exists()
    state = read_state(folder)
    assert state.m is None
    assert state.v is None


def test_arrays_of_the_wrong_shape_are_not_written(tmp_path):
    with pytest.raises(BadRequestError, match=r"shape \(47,\); it must be \(48,\)"):
        write_state(tmp_path, random_state(m=random_flat(SPEC)[1:]), "weights")


def test_metadata_says_when_it_was_written_in_utc(tmp_path):
    fields = json.loads((written(tmp_path) / "minitinker.json").read_text())
    assert fields["created"].endswith("+00:00")
    assert fields["kind"] == "weights"


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["llama-biased", "llama-tied", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied"])
def test_peft_loads_a_checkpoint_and_gives_our_logits(name, parts, tmp_path):
    base = load_base_model(str(saved(tmp_path / "base", name, std=0.2)))
    spec = adapter_spec(base.config, 4, *PARTS[parts])
    folder = written(tmp_path / "checkpoint", spec=spec, base_model=base.name)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(random_model(name, std=0.2), str(folder))
    said = [str(w.message) for w in heard if not issubclass(w.category, FutureWarning)]  # of its own code
    if CONFIGS[name].tie_word_embeddings and "lm_head" in spec.shapes:
        said = [words for words in said if "tie_word_embeddings=True" not in words]  # of every such adapter
    assert said == []
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    adapted = {name for name, module in modules.items() if hasattr(module, "lora_A")}
    assert adapted == set(spec.shapes)
    ours = our_logits(base, spec, random_flat(spec), TOKENS)
    np.testing.assert_allclose(their_logits(model, TOKENS), ours, rtol=0, atol=1e-4)
    assert np.abs(ours - our_logits(base, spec, 0 * random_flat(spec), TOKENS)).max() > 0.01


def test_pefts_reading_of_the_config_is_ours(tmp_path):
    config = PeftConfig.from_pretrained(str(written(tmp_path)))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (2, 32, 0.0, "none")
    assert config.target_modules == {"q_proj", "lm_head"}
    assert config.base_model_name_or_path == "owner/name"
    assert config.task_type == "CAUSAL_LM"


def test_a_checkpoint_of_a_real_models_adapter_has_pefts_keys(tmp_path):
    base = load_base_model(str(saved(tmp_path / "base", "qwen3-tied")))
    spec = adapter_spec(base.config, 4, True, True, True)
    keys = load_file(written(tmp_path / "c", spec=spec) / "adapter_model.safetensors").keys()
    modules = linear_shapes(base.config)
    assert keys == {f"base_model.model.{module}.lora_{side}.weight" for module in modules for side in "AB"}
    optimizer = load_file(tmp_path / "c" / "optimizer.safetensors").keys()
    assert optimizer == {
        f"{moment}.{module}.lora_{side}"
        for moment in ("exp_avg", "exp_avg_sq")
        for module in modules
        for side in "AB"
    }


FILES = ["adapter_model.safetensors", "optimizer.safetensors", "minitinker.json", "adapter_config.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(file, tmp_path):
    (written(tmp_path) / file).unlink()
    assert_refused(tmp_path, tmp_path / file, "does not exist", error=NotFoundError)


@pytest.mark.parametrize("file", FILES[:2])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named_with_the_tensor_that_is_cut_off(file, kept, tmp_path):
    path = written(tmp_path) / file
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    header = 8 + int.from_bytes(data[:8], "little")
    assert_refused(tmp_path, path, "ends at byte" if kept * len(data) > header else "header")


@pytest.mark.parametrize(("file", "name"), [(FILES[0], A), (FILES[1], "exp_avg_sq.lm_head.lora_A")])
def test_a_missing_a_misnamed_and_a_misshapen_tensor_are_named_with_their_file(file, name, tmp_path):
    path = written(tmp_path) / file
    whole = path.read_bytes()
    change_tensors(path, lambda tensors: tensors.pop(name))
    assert_refused(tmp_path, path, repr(name), "missing")
    path.write_bytes(whole)
    wrong = name.replace("lm_head", "head")
    change_tensors(path, lambda tensors: tensors.update({wrong: tensors.pop(name)}))
    assert_refused(tmp_path, path, repr(wrong), f"nearest expected name is {name!r}, which is missing")
    path.write_bytes(whole)
    change_tensors(path, lambda tensors: tensors.update({name: torch.ones(4, 2)}))
    assert_refused(tmp_path, path, repr(name), "(4, 2)", "minitinker.json makes it (2, 4)")
    path.write_bytes(whole)
    change_tensors(path, lambda tensors: tensors.update({name: torch.ones(2, 4).to(torch.int32)}))
    assert_refused(tmp_path, path, repr(name), "I32")


def test_a_pickle_under_the_adapters_name_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = written(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    assert_refused(tmp_path, path)
    path.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    assert_refused(tmp_path, path, error=NotFoundError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("format", None),
        ("rank", 0),
        ("rank", 2.0),
        ("rank", True),
        ("alpha", "32"),
        ("alpha", float("nan")),
        ("alpha", -1),
        ("shapes", {}),
        ("shapes", []),
        ("shapes", {"lm_head": [10]}),
        ("shapes", {"lm_head": [10, -4]}),
        ("step", -1),
        ("step", "7"),
        ("optimizer", "yes"),
        ("base_model", None),
        ("user_metadata", ["a"]),
    ],
)
def test_a_field_of_the_metadata_that_cannot_be_is_named_with_its_value(key, value, tmp_path):
    change_metadata(written(tmp_path), lambda fields: fields.update({key: value}))
    assert_refused(tmp_path, tmp_path / "minitinker.json", f"{key} is {json.dumps(value)}")


def test_a_merged_model_is_no_state(tmp_path):
    write_metadata(tmp_path, random_state(), "external_weights", {}, None)
    assert_refused(tmp_path, tmp_path, "of the kind external_weights; it must be weights or sampler_weights")


@pytest.mark.parametrize("key", ["format", "rank", "alpha", "shapes", "step", "optimizer", "base_model"])
def test_a_field_of_the_metadata_that_is_missing_is_named(key, tmp_path):
    change_metadata(written(tmp_path), lambda fields: fields.pop(key))
    assert_refused(tmp_path, tmp_path / "minitinker.json", f"{key} is missing")


@settings(deadline=None, max_examples=200)
@given(file=st.sampled_from(FILES), position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_an_altered_byte_is_refused_unless_it_is_between_the_words_of_the_metadata(
    file, position, byte, tmp_path_factory
):
    folder = tmp_path_factory.getbasetemp() / "altered"
    if not folder.exists():
        written(folder)
    path = folder / file
    whole = path.read_bytes()
    data = bytearray(whole)
    data[int(position * len(data))] = byte
    path.write_bytes(data)
    refused = ""
    try:
        read_state(folder)
    except (BadRequestError, NotFoundError) as error:
        refused = str(error)
    finally:
        path.write_bytes(whole)
    assert not refused or str(folder) in refused
    if file != "minitinker.json":
        assert bool(refused) == (bytes(data) != whole)
