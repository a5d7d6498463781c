"""Tiny models with random weights, as transformers writes them, for the tests of several files."""

import copy
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from minitinker.backend import load_backend
from minitinker.model.adapter import AdapterSpec, views
from minitinker.model.config import read_config
from minitinker.model.packing import pack
from minitinker.model.transformer import Network, hidden_states, logits_forward
from minitinker.model.weights import BaseModel, read_weights

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
}


def random_model(name: str, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.nn.Module:
    """A model whose every tensor is random: norms and biases too, which transformers starts constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))  # it writes its dtype into it
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return model.to(dtype).eval()


def saved(
    folder: Path,
    name: str = "qwen3",
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    std: float = 1.0,
) -> Path:
    random_model(name, dtype, std).save_pretrained(folder, max_shard_size="4KB" if shards else "1GB")
    (folder / "tokenizer.json").write_text("{}")
    assert (folder / "model.safetensors").is_file() != shards
    return folder


def loaded(folder: Path) -> dict[str, np.ndarray]:
    return dict(read_weights(folder, read_config(folder)))


def random_flat(spec: AdapterSpec, seed: int = 0) -> np.ndarray:
    """Numbers for an adapter, B included: (spec.size,) float32."""
    return 0.1 * np.random.default_rng(seed).standard_normal(spec.size, np.float32)


def our_logits(base: BaseModel, spec: AdapterSpec, flat: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """tokens: (tokens,) -> logits: (tokens, vocab) of the base with the adapter."""
    ops = load_backend("reference")
    weights = base.placed(ops)
    scale = ops.array(np.array([spec.scale], np.float32))
    net = Network(ops, base.config, weights, views(spec, ops.array(flat)), scale)
    h, _ = hidden_states(net, pack([tokens]))
    return ops.to_numpy(logits_forward(net, h)[0])


def their_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """The same from a model of transformers or PEFT."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
