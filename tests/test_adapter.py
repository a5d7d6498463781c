"""model/adapter.py: which linears are adapted, where A and B lie, and how they begin."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_model, to_peft

from minitinker.errors import BadRequestError
from minitinker.model.adapter import AdapterSpec, adapter_spec, initial_weights, views
from minitinker.model.config import linear_shapes, read_config

FIXED = settings(derandomize=True, deadline=None, max_examples=30)
PARTS = {
    "train_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "train_mlp": ("gate_proj", "up_proj", "down_proj"),
    "train_unembed": ("lm_head",),
}
specs = st.builds(
    AdapterSpec,
    rank=st.integers(1, 5),
    shapes=st.dictionaries(
        st.sampled_from("abcdefg"), st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1
    ),
)


@pytest.fixture(scope="module")
def config():
    return read_config(make_model("qwen3")[0])


def spec_of(config, rank=8, **flags):
    return adapter_spec(config, rank, **{flag: flags.get(flag, True) for flag in PARTS})


@pytest.mark.parametrize("attn", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("unembed", [True, False])
def test_exactly_the_linears_asked_for_are_adapted(config, attn, mlp, unembed):
    flags = {"train_attn": attn, "train_mlp": mlp, "train_unembed": unembed}
    if not any(flags.values()):
        with pytest.raises(BadRequestError, match="nothing to train"):
            spec_of(config, **flags)
        return
    spec = spec_of(config, **flags)
    wanted = {part for flag, parts in PARTS.items() if flags[flag] for part in parts}
    expected = [name for name in linear_shapes(config) if name.rpartition(".")[2] in wanted]
    assert list(spec.shapes) == expected
    assert all(spec.shapes[name] == linear_shapes(config)[name] for name in expected)
    assert spec.modules == flags


def test_a_tied_head_can_be_adapted_too(config):
    spec = spec_of(replace(config, tie_word_embeddings=True))
    assert spec.shapes["lm_head"] == (config.vocab_size, config.hidden_size)


@pytest.mark.parametrize("rank", [0, -1, 1.0, "8", True, None])
def test_a_rank_that_is_no_positive_whole_number_is_refused(config, rank):
    with pytest.raises(BadRequestError) as caught:
        spec_of(config, rank=rank)
    assert f"rank is {rank!r}" in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 1.5, "a", True])
def test_a_seed_that_is_no_whole_number_is_refused(config, seed):
    with pytest.raises(BadRequestError) as caught:
        initial_weights(spec_of(config), seed)
    assert f"seed is {seed!r}" in str(caught.value)


@pytest.mark.parametrize("rank", [1, 8, 32, 40])
def test_the_scale_is_32_over_the_rank(config, rank):
    assert spec_of(config, rank=rank).scale == 32 / rank


@FIXED
@given(specs)
def test_every_number_of_the_buffer_belongs_to_one_matrix(spec):
    flat = np.arange(spec.size, dtype=np.float32)
    found = []
    for (name, (d_out, d_in)), (at, (a, b)) in zip(
        spec.shapes.items(), views(spec, flat).items(), strict=True
    ):
        assert (name, a.shape, b.shape) == (at, (1, spec.rank, d_in), (1, d_out, spec.rank))
        found += [a.ravel(), b.ravel()]
    np.testing.assert_array_equal(np.concatenate(found), flat)


@FIXED
@given(specs)
def test_what_is_written_to_a_matrix_is_in_the_buffer(spec):
    flat = np.zeros(spec.size, np.float32)
    for a, b in views(spec, flat).values():
        a += 1
        b += 1
    assert (flat == 1).all()


@FIXED
@given(specs, st.integers(0, 2**64))
def test_a_seed_fixes_every_bit_of_the_initial_weights(spec, seed):
    first, again = initial_weights(spec, seed), initial_weights(spec, seed)
    assert first.dtype == np.float32
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != initial_weights(spec, seed + 1).tobytes()


def test_without_a_seed_each_adapter_begins_elsewhere(config):
    spec = spec_of(config)
    assert (initial_weights(spec, None) != initial_weights(spec, None)).any()


def test_the_initial_weights_of_a_seed_stay_what_they_are():
    flat = initial_weights(AdapterSpec(2, {"a": (1, 2)}), 0)
    expected = [-0.6872, -0.3426, -0.0402, -0.5778, 0, 0]
    np.testing.assert_allclose(flat, expected, atol=1e-4)


def test_an_adapter_begins_as_one_of_peft_does():
    folder, model = make_model("qwen3", hidden_size=64, intermediate_size=100)
    spec = spec_of(read_config(folder), rank=32)
    flat = initial_weights(spec, 0)
    peft = to_peft(model, spec, flat)
    for name, (a, b) in views(spec, flat).items():
        module = peft.get_submodule(f"base_model.model.{name}")
        module.reset_lora_parameters("default", init_lora_weights=True)
        theirs = module.lora_A["default"].weight.detach().numpy()
        bound = 1 / np.sqrt(a.shape[-1])
        for x in (a[0], theirs):
            assert np.abs(x).max() <= bound * (1 + 1e-6)
            assert np.abs(x).max() > 0.99 * bound  # of 2048 numbers or more
            assert abs(x.std() / bound - 1 / np.sqrt(3)) < 0.05  # uniform
        assert not b.any()
        assert not module.lora_B["default"].weight.any()
