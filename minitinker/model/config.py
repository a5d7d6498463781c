"""What a model is: the fields of a Hugging Face `config.json` that the transformer needs, checked and named.

`read_config` understands the files that transformers 4 wrote (`rope_theta`, `rope_scaling`) and those that
transformers 5 writes (`rope_parameters`). Where a field is absent it has the value that transformers gives
it. What would change the computation and is not implemented is refused by name, never ignored.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minitinker.errors import BadRequestError, NotFoundError


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretched its rotary frequencies: slow ones are divided by `factor`, fast ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the options of a decoder. A bias exists where its flag says so, and nowhere else."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tie_word_embeddings: bool
    qk_norm: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True)
class _Family:
    """What transformers assumes for one architecture. None means that another field decides."""

    model_type: str
    max_position_embeddings: int
    num_key_value_heads: int | None
    head_dim: int | None
    qk_norm: bool
    slides: bool  # whether the architecture knows sliding-window layers at all


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048, None, None, qk_norm=False, slides=False),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, 32, None, qk_norm=False, slides=True),
    "Qwen3ForCausalLM": _Family("qwen3", 32768, 32, 128, qk_norm=True, slides=True),
}
_ROPE_THETA = 10_000.0  # transformers' default for all three


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json`, and the end-of-text ids of `generation_config.json`, from a Hugging Face folder.

    Raises NotFoundError where there is no config.json, and BadRequestError, naming the file, the field and
    its value, where a field is missing, malformed or asks for something that is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise NotFoundError(
            f"{path} does not exist; a model folder holds config.json, weights and a tokenizer"
        )
    fields = _Fields(path, read_json_object(path))
    architecture = _architecture(fields)
    family = _FAMILIES[architecture]
    _refuse_unsupported(fields, family)

    heads = fields.integer("num_attention_heads")
    # An absent num_key_value_heads is the family's default; a null one is always the number of heads.
    kv_heads = fields.integer("num_key_value_heads", heads)
    if "num_key_value_heads" not in fields.values and family.num_key_value_heads is not None:
        kv_heads = family.num_key_value_heads
    if heads % kv_heads:
        fields.fail("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")

    hidden_size = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", family.head_dim or hidden_size // heads)
    if "head_dim" not in fields.values and family.head_dim is None and hidden_size % heads:
        fields.fail(
            "hidden_size", hidden_size, f"a multiple of num_attention_heads ({heads}), or give head_dim"
        )
    if head_dim % 2:
        fields.fail("head_dim", head_dim, "even, since rotary embeddings turn pairs")

    max_position_embeddings = fields.integer("max_position_embeddings", family.max_position_embeddings)
    rope_theta, rope_scaling = _rope(fields, max_position_embeddings)
    attention_bias = family.model_type != "qwen2" and fields.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qk_norm=family.qk_norm,
        max_position_embeddings=max_position_embeddings,
        eos_token_ids=_eos_token_ids(fields),
        bos_token_id=fields.token_id("bos_token_id"),
        qkv_bias=attention_bias or family.model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family.model_type == "llama" and fields.flag("mlp_bias", False),
    )


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear that LoRA can adapt, in the order of the forward pass: module name -> (d_out, d_in).

    "lm_head" is always among them; where the head is tied, its weight is the embedding's.
    """
    d, ffn = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {
            f"{attention}.q_proj": (q, d),
            f"{attention}.k_proj": (kv, d),
            f"{attention}.v_proj": (kv, d),
            f"{attention}.o_proj": (d, q),
            f"{mlp}.gate_proj": (ffn, d),
            f"{mlp}.up_proj": (ffn, d),
            f"{mlp}.down_proj": (d, ffn),
        }
    shapes["lm_head"] = (config.vocab_size, d)
    return shapes


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model holds, by its Hugging Face name, and its shape.

    A tied head has no tensor of its own.
    """
    d = config.hidden_size
    biased = {
        "q_proj": config.qkv_bias,
        "k_proj": config.qkv_bias,
        "v_proj": config.qkv_bias,
        "o_proj": config.o_bias,
        "gate_proj": config.mlp_bias,
        "up_proj": config.mlp_bias,
        "down_proj": config.mlp_bias,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (d,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (d,)
        if config.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
    shapes["model.norm.weight"] = (d,)
    for module, (d_out, d_in) in linear_shapes(config).items():
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        shapes[f"{module}.weight"] = (d_out, d_in)
        if biased.get(module.rpartition(".")[2], False):
            shapes[f"{module}.bias"] = (d_out,)
    return shapes


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BadRequestError, naming the file, where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise BadRequestError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequestError(f"{path} holds a {type(value).__name__}; it must hold a JSON object")
    return value


@dataclass(frozen=True)
class _Fields:
    """The fields of one JSON object, read with a check of their type. A null field counts as absent.

    `inside` is the field of the file that holds this object, for messages; empty for the file itself.
    """

    path: Path
    values: Mapping[str, Any]
    inside: str = ""

    def fail(self, key: str, value: object, right: str) -> NoReturn:
        name = f"{self.inside}.{key}" if self.inside else key
        shown = "missing" if value is None else json.dumps(value)
        raise BadRequestError(f"{self.path}: {name} is {shown}; it must be {right}")

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if not _is_integer(value) or value < least:
            self.fail(key, value, "a positive integer" if least == 1 else f"an integer of at least {least}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not (_is_integer(value) or isinstance(value, float)) or not 0 < value <= sys.float_info.max:
            self.fail(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return bool(value)

    def token_id(self, key: str) -> int | None:
        value = self.get(key, None)
        if value is not None and not _is_token_id(value):
            self.fail(key, value, "a token id or null")
        return None if value is None else int(value)

    def object(self, key: str) -> "_Fields":
        value = self.get(key, {})
        if not isinstance(value, dict):
            self.fail(key, value, "an object")
        return _Fields(self.path, value, f"{self.inside}.{key}" if self.inside else key)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return _is_integer(value) and value >= 0


def _architecture(fields: _Fields) -> str:
    """The class that transformers would build: `architectures`, or, where it is absent, by `model_type`."""
    model_type = fields.get("model_type", None)
    architectures = fields.get("architectures", None)
    for name, family in _FAMILIES.items():
        if architectures == [name] or (architectures is None and model_type == family.model_type):
            if model_type not in (None, family.model_type):
                fields.fail("model_type", model_type, f'"{family.model_type}", as architectures says')
            return name
    if architectures is None:
        types = [family.model_type for family in _FAMILIES.values()]
        fields.fail("model_type", model_type, f"one of {', '.join(types)}")
    fields.fail("architectures", architectures, f"a list of one of {', '.join(_FAMILIES)}")


def _refuse_unsupported(fields: _Fields, family: _Family) -> None:
    """Raise BadRequestError for options that change the numbers and are not implemented."""
    if fields.get("hidden_act", "silu") != "silu":
        fields.fail("hidden_act", fields.values["hidden_act"], '"silu"')
    if fields.get("pretraining_tp", 1) != 1:
        fields.fail("pretraining_tp", fields.values["pretraining_tp"], "1")
    if fields.get("quantization_config", None) is not None:
        method = fields.object("quantization_config").get("quant_method", "unknown")
        raise BadRequestError(
            f"{fields.path}: quantization_config (quant_method {json.dumps(method)}) is not supported; use"
            " the unquantized model, in float32, float16 or bfloat16"
        )
    layers = fields.integer("num_hidden_layers")
    layer_types = fields.get("layer_types", None)
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != layers:
            fields.fail("layer_types", layer_types, f"a list of {layers} names, one for each layer")
        for layer, layer_type in enumerate(layer_types):
            if layer_type != "full_attention":
                fields.fail(f"layer_types[{layer}]", layer_type, '"full_attention"')
    elif family.slides and fields.flag("use_sliding_window", False):
        # Layers from max_window_layers on slide, so a window that starts above the last layer is off.
        window = fields.values.get("sliding_window", 4096)
        if window is not None and fields.integer("max_window_layers", 28, least=0) < layers:
            raise BadRequestError(
                f"{fields.path}: use_sliding_window is true with sliding_window {json.dumps(window)}; sliding"
                " window attention is not supported, so use_sliding_window must be false"
            )


def _rope(fields: _Fields, max_position_embeddings: int) -> tuple[float, Llama3Scaling | None]:
    """Base frequency and scaling, from `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    rope = fields.object("rope_scaling")
    if not rope.values:
        rope = fields.object("rope_parameters")
    if (
        "full_attention" in rope.values
    ):  # one setting for each type of layer, and all our layers are of this type
        rope = rope.object("full_attention")
    theta = rope.number("rope_theta", fields.number("rope_theta", _ROPE_THETA))
    for holder in (fields, rope):
        if holder.get("partial_rotary_factor", 1) != 1:
            holder.fail("partial_rotary_factor", holder.values["partial_rotary_factor"], "1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        rope.fail("rope_type" if "rope_type" in rope.values else "type", kind, '"default" or "llama3"')
    original = fields.get("original_max_position_embeddings", None)
    if original is None:
        length = rope.integer("original_max_position_embeddings", max_position_embeddings)
    else:  # where a file has it twice, transformers takes the one outside
        length = fields.integer("original_max_position_embeddings")
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=length,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        right = f"greater than low_freq_factor ({scaling.low_freq_factor})"
        rope.fail("high_freq_factor", scaling.high_freq_factor, right)
    return theta, scaling


def _eos_token_ids(fields: _Fields) -> tuple[int, ...]:
    """The ids that end a text: those of `generation_config.json`, else those of `config.json`, else none."""
    path = fields.path.with_name("generation_config.json")
    sources = [fields]
    if path.is_file():
        sources.insert(0, _Fields(path, read_json_object(path)))
    for source in sources:
        value = source.get("eos_token_id", None)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(_is_token_id(i) for i in ids):
            source.fail("eos_token_id", value, "a token id or a list of token ids")
        return tuple(ids)
    return ()
