"""The transformer of Llama and Qwen: forward and hand-written backward over packed sequences.

    x  = embedding(tokens)
    x += attention(norm(x))      per layer
    x += mlp(norm(x))
    logits = head(norm(x))

Every function takes the network as a value and asks its ops for the arithmetic; which backend that is, it
cannot tell. A forward returns what its backward needs; a backward adds the gradients of A and B to `grads`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from minitinker.model.config import ModelConfig
from minitinker.model.frequencies import rope_frequencies
from minitinker.model.packing import Packed, last_rows

Array = Any  # an array of the backend: NumPy's or torch's
Grads = dict[str, tuple[Array, Array]]  # module name -> gradients of A and B, in the stacked shapes

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Network:
    """Frozen base weights with the adapters of the rows that go through them.

    weights: Hugging Face tensor name -> array. lora: module name -> (A: (adapters, rank, d_in),
    B: (adapters, d_out, rank)). scale: (adapters,). adapter: (tokens,) the adapter of each row, -1 for none;
    None: adapter 0 for all. exact: whether a row shall have the same bits among any other rows. fused: whether weights
    and lora are those of fused.py.
    """

    ops: ModuleType
    config: ModelConfig
    weights: dict[str, Array]
    lora: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    scale: Array = None
    adapter: Array = None
    exact: bool = False
    fused: bool = False

    def part(self, rows: slice | Array) -> "Network":
        """The network of some of the rows."""
        return self if self.adapter is None else replace(self, adapter=self.adapter[rows])


@dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, one array a layer: (rows, kv_heads, head_dim)."""

    keys: list[Array]
    values: list[Array]


@dataclass(frozen=True)
class Places:
    """The tokens of a batch, and where they are as every layer needs it: the turns of their positions, (cos, sin);
    where sequences have queries and keys; the rows of the cache that they are written to, if there is one. wanted: the
    tokens whose final states are wanted, and the plan of their queries; None: all."""

    tokens: Array
    rope: tuple[Array, Array]
    plan: Any
    cache_rows: Array
    wanted: tuple[Array, Any] | None = None


def hidden_states(
    net: Network,
    batch: Packed | Places,
    cache: KVCache | None = None,
    keep: bool = False,
    recompute: bool = False,
) -> tuple[Array, Any]:
    """The final, normed states: (tokens, hidden_size), and, if `keep`, what the backward needs.

    With a cache, keys and values of the batch are written to it and attention reads from it. With `recompute`
    only each layer's input is kept, and the backward does the layer's forward once more: a third more work for
    a small part of the memory.
    """
    config, ops = net.config, net.ops
    places = places_of(net, batch, cached=cache is not None) if isinstance(batch, Packed) else batch
    x = ops.embedding(places.tokens, net.weights[EMBEDDING])
    saved_layers = []
    for i in range(config.num_hidden_layers):
        y, saved_layer = _layer_forward(net, i, x, places, cache)
        if keep:
            saved_layers.append(x if recompute else saved_layer)
        x = y
    h, saved_norm = norm_forward(net, "model.norm", x)
    return h, (saved_layers, saved_norm, places, recompute)


def places_of(net: Network, batch: Packed, cached: bool) -> Places:
    ops, keys, last = net.ops, (batch.k_starts, batch.k_lengths), batch.wanted
    wanted = None
    if last is not None and (last < batch.q_lengths).any():
        plan = ops.attention_plan(np.cumsum(last) - last, last, *keys, net.exact)
        wanted = ops.array(last_rows(batch, last)), plan
    return Places(
        tokens=ops.array(batch.tokens),
        rope=_rope(net, ops.array(batch.positions)),
        plan=ops.attention_plan(batch.q_starts, batch.q_lengths, *keys, net.exact),
        cache_rows=ops.array(batch.cache_rows) if cached else None,
        wanted=wanted,
    )


def decoding_places(net: Network, tokens: Array, done: Array, regions: Array) -> Places:
    """Of the next token of each sequence: as places_of has them for the batch that `pack_for_cache` makes of these, all
    (sequences,), but of arrays of the backend, which are not looked at."""
    plan = net.ops.decoding_plan(regions, done + 1, net.exact)
    return Places(tokens, _rope(net, done), plan, cache_rows=regions + done)


def _rope(net: Network, positions: Array) -> tuple[Array, Array]:
    return net.ops.rope_table(positions, _frequencies(net.ops.array, net.config))  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def _frequencies(array: Callable[[Any], Array], config: ModelConfig) -> Array:
    return array(rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))


def hidden_states_backward(net: Network, dh: Array, saved: Any, grads: Grads) -> None:
    """From dh: (tokens, hidden_size) to the gradients of every adapter. Empties `saved` as it goes."""
    saved_layers, saved_norm, places, recompute = saved
    dx = net.ops.rms_norm_backward(dh, saved_norm)
    for i in reversed(range(net.config.num_hidden_layers)):
        saved_layer = saved_layers.pop()
        if recompute:
            _, saved_layer = _layer_forward(net, i, saved_layer, places, None)
        dx = _layer_backward(net, i, dx, saved_layer, grads)


def head_chunks(net: Network, tokens: int) -> Iterator[slice]:
    """Rows that go through the head together, so that their logits take about ops.HEAD_BYTES."""
    rows = max(1, net.ops.HEAD_BYTES // (4 * net.config.vocab_size))
    for start in range(0, tokens, rows):
        yield slice(start, min(start + rows, tokens))


def target_logprobs(net: Network, h: Array, targets: Array) -> Array:
    """h: (tokens, hidden_size), targets: (tokens,) int64 -> logprobs: (tokens,)."""
    ops, chunks = net.ops, []
    for rows in head_chunks(net, len(h)):
        logits, _ = logits_forward(net.part(rows), h[rows])
        chunks.append(ops.to_numpy(ops.logprob_forward(logits, ops.array(targets[rows, None]))[0])[:, 0])
    return np.concatenate(chunks) if chunks else np.zeros(0, np.float32)


def top_logprobs(net: Network, h: Array, k: int) -> list[list[tuple[int, float]]]:
    """For each row of h: (tokens, hidden_size) the k likeliest tokens and their logprobs, likeliest first."""
    ops, found = net.ops, []
    for rows in head_chunks(net, len(h)):
        logits, _ = logits_forward(net.part(rows), h[rows])
        likeliest = np.argsort(-ops.to_numpy(logits), axis=-1, kind="stable")[:, :k]
        logprobs = ops.to_numpy(ops.logprob_forward(logits, ops.array(likeliest))[0])
        found += [
            list(zip(t, lp, strict=True)) for t, lp in zip(likeliest.tolist(), logprobs.tolist(), strict=True)
        ]
    return found


def logits_forward(net: Network, h: Array) -> tuple[Array, Any]:
    """h: (tokens, hidden_size) -> logits: (tokens, vocab). Meant for a chunk of tokens at a time."""
    return linear_forward(net, "lm_head", h)


def logits_backward(net: Network, dlogits: Array, saved: Any, grads: Grads) -> Array:
    """dlogits: (tokens, vocab) -> dh: (tokens, hidden_size)."""
    return _linear_backward(net, "lm_head", dlogits, saved, grads)


def _layer_forward(
    net: Network, i: int, x: Array, places: Places, cache: KVCache | None
) -> tuple[Array, Any]:
    layer = f"model.layers.{i}"
    layer_cache = None if cache is None else (cache.keys[i], cache.values[i])
    attended, saved_attention = _attention_forward(net, layer, x, places, layer_cache)
    attended += x
    y, saved_mlp = _mlp_forward(net, layer, attended)
    y += attended
    return y, (saved_attention, saved_mlp)


def _layer_backward(net: Network, i: int, dy: Array, saved: Any, grads: Grads) -> Array:
    layer = f"model.layers.{i}"
    saved_attention, saved_mlp = saved
    dattended = _mlp_backward(net, layer, dy, saved_mlp, grads)
    dattended += dy
    dx = _attention_backward(net, layer, dattended, saved_attention, grads)
    dx += dattended
    return dx


def _attention_forward(
    net: Network,
    layer: str,
    x: Array,
    places: Places,
    cache: tuple[Array, Array] | None,
) -> tuple[Array, Any]:
    config, ops, attn = net.config, net.ops, f"{layer}.self_attn"
    h, saved_norm = norm_forward(net, f"{layer}.input_layernorm", x)
    (q, saved_q), (k, saved_k), (v, saved_v) = (
        linear_forward(net, f"{attn}.{name}_proj", h) for name in "qkv"
    )
    q = q.reshape(-1, config.num_attention_heads, config.head_dim)
    k = k.reshape(-1, config.num_key_value_heads, config.head_dim)
    v = v.reshape(-1, config.num_key_value_heads, config.head_dim)
    saved_q_norm = saved_k_norm = None
    if config.qk_norm:
        q, saved_q_norm = norm_forward(net, f"{attn}.q_norm", q)
        k, saved_k_norm = norm_forward(net, f"{attn}.k_norm", k)
    q, saved_q_rope = ops.rope_forward(q, *places.rope)
    k, saved_k_rope = ops.rope_forward(k, *places.rope)
    if cache is not None:
        cache[0][places.cache_rows], cache[1][places.cache_rows] = k, v
        k, v = cache
    o, saved_attention = ops.attention_forward(q, k, v, places.plan, config.head_dim**-0.5)
    o = o.reshape(-1, config.num_attention_heads * config.head_dim)
    y, saved_o = linear_forward(net, f"{attn}.o_proj", o)
    q_saved, k_saved = (saved_q, saved_q_norm, saved_q_rope), (saved_k, saved_k_norm, saved_k_rope)
    return y, (saved_norm, q_saved, k_saved, saved_v, saved_attention, saved_o)


def _attention_backward(net: Network, layer: str, dy: Array, saved: Any, grads: Grads) -> Array:
    config, ops, attn = net.config, net.ops, f"{layer}.self_attn"
    saved_norm, q_saved, k_saved, saved_v, saved_attention, saved_o = saved
    (saved_q, saved_q_norm, saved_q_rope), (saved_k, saved_k_norm, saved_k_rope) = q_saved, k_saved
    do = _linear_backward(net, f"{attn}.o_proj", dy, saved_o, grads)
    do = do.reshape(-1, config.num_attention_heads, config.head_dim)
    dq, dk, dv = ops.attention_backward(do, saved_attention)
    dq = ops.rope_backward(dq, saved_q_rope)
    dk = ops.rope_backward(dk, saved_k_rope)
    if config.qk_norm:
        dq = ops.rms_norm_backward(dq, saved_q_norm)
        dk = ops.rms_norm_backward(dk, saved_k_norm)
    tokens = len(dy)
    dh = _linear_backward(net, f"{attn}.q_proj", dq.reshape(tokens, -1), saved_q, grads)
    dh += _linear_backward(net, f"{attn}.k_proj", dk.reshape(tokens, -1), saved_k, grads)
    dh += _linear_backward(net, f"{attn}.v_proj", dv.reshape(tokens, -1), saved_v, grads)
    return ops.rms_norm_backward(dh, saved_norm)


def _mlp_forward(net: Network, layer: str, x: Array) -> tuple[Array, Any]:
    mlp = f"{layer}.mlp"
    h, saved_norm = norm_forward(net, f"{layer}.post_attention_layernorm", x)
    gate, saved_gate = linear_forward(net, f"{mlp}.gate_proj", h)
    up, saved_up = linear_forward(net, f"{mlp}.up_proj", h)
    mixed, saved_swiglu = net.ops.swiglu_forward(gate, up)
    y, saved_down = linear_forward(net, f"{mlp}.down_proj", mixed)
    return y, (saved_norm, saved_gate, saved_up, saved_swiglu, saved_down)


def _mlp_backward(net: Network, layer: str, dy: Array, saved: Any, grads: Grads) -> Array:
    mlp = f"{layer}.mlp"
    saved_norm, saved_gate, saved_up, saved_swiglu, saved_down = saved
    dmixed = _linear_backward(net, f"{mlp}.down_proj", dy, saved_down, grads)
    dgate, dup = net.ops.swiglu_backward(dmixed, saved_swiglu)
    dh = _linear_backward(net, f"{mlp}.gate_proj", dgate, saved_gate, grads)
    dh += _linear_backward(net, f"{mlp}.up_proj", dup, saved_up, grads)
    return net.ops.rms_norm_backward(dh, saved_norm)


def norm_forward(net: Network, name: str, x: Array) -> tuple[Array, Any]:
    return net.ops.rms_norm_forward(x, net.weights[f"{name}.weight"], net.config.rms_norm_eps)  # type: ignore


def linear_forward(
    net: Network, name: str, x: Array, parts: Sequence[int] | None = None
) -> tuple[Array, Any]:
    """parts: d_out of each linear whose weights stand below each other under this name."""
    tied = name == "lm_head" and "lm_head.weight" not in net.weights
    w = net.weights[EMBEDDING if tied else f"{name}.weight"]
    a, b = net.lora.get(name, (None, None))
    bias = net.weights.get(f"{name}.bias")
    return net.ops.lora_linear_forward(x, w, bias, a, b, net.scale, net.adapter, net.exact, parts)  # type: ignore


def _linear_backward(net: Network, name: str, dy: Array, saved: Any, grads: Grads) -> Array:
    dx, da, db = net.ops.lora_linear_backward(dy, saved)
    if da is not None:
        grad_a, grad_b = grads[name]
        grad_a += da
        grad_b += db
    return dx
