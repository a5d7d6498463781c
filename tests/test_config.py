"""model/config.py against transformers: the same folder must mean the same model to both."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.config import Llama3Scaling, ModelConfig, linear_shapes, read_config, tensor_shapes

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with a head_dim of its own": LlamaConfig(**SIZES, head_dim=10, rms_norm_eps=1e-5),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True, bos_token_id=5, eos_token_id=[6, 7]),
    "llama3": LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}),
    "qwen2": Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2 with the window off": Qwen2Config(**SIZES, sliding_window=8, use_sliding_window=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3 tied with biases": Qwen3Config(**SIZES, head_dim=8, attention_bias=True, tie_word_embeddings=True),
}


def write(folder: Path, name: str = "config.json", **fields: object) -> Path:
    (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def written(folder: Path, architecture: str = "LlamaForCausalLM", **fields: object) -> Path:
    """A folder with a config.json as transformers 4 wrote it."""
    base = {"architectures": [architecture], "model_type": ARCHITECTURES[architecture], **SIZES}
    return write(folder, **(base | fields))


def assert_same_as_transformers(folder: Path) -> None:
    ours, theirs = read_config(folder), AutoConfig.from_pretrained(folder)
    for field in (
        *SIZES,
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert ours.rope_scaling is None
    else:
        assert ours.rope_scaling == Llama3Scaling(**{key: rope[key] for key in LLAMA3})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_transformers_5_wrote_reads_as_transformers_reads_it(name, tmp_path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert_same_as_transformers(tmp_path)
    config = read_config(tmp_path)
    assert config.architecture == type(model).__name__
    assert config.bos_token_id == model.config.bos_token_id
    assert set(config.eos_token_ids) <= {2, 6, 7}


@pytest.mark.parametrize("name", CONFIGS)
def test_expected_tensors_are_those_of_the_torch_model(name, tmp_path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.config.save_pretrained(tmp_path)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert tensor_shapes(read_config(tmp_path)) == shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_linears_are_those_of_the_torch_model_in_the_order_of_the_forward_pass(name, tmp_path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.config.save_pretrained(tmp_path)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    expected = [(name, (m.out_features, m.in_features)) for name, m in linears]
    assert list(linear_shapes(read_config(tmp_path)).items()) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 500000.0},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 3e4, **LLAMA3}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "rope_theta": 5.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5.0},
        {
            "max_position_embeddings": 96,
            "rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4},
        },
    ],
    ids=json.dumps,
)
def test_every_way_to_write_rope_reads_as_transformers_reads_it(architecture, rope, tmp_path):
    written(tmp_path, architecture, **rope)
    assert_same_as_transformers(tmp_path)


def test_rope_parameters_may_be_nested_by_layer_type(tmp_path):
    rope = {"full_attention": {"rope_type": "llama3", "rope_theta": 7e4, **LLAMA3}}
    written(tmp_path, "Qwen3ForCausalLM", layer_types=["full_attention"] * 2, rope_parameters=rope)
    config = read_config(tmp_path)
    assert config.rope_theta == 7e4
    assert config.rope_scaling == Llama3Scaling(**LLAMA3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_absent_fields_have_the_values_that_transformers_gives_them(architecture, tmp_path):
    fields = {**SIZES, "num_attention_heads": 32, "hidden_size": 320}
    del fields["num_key_value_heads"]
    write(tmp_path, model_type=ARCHITECTURES[architecture], **fields)
    assert_same_as_transformers(tmp_path)
    assert read_config(tmp_path).architecture == architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_null_kv_heads_mean_as_many_as_heads(architecture, tmp_path):
    written(tmp_path, architecture, num_key_value_heads=None)
    assert_same_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, ()),
        ({"eos_token_id": 3}, None, (3,)),
        ({"eos_token_id": [3, 4]}, None, (3, 4)),
        ({"eos_token_id": 3}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": 3}, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": 3}, {"eos_token_id": None}, (3,)),
        ({"eos_token_id": 3}, {"top_p": 0.8}, (3,)),
        ({"eos_token_id": None}, {}, ()),
    ],
)
def test_end_of_text_comes_from_the_generation_config_first(config, generation, expected, tmp_path):
    written(tmp_path, **config)
    if generation is not None:
        write(tmp_path, "generation_config.json", **generation)
    assert read_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 16},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {"layer_types": ["full_attention", "full_attention"], "sliding_window": 16},
    ],
    ids=json.dumps,
)
def test_a_sliding_window_that_is_off_is_accepted(fields, tmp_path):
    written(tmp_path, "Qwen2ForCausalLM", **fields)
    assert set(AutoConfig.from_pretrained(tmp_path).layer_types) == {"full_attention"}
    read_config(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "fields", "said"),
    [
        (
            "LlamaForCausalLM",
            {"architectures": ["MistralForCausalLM"]},
            ["architectures", "MistralForCausalLM"],
        ),
        ("LlamaForCausalLM", {"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ("LlamaForCausalLM", {"architectures": [{}]}, ["architectures"]),
        ("LlamaForCausalLM", {"architectures": None, "model_type": "mamba"}, ["model_type", "mamba"]),
        ("LlamaForCausalLM", {"architectures": None, "model_type": ["llama"]}, ["model_type"]),
        ("LlamaForCausalLM", {"model_type": "granite"}, ["model_type", "granite", "llama"]),
        ("LlamaForCausalLM", {"vocab_size": None}, ["vocab_size", "missing"]),
        ("LlamaForCausalLM", {"vocab_size": "many"}, ["vocab_size", '"many"']),
        ("LlamaForCausalLM", {"hidden_size": 0}, ["hidden_size", "0"]),
        ("LlamaForCausalLM", {"hidden_size": 24.0}, ["hidden_size", "24.0"]),
        ("LlamaForCausalLM", {"hidden_size": 25}, ["hidden_size", "25", "num_attention_heads"]),
        ("LlamaForCausalLM", {"num_hidden_layers": True}, ["num_hidden_layers", "true"]),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ("LlamaForCausalLM", {"head_dim": 5}, ["head_dim", "5", "even"]),
        ("LlamaForCausalLM", {"rms_norm_eps": -1e-6}, ["rms_norm_eps", "-1e-06"]),
        ("LlamaForCausalLM", {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "NaN"]),
        ("LlamaForCausalLM", {"rope_theta": float("inf")}, ["rope_theta", "Infinity"]),
        ("LlamaForCausalLM", {"rope_theta": 10**400}, ["rope_theta"]),
        ("LlamaForCausalLM", {"rope_theta": "1e6"}, ["rope_theta", '"1e6"']),
        ("LlamaForCausalLM", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings", '"yes"']),
        ("LlamaForCausalLM", {"attention_bias": 1}, ["attention_bias", "1"]),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ("LlamaForCausalLM", {"pretraining_tp": 2}, ["pretraining_tp", "2"]),
        (
            "LlamaForCausalLM",
            {"quantization_config": {"quant_method": "fp8"}},
            ["quantization_config", "fp8"],
        ),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ("LlamaForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ("LlamaForCausalLM", {"rope_scaling": "llama3"}, ["rope_scaling"]),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_scaling.type", "linear"],
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "dynamic"}},
            ["rope_scaling.rope_type", "dynamic"],
        ),
        (
            "Qwen2ForCausalLM",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            ["rope_scaling.type", "yarn"],
        ),
        ("Qwen3ForCausalLM", {"rope_parameters": {"rope_type": "longrope"}}, ["longrope", "llama3"]),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": None}},
            ["rope_scaling.factor", "missing"],
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}},
            ["rope_scaling.high_freq_factor", "0.5", "1.0"],
        ),
        ("LlamaForCausalLM", {"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
        ("LlamaForCausalLM", {"eos_token_id": [1, -1]}, ["eos_token_id", "-1"]),
        ("LlamaForCausalLM", {"bos_token_id": [1]}, ["bos_token_id"]),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            ["use_sliding_window", "16", "false"],
        ),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
            ["use_sliding_window", "16", "false"],
        ),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": -1},
            ["max_window_layers", "-1", "at least 0"],
        ),
        (
            "Qwen3ForCausalLM",
            {"layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types[1]", "sliding_attention"],
        ),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"]}, ["layer_types", "2"]),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_by_file_name_and_value(architecture, fields, said, tmp_path):
    written(tmp_path, architecture, **fields)
    with pytest.raises(BadRequestError) as caught:
        read_config(tmp_path)
    for words in (str(tmp_path / "config.json"), *said):
        assert words in str(caught.value)


FIELDS = [*SIZES, "architectures", "model_type", "head_dim", "rope_theta", "rope_scaling", "rope_parameters"]
FIELDS += ["layer_types", "use_sliding_window", "sliding_window", "max_window_layers", "quantization_config"]
FIELDS += ["partial_rotary_factor", "original_max_position_embeddings", "eos_token_id", "tie_word_embeddings"]
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["llama3"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "full_attention", *LLAMA3]), inner, max_size=5
        )
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(changed=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, min_size=1, max_size=3))
def test_any_json_in_any_field_is_read_or_refused_and_never_crashes(changed, tmp_path_factory):
    folder = written(tmp_path_factory.getbasetemp(), "Qwen2ForCausalLM", **changed)
    refused = ""
    try:
        config = read_config(folder)
    except BadRequestError as error:
        refused = str(error)
    assert str(folder / "config.json") in refused if refused else isinstance(config, ModelConfig)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused_by_file_name(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadRequestError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_generation_config_that_is_wrong_is_refused_by_file_name(tmp_path):
    written(tmp_path)
    write(tmp_path, "generation_config.json", eos_token_id=1.5)
    with pytest.raises(BadRequestError, match=r"generation_config\.json: eos_token_id is 1\.5"):
        read_config(tmp_path)


def test_a_folder_without_a_config_is_not_a_model(tmp_path):
    with pytest.raises(NotFoundError, match=r"config\.json does not exist"):
        read_config(tmp_path)
