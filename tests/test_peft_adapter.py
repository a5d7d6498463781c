"""engine/peft_adapter.py: adapters that PEFT wrote, read and written again, and the fields that are refused."""

import copy
import json
import re
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_models import CONFIGS, our_logits, random_model, saved, their_logits
from safetensors.torch import load_file, save_file

from minitinker.engine.peft_adapter import peft_base_model, read_peft_adapter
from minitinker.engine.saved_state import write_state
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.weights import load_base_model

TOKENS = np.random.default_rng(0).integers(0, 40, 23)
FAMILY = "qwen3"


def made_by_peft(folder, name=FAMILY, targets=("q_proj", "v_proj"), dtype=torch.float32, **fields):
    """A PEFT model with a random adapter, B included, and the folder that it was saved to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = targets if isinstance(targets, str) else list(targets)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **fields)
        model = get_peft_model(copy.deepcopy(random_model(name, std=0.2)), config)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3).copy_(parameter.to(dtype))
        model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = {key: x.to(dtype) if "lora_" in key else x for key, x in load_file(path).items()}
    save_file(tensors, path)
    return model.eval()


@pytest.fixture
def base(tmp_path):
    return load_base_model(str(saved(tmp_path / "base", FAMILY, std=0.2)))


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter, and a function that changes fields of its config."""
    folder = tmp_path / "adapter"
    made_by_peft(folder)
    path = folder / "adapter_config.json"

    def change(**fields):
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return folder, change


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("down_proj",), {"down_proj"}),
        (("self_attn.o_proj", "up_proj"), {"o_proj", "up_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (r".*\.self_attn\.(q|k)_proj", {"q_proj", "k_proj"}),
        (("lm_head", "gate_proj"), {"lm_head", "gate_proj"}),
    ],
)
def test_an_adapter_made_by_peft_gives_its_logits_and_so_does_peft_with_ours(targets, kinds, base, tmp_path):
    theirs = their_logits(made_by_peft(tmp_path / "adapter", targets=targets), TOKENS)
    state = read_peft_adapter(tmp_path / "adapter", base)
    assert {module.rpartition(".")[2] for module in state.spec.shapes} == kinds
    assert (state.spec.rank, state.spec.alpha, state.step, state.m) == (4, 6, 0, None)
    ours = our_logits(base, state.spec, state.flat, TOKENS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(ours - our_logits(base, state.spec, 0 * state.flat, TOKENS)).max() > 0.01
    (tmp_path / "ours").mkdir()
    write_state(tmp_path / "ours", state, "sampler_weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(random_model(FAMILY, std=0.2), str(tmp_path / "ours"))
    np.testing.assert_allclose(their_logits(again, TOKENS), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-tied"])
def test_other_architectures_and_a_tied_head_whose_weight_peft_copies_along(name, tmp_path):
    base = load_base_model(str(saved(tmp_path / "base", name, std=0.2)))
    tied = CONFIGS[name].tie_word_embeddings
    targets = ("k_proj", "lm_head") if tied else ("k_proj",)
    theirs = their_logits(made_by_peft(tmp_path / "adapter", name, targets), TOKENS)
    copied = [
        key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora" not in key
    ]
    assert bool(copied) == tied
    state = read_peft_adapter(tmp_path / "adapter", base)
    np.testing.assert_allclose(our_logits(base, state.spec, state.flat, TOKENS), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_sixteen_bits_are_read_exactly(dtype, base, tmp_path):
    theirs = their_logits(made_by_peft(tmp_path / "adapter", dtype=dtype), TOKENS)
    state = read_peft_adapter(tmp_path / "adapter", base)
    np.testing.assert_allclose(our_logits(base, state.spec, state.flat, TOKENS), theirs, rtol=0, atol=1e-4)


def test_dropout_of_its_training_changes_nothing_here(base, tmp_path):
    theirs = their_logits(made_by_peft(tmp_path / "adapter", lora_dropout=0.5), TOKENS)
    state = read_peft_adapter(tmp_path / "adapter", base)
    np.testing.assert_allclose(our_logits(base, state.spec, state.flat, TOKENS), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("use_qalora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1]]),
        ("exclude_modules", ["v_proj"]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("revision", "v2"),
        ("target_parameters", ["a"]),
        ("trainable_token_indices", [1]),
        ("peft_type", "LOHA"),
        ("a_field_of_the_future", 1),
        ("r", 0),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", -1),
        ("lora_alpha", None),
        ("target_modules", None),
        ("target_modules", [1]),
        ("target_modules", "("),
        ("target_modules", ["c_attn"]),
        ("target_modules", r"model\.layers\.0\..*q_proj"),
        ("base_model_name_or_path", 7),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name_and_value(field, value, base, adapter):
    folder, change = adapter
    change(**{field: value})
    said = re.escape(f"{folder / 'adapter_config.json'}: {field} is {value!r}; it must be ")
    with pytest.raises(BadRequestError, match=said):
        read_peft_adapter(folder, load_base_model(peft_base_model(folder) or base.name))


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "gaussian"},
        {"revision": "main"},
        {"task_type": None},
        {"auto_mapping": {"a": 1}},
    ],
)
def test_what_does_not_change_the_numbers_is_read(fields, base, adapter):
    folder, change = adapter
    before = read_peft_adapter(folder, base)
    change(**fields)
    np.testing.assert_array_equal(read_peft_adapter(folder, base).flat, before.flat)


def test_the_base_model_is_named_by_the_config_or_by_nobody(adapter):
    folder, change = adapter
    for name, read in (("owner/name", "owner/name"), (None, ""), ("", "")):
        change(base_model_name_or_path=name)
        assert peft_base_model(folder) == read


def test_a_missing_file_a_pickle_and_a_malformed_config_are_named(base, adapter):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(NotFoundError, match=r"adapter_model\.safetensors does not exist; .* never pickles"):
        read_peft_adapter(folder, base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(BadRequestError, match=r"adapter_config\.json is not valid JSON"):
        peft_base_model(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"adapter_config\.json does not exist"):
        peft_base_model(folder)


def test_tensors_that_do_not_fit_the_base_are_named(base, adapter, tmp_path):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    changes = {
        "missing": {key: x for key, x in whole.items() if key != name},
        "has shape (3, 24); adapter_config.json makes it (4, 24)": whole | {name: torch.ones(3, 24)},
        "is not one that adapter_config.json asks for": whole | {"more": torch.ones(1)},
        "not finite": whole | {name: torch.full((4, 24), float("nan"))},
        "differs from the base model's": whole | {"base_model.model.model.norm.weight": torch.ones(24)},
    }
    for said, tensors in changes.items():
        save_file(tensors, path)
        with pytest.raises(BadRequestError, match=re.escape(said)) as caught:
            read_peft_adapter(folder, base)
        assert str(path) in str(caught.value)
