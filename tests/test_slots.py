"""slots.py: adapters of any rank on any modules, each with the numbers and bits that it has alone."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import make_model

from minitinker.backend import load_backend
from minitinker.engine import networks
from minitinker.engine.cache import Arena
from minitinker.engine.networks import Networks
from minitinker.engine.slots import Slots
from minitinker.engine.trainer import Snapshot
from minitinker.model.adapter import AdapterSpec, adapter_spec, views
from minitinker.model.fused import sampled_states
from minitinker.model.packing import pack_for_cache
from minitinker.model.transformer import Network, hidden_states
from minitinker.model.weights import load_base_model


def snapshot(ops, spec, seed):
    flat = 0.1 * np.random.default_rng(seed).standard_normal(spec.size, np.float32)
    return Snapshot(spec, ops.array(flat, ops.DTYPE))


def draw(ops, config):
    """Adapters of several ranks, on all modules, on some kinds of them, and on two linears of three."""
    whole = adapter_spec(config, 4, True, True, False)
    some = {
        name: shape for name, shape in whole.shapes.items() if name.endswith(("q_proj", "v_proj", "up_proj"))
    }
    specs = [
        whole,
        adapter_spec(config, 3, True, True, False),
        adapter_spec(config, 7, False, True, False),
        AdapterSpec(2, some),
        adapter_spec(config, 4, True, True, False),
    ]
    return [snapshot(ops, spec, seed) for seed, spec in enumerate(specs)]


@pytest.mark.parametrize("family", ["llama-biased", "qwen3-tied"])
def test_each_row_has_the_bits_of_the_plain_network_with_its_adapter(family):
    ops = load_backend("kernels", dtype="float32")
    base = load_base_model(str(make_model(family, num_hidden_layers=1)[0]))
    snapshots = draw(ops, base.config)
    nets, plain = Networks(ops, base), Network(ops, base.config, base.placed(ops), exact=True)
    rng, lengths = np.random.default_rng(0), [5, 1, 9, 3]
    texts = [rng.integers(0, base.config.vocab_size, n) for n in lengths]
    wanted = [5, 0, 2, 1]
    batch = pack_for_cache(texts, np.zeros(4, np.int64), np.array([0, 20, 40, 60]), np.array(wanted))
    for together, owners in (
        ([], [-1, -1, -1, -1]),
        (snapshots[:1], [0, 0, 0, 0]),
        (snapshots[1:4], [0, -1, 2, 1]),
        ([snapshots[i] for i in (4, 1, 0, 3)], [0, 1, 2, 3]),
        (snapshots[1:2], [0, 0, 0, 0]),
    ):
        network, rows = nets.of(together, np.array(owners))
        if rows is not None:
            network = replace(network, adapter=ops.array(np.repeat(rows, lengths)))
        arena = Arena(ops, base.config)
        arena.allocate(80)
        found = np.split(ops.to_numpy(sampled_states(network, batch, arena.cache)), np.cumsum(wanted)[:-1])
        for text, owner, states in zip(texts, owners, found, strict=True):
            alone = plain
            if owner >= 0:
                spec = together[owner].spec
                scale = ops.array(np.array([spec.scale], np.float32))
                alone = replace(plain, lora=views(spec, together[owner].flat), scale=scale)
            arena = Arena(ops, base.config)
            arena.allocate(len(text))
            cached = pack_for_cache([text], np.zeros(1, np.int64), np.zeros(1, np.int64))
            expected, _ = hidden_states(alone, cached, arena.cache)
            np.testing.assert_array_equal(states, ops.to_numpy(expected)[len(text) - len(states) :])


def test_what_was_recorded_with_an_adapter_is_right_for_the_next_one():
    base = load_base_model(str(make_model("qwen3-tied")[0]))
    ops = load_backend("kernels", dtype="float32")
    snapshots, nets = draw(ops, base.config), Networks(ops, base)
    one = np.zeros(1, np.int64)
    first, _ = nets.of([snapshots[2]], one)
    assert nets.of([snapshots[2]], one)[0] is first
    whole, _ = nets.of([snapshots[0]], one)  # on more modules
    assert nets.of([snapshots[1]], one)[0] is whole
    assert nets.of([snapshots[2]], one)[0] is whole
    both, rows = nets.of(snapshots[:2], np.array([0, 1]))
    assert sorted(rows) == [0, 1]
    again, other = nets.of([snapshots[1], snapshots[3]], np.array([1, 0]))
    assert again is both
    assert other[1] == rows[1]  # one that is there stays where it is
    assert nets.of([snapshots[3]], one)[0] is not nets.of([snapshots[1]], one)[0]
    assert nets.of([], -1 * one)[0] is nets.of([], -1 * one)[0]


def test_an_adapter_is_not_kept_and_its_slot_holds_the_next_one():
    base = load_base_model(str(make_model("qwen3-tied")[0]))
    ops = load_backend("kernels", dtype="float32")
    nets, alone = Networks(ops, base), np.zeros(1, np.int64)
    nets.of([draw(ops, base.config)[2]], alone)  # of the highest rank, but on fewer modules
    first = draw(ops, base.config)[0]
    network, _ = nets.of([first], alone)
    gone = weakref.ref(first)
    del first
    assert gone() is None
    for one in draw(ops, base.config):
        assert nets.of([one], alone)[0] is network
        own, lora = one.spec.rank, views(one.spec, one.flat)
        for name in (f"model.layers.{i}.mlp.down_proj" for i in range(base.config.num_hidden_layers)):
            a, b = (ops.to_numpy(x[0]) for x in network.lora[name])
            expected = [ops.to_numpy(x[0]) for x in lora[name]] if name in lora else [0, 0]
            np.testing.assert_array_equal(a[:own], expected[0])
            np.testing.assert_array_equal(b[:, :own], expected[1])
            assert not a[own:].any()
            assert not b[:, own:].any()
        assert network.scale.tolist() == [np.float32(one.spec.scale)]


def test_there_is_room_for_what_came_before_but_not_for_far_more_than_is_needed():
    base = load_base_model(str(make_model("qwen3-tied")[0]))
    ops = load_backend("kernels", dtype="float32")
    nets = Networks(ops, base)
    low = [snapshot(ops, adapter_spec(base.config, 8, True, True, False), seed) for seed in range(9)]
    high = snapshot(ops, adapter_spec(base.config, 256, True, True, False), 9)
    many, _ = nets.of(low, np.arange(9))
    assert len(many.scale) == 16
    assert nets.of(low[:2], np.arange(2))[0] is many
    alone, _ = nets.of([high], np.zeros(1, np.int64))
    assert len(alone.scale) == 1
    assert alone.lora["model.layers.0.mlp.down_proj"][0].shape[1] == 256
    assert nets.of(low[:1], np.zeros(1, np.int64))[0] is alone


def test_where_more_finds_no_room_there_is_what_is_needed(monkeypatch):
    base = load_base_model(str(make_model("qwen3-tied")[0]))
    ops = load_backend("kernels", dtype="float32")
    nets, made = Networks(ops, base), []
    specs = [adapter_spec(base.config, 16, *flags, False) for flags in ((True, False), (False, True))]
    attention, mlp = (snapshot(ops, spec, seed) for seed, spec in enumerate(specs))
    nets.of([attention], np.zeros(1, np.int64))

    def form(base, form):
        made.append(form)
        if len(form.shapes) == 7 * base.config.num_hidden_layers:
            raise ops.OutOfMemory
        return Slots(base, form)

    monkeypatch.setattr(networks, "Slots", form)
    network, _ = nets.of([mlp], np.zeros(1, np.int64))
    assert [len(one.shapes) for one in made] == [
        7 * base.config.num_hidden_layers,
        3 * base.config.num_hidden_layers,
    ]
    assert "model.layers.0.mlp.gate_up_proj" in network.lora
    nets.forget()
    assert nets.of([attention], np.zeros(1, np.int64))[0].lora.keys().isdisjoint(network.lora)


def test_adapters_that_are_gone_make_room_before_those_that_are_there():
    base = load_base_model(str(make_model("qwen3-tied")[0]))
    ops = load_backend("kernels", dtype="float32")
    nets, kept = Networks(ops, base), draw(ops, base.config)
    _, rows = nets.of([kept[0], kept[1]], np.array([0, 1]))
    nets.of([kept[0]], np.zeros(1, np.int64))
    nets.of([kept[1]], np.zeros(1, np.int64))
    kept.pop(1)  # used last, but gone
    nets.of([kept[3]], np.zeros(1, np.int64))
    _, found = nets.of([kept[0], kept[3]], np.array([0, 1]))
    assert found.tolist() == rows.tolist()
