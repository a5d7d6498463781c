"""The transformer of transformer.py with fewer, larger steps, to sample from where nothing goes back through it.

Products of the same input are one product: W of q, k and v stand below each other, and so do those of gate and up. q
and k are normed and turned together. There is no adapter beside a weight; it is merged into it.
"""

from typing import Any

import numpy as np

from minitinker.model.config import ModelConfig
from minitinker.model.packing import Packed
from minitinker.model.transformer import (
    EMBEDDING,
    KVCache,
    Network,
    Places,
    linear_forward,
    norm_forward,
    places_of,
)

Array = Any

JOINED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def fuse(config: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]:
    """The weights that `fused_states` takes, of those that `hidden_states` takes: NumPy arrays."""
    fused = dict(weights)
    for i in range(config.num_hidden_layers):
        for name, parts in JOINED.items():
            module = f"model.layers.{i}.{name}"
            places = [f"{module.rsplit('.', 1)[0]}.{part}" for part in parts]
            for kind in ("weight", "bias"):
                if f"{places[0]}.{kind}" in weights:
                    fused[f"{module}.{kind}"] = np.concatenate(
                        [fused.pop(f"{place}.{kind}") for place in places]
                    )
        if config.qk_norm:
            attn = f"model.layers.{i}.self_attn"
            heads = config.num_attention_heads, config.num_key_value_heads
            norms = [fused.pop(f"{attn}.{kind}_norm.weight") for kind in "qk"]
            fused[f"{attn}.qk_norm.weight"] = np.repeat(norms, heads, axis=0)
    return fused


def fused_states(net: Network, batch: Packed | Places, cache: KVCache) -> Array:
    """The final, normed states: (tokens, hidden_size), as `hidden_states` gives them but for rounding. net: of weights
    from `fuse`."""
    places = places_of(net, batch, cached=True) if isinstance(batch, Packed) else batch
    x = net.ops.embedding(places.tokens, net.weights[EMBEDDING])
    for i, keys_and_values in enumerate(zip(cache.keys, cache.values, strict=True)):
        x = _layer(net, f"model.layers.{i}", x, places, *keys_and_values)
    return norm_forward(net, "model.norm", x)[0]


def _layer(net: Network, layer: str, x: Array, places: Places, keys: Array, values: Array) -> Array:
    config, ops, attn = net.config, net.ops, f"{layer}.self_attn"
    heads, turned = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads

    h, _ = norm_forward(net, f"{layer}.input_layernorm", x)
    qkv, _ = linear_forward(net, f"{attn}.qkv_proj", h)
    qkv = qkv.reshape(len(x), -1, config.head_dim)
    qk = qkv[:, :turned]
    if config.qk_norm:
        qk, _ = norm_forward(net, f"{attn}.qk_norm", qk)
    qk, _ = ops.rope_forward(qk, *places.rope)
    keys[places.cache_rows], values[places.cache_rows] = qk[:, heads:], qkv[:, turned:]
    o, _ = ops.attention_forward(qk[:, :heads], keys, values, places.plan, config.head_dim**-0.5)
    attended, _ = linear_forward(net, f"{attn}.o_proj", o.reshape(len(x), -1))
    attended += x

    h, _ = norm_forward(net, f"{layer}.post_attention_layernorm", attended)
    gate_up, _ = linear_forward(net, f"{layer}.mlp.gate_up_proj", h)
    d_ffn = config.intermediate_size
    mixed, _ = ops.swiglu_forward(gate_up[:, :d_ffn], gate_up[:, d_ffn:])
    y, _ = linear_forward(net, f"{layer}.mlp.down_proj", mixed)
    y += attended
    return y
