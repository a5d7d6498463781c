"""model/export.py against transformers and PEFT."""

import json

import numpy as np
import pytest
import torch
from random_models import CONFIGS, loaded, our_logits, random_flat, random_model, saved, their_logits
from transformers import AutoModelForCausalLM

from minitinker.errors import BadRequestError, ConflictError
from minitinker.model import tensor_files
from minitinker.model.adapter import AdapterSpec, adapter_spec
from minitinker.model.export import merge_adapter, write_model
from minitinker.model.weights import load_base_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_a_written_folder_with_equal_weights(name, dtype, tmp_path):
    source = saved(tmp_path / "source", name)
    tied = CONFIGS[name].tie_word_embeddings
    write_model(tmp_path / "new", source, loaded(source), dtype, tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == getattr(torch, dtype)
    before = random_model(name).to(getattr(torch, dtype)).state_dict()
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert torch.equal(value, before[key])
    ours = loaded(tmp_path / "new")
    for key, value in ours.items():
        np.testing.assert_array_equal(value, before[key].float().numpy())


def test_a_tied_head_that_was_changed_is_written_untied(tmp_path):
    source = saved(tmp_path / "source", "qwen3-tied")
    tensors = loaded(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_model(tmp_path / "new", source, tensors, "float32", False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), tensors["lm_head.weight"])
    np.testing.assert_array_equal(
        model.model.embed_tokens.weight.detach().numpy(), tensors["model.embed_tokens.weight"]
    )


def test_tokenizer_and_generation_config_come_along_and_nothing_else(tmp_path):
    source = saved(tmp_path / "source", shards=True)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "secret.txt").write_text("")
    write_model(tmp_path / "new", source, loaded(source), "bfloat16", False)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    assert names == expected
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_written_config_says_the_dtype_under_the_key_it_had(key, tmp_path):
    source = saved(tmp_path / "source")
    fields = json.loads((source / "config.json").read_text())
    del fields["dtype"]
    (source / "config.json").write_text(json.dumps(fields | {key: "float32"}))
    write_model(tmp_path / "new", source, loaded(source), "bfloat16", False)
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written == fields | {key: "bfloat16", "tie_word_embeddings": False}


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    source = saved(tmp_path / "source")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(tensor_files, "to_bfloat16_bits", full)
    with pytest.raises(OSError, match="no space"):
        write_model(tmp_path / "out" / "new", source, loaded(source), "bfloat16", False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(Q_PROJ), [Q_PROJ, "missing"]),
        (lambda tensors: tensors.update({Q_PROJ: np.ones((2, 2), np.float32)}), [Q_PROJ, "(2, 2)"]),
        (lambda tensors: tensors.update({"lora": np.ones(1, np.float32)}), ["'lora'"]),
    ],
)
def test_tensors_that_are_not_the_models_are_not_written(change, said, tmp_path):
    source = saved(tmp_path / "source")
    tensors = loaded(source)
    change(tensors)
    with pytest.raises(BadRequestError) as caught:
        write_model(tmp_path / "out" / "new", source, tensors, "float32", False)
    for words in said:
        assert words in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_holds_something_is_not_overwritten_but_an_empty_one_is_filled(tmp_path):
    source = saved(tmp_path / "source")
    tensors = loaded(source)
    (tmp_path / "new").mkdir()
    write_model(tmp_path / "new", source, tensors, "float32", False)
    before = (tmp_path / "new" / "model.safetensors").read_bytes()
    for taken in (tmp_path / "new", source / "config.json"):
        with pytest.raises(ConflictError, match="not an empty folder"):
            write_model(taken, source, tensors, "bfloat16", False)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == before
    with pytest.raises(BadRequestError, match="dtype is 'float16'"):
        write_model(tmp_path / "other", source, tensors, "float16", False)


TOKENS = np.random.default_rng(0).integers(0, 40, 23)
PARTS = {  # train_attn, train_mlp, train_unembed
    "all": (True, True, True),
    "layers": (True, True, False),
    "head": (False, False, True),
}


def adapted(folder, name, parts="all", rank=4):
    """A base model and an adapter for it: base, spec, flat."""
    base = load_base_model(str(saved(folder, name, std=0.2)))
    spec = adapter_spec(base.config, rank, *PARTS[parts])
    return base, spec, random_flat(spec)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["llama-biased", "llama-tied", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied"])
def test_transformers_gives_the_logits_of_base_and_adapter_from_the_merged_folder(name, parts, tmp_path):
    base, spec, flat = adapted(tmp_path / "base", name, parts)
    merge_adapter(base, spec, flat, tmp_path / "merged")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    ours = our_logits(base, spec, flat, TOKENS)
    np.testing.assert_allclose(their_logits(model, TOKENS), ours, rtol=0, atol=1e-4)
    assert np.abs(ours - our_logits(base, spec, 0 * flat, TOKENS)).max() > 0.01  # the adapter does something
    tied = CONFIGS[name].tie_word_embeddings
    assert model.config.tie_word_embeddings == (tied and parts == "layers")
    embedding = model.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(embedding, base.weights["model.embed_tokens.weight"])


def test_a_merged_folder_is_a_base_model_for_us_too(tmp_path):
    base, spec, flat = adapted(tmp_path / "base", "qwen3-tied")
    merge_adapter(base, spec, flat, tmp_path / "merged")
    merged = load_base_model(str(tmp_path / "merged"))
    ours = our_logits(merged, spec, 0 * flat, TOKENS)
    np.testing.assert_allclose(ours, our_logits(base, spec, flat, TOKENS), rtol=0, atol=1e-4)


def test_merging_leaves_the_base_as_it_was(tmp_path):
    base, spec, flat = adapted(tmp_path / "base", "qwen3-tied")
    merge_adapter(base, spec, flat, tmp_path / "merged")
    for name, before in loaded(base.folder).items():
        np.testing.assert_array_equal(base.weights[name], before)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_the_merged_dtype_is_the_one_asked_for_or_else_that_of_the_base(
    key, stored, asked, written, tmp_path
):
    base, spec, flat = adapted(tmp_path / "base", "qwen2")
    fields = json.loads((base.folder / "config.json").read_text())
    del fields["dtype"]
    (base.folder / "config.json").write_text(json.dumps(fields | {key: stored}))
    merge_adapter(base, spec, flat, tmp_path / "merged", asked)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, written)}


def test_an_adapter_of_another_base_is_not_merged(tmp_path):
    base, spec, flat = adapted(tmp_path / "base", "qwen2")
    other = AdapterSpec(spec.rank, spec.shapes | {"model.layers.0.self_attn.q_proj": (8, 24)})
    with pytest.raises(BadRequestError, match=r"'model\.layers\.0\.self_attn\.q_proj' of shape \(8, 24\)"):
        merge_adapter(base, other, flat, tmp_path / "merged")
    with pytest.raises(BadRequestError, match="that is no linear"):
        merge_adapter(base, AdapterSpec(4, {"router": (8, 24)}), flat, tmp_path / "merged")
    with pytest.raises(BadRequestError, match="the adapter's numbers have shape"):
        merge_adapter(base, spec, flat[1:], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
