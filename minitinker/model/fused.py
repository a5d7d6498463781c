"""The transformer of transformer.py with fewer, larger steps, to sample from where nothing goes back through it.

Linears of the same input are one product: W of q, k and v stand below each other, and so do those of gate and up, and
their A and B. q and k are normed and turned together. The last layer ends with keys and values for tokens whose final
states are not wanted: all of a prompt but its last, where nothing is asked about the prompt.
"""

from types import ModuleType
from typing import Any

import numpy as np

from minitinker.model.config import ModelConfig, linear_shapes
from minitinker.model.packing import Packed
from minitinker.model.transformer import (
    EMBEDDING,
    KVCache,
    Network,
    Places,
    hidden_states,
    linear_forward,
    norm_forward,
    places_of,
)

Array = Any

JOINED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def fuse(config: ModelConfig, weights: dict[str, Array], ops: ModuleType) -> dict[str, Array]:
    """The weights that `_fused_states` takes, of those that `hidden_states` takes: arrays of the backend. What is put
    together is taken out of `weights`, so that no more than a module's is there twice."""
    fused: dict[str, Array] = {}
    for name, parts in joined(config).items():
        for kind in ("weight", "bias"):
            if f"{next(iter(parts))}.{kind}" in weights:
                pieces = [weights.pop(f"{part}.{kind}") for part in parts]
                whole = ops.zeros((sum(parts.values()), *pieces[0].shape[1:]), ops.DTYPE)
                for piece, rows in zip(pieces, rows_of(parts).values(), strict=True):
                    whole[rows] = piece
                fused[f"{name}.{kind}"] = whole
    if config.qk_norm:
        heads = config.num_attention_heads
        for i in range(config.num_hidden_layers):
            attn = f"model.layers.{i}.self_attn"
            both = ops.zeros((heads + config.num_key_value_heads, config.head_dim), ops.DTYPE)
            both[:heads], both[heads:] = (weights.pop(f"{attn}.{kind}_norm.weight") for kind in "qk")
            fused[f"{attn}.qk_norm.weight"] = both
    return weights | fused


def unfused(config: ModelConfig, fused: dict[str, Array]) -> dict[str, Array]:
    """What `fuse` put together, by the names it had: views."""
    views: dict[str, Array] = {}
    for name, parts in joined(config).items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in fused:
                whole = fused[f"{name}.{kind}"]
                views |= {f"{part}.{kind}": whole[rows] for part, rows in rows_of(parts).items()}
    if config.qk_norm:
        for i in range(config.num_hidden_layers):
            attn = f"model.layers.{i}.self_attn"
            both = fused[f"{attn}.qk_norm.weight"]
            views |= {f"{attn}.q_norm.weight": both[0], f"{attn}.k_norm.weight": both[-1]}
    return views


def joined(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Module -> the modules that stand below each other in it, each with its d_out."""
    shapes = linear_shapes(config)
    return {
        f"model.layers.{i}.{name}": {
            part: shapes[part][0]
            for part in (f"model.layers.{i}.{name.partition('.')[0]}.{kind}" for kind in kinds)
        }
        for i in range(config.num_hidden_layers)
        for name, kinds in JOINED.items()
    }


def rows_of(parts: dict[str, int]) -> dict[str, slice]:
    """Where each part stands in the whole."""
    ends = np.cumsum(list(parts.values())).tolist()
    return {part: slice(end - d_out, end) for (part, d_out), end in zip(parts.items(), ends, strict=True)}


def sampled_states(net: Network, batch: Packed | Places, cache: KVCache) -> Array:
    """The final, normed states of the tokens where they are wanted: (wanted, hidden_size), by the way that the
    network's weights are for."""
    places = places_of(net, batch, cached=True) if isinstance(batch, Packed) else batch
    if net.fused:
        return _fused_states(net, places, cache)
    h, _ = hidden_states(net, places, cache)
    return h if places.wanted is None else h[places.wanted[0]]


def _fused_states(net: Network, places: Places, cache: KVCache) -> Array:
    """As `sampled_states`, of weights from `fuse`: what `hidden_states` gives but for rounding; where the backend's
    rows have bits of their own, to the bit."""
    x = net.ops.embedding(places.tokens, net.weights[EMBEDDING])
    for i, keys_and_values in enumerate(zip(cache.keys, cache.values, strict=True)):
        wanted = places.wanted if i == net.config.num_hidden_layers - 1 else None
        x = _layer(net, f"model.layers.{i}", x, places, *keys_and_values, wanted)
    return norm_forward(net, "model.norm", x)[0] if len(x) > 0 else x


def _layer(
    net: Network,
    layer: str,
    x: Array,
    places: Places,
    keys: Array,
    values: Array,
    wanted: tuple[Array, Any] | None,
) -> Array:
    """x: (tokens, hidden_size), the states before the layer -> after it, of all tokens or of those of `wanted`, which
    is as in Places."""
    config, ops, attn = net.config, net.ops, f"{layer}.self_attn"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    turned, d_ffn = heads + kv_heads, config.intermediate_size

    h, _ = norm_forward(net, f"{layer}.input_layernorm", x)
    parts = [n * config.head_dim for n in (heads, kv_heads, kv_heads)]
    qkv, _ = linear_forward(net, f"{attn}.qkv_proj", h, parts)
    qkv = qkv.reshape(len(x), -1, config.head_dim)
    qk = qkv[:, :turned]
    if config.qk_norm:
        qk, _ = norm_forward(net, f"{attn}.qk_norm", qk)
    qk, _ = ops.rope_forward(qk, *places.rope)
    keys[places.cache_rows], values[places.cache_rows] = qk[:, heads:], qkv[:, turned:]
    q, plan = qk[:, :heads], places.plan
    if wanted is not None:
        rows, plan = wanted
        x, q, net = x[rows], q[rows], net.part(rows)
        if len(x) == 0:
            return x
    o, _ = ops.attention_forward(q, keys, values, plan, config.head_dim**-0.5)
    attended, _ = linear_forward(net, f"{attn}.o_proj", o.reshape(len(x), -1))
    attended += x

    h, _ = norm_forward(net, f"{layer}.post_attention_layernorm", attended)
    gate_up, _ = linear_forward(net, f"{layer}.mlp.gate_up_proj", h, [d_ffn, d_ffn])
    mixed, _ = ops.swiglu_forward(gate_up[:, :d_ffn], gate_up[:, d_ffn:])
    y, _ = linear_forward(net, f"{layer}.mlp.down_proj", mixed)
    y += attended
    return y
