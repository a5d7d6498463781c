"""engine/fitting.py: how many tokens go through the layers at once, and when activations are formed again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_model

from minitinker import reference
from minitinker.engine.fitting import Footprint, check_room, footprint, itemsize, out_of_memory, plan_passes
from minitinker.errors import APIError
from minitinker.model.adapter import adapter_spec, views
from minitinker.model.config import read_config
from minitinker.model.packing import pack
from minitinker.model.transformer import Network, hidden_states
from minitinker.model.weights import load_base_model

NEEDS = Footprint(kept=100, recomputed=10, fixed=50)


def plan(lengths, free, most=1000, width=1, recompute=None):
    groups, again = plan_passes(lengths, NEEDS, free, most, width, recompute)
    return [list(group) for group in groups], again


def test_what_fits_goes_at_once_and_is_kept():
    assert plan([30, 20], free=50 + 50 * 100) == ([[0, 1]], False)


def test_what_does_not_fit_is_formed_again():
    assert plan([30, 20], free=49 + 50 * 100) == ([[0, 1]], True)


def test_what_does_not_fit_even_then_goes_in_parts():
    assert plan([30, 20], free=50 + 30 * 10) == ([[0], [1]], True)


def test_a_sequence_is_never_cut():
    assert plan([30], free=51) == ([[0]], True)


def test_a_system_that_does_not_tell_its_free_memory_has_enough():
    assert plan([30, 20], free=None) == ([[0, 1]], False)


@pytest.mark.parametrize("free", [None, 1, 10**9])
def test_the_parameter_decides_whatever_is_free(free):
    assert plan([30, 20], free, recompute=True)[1] is True
    assert plan([30, 20], free, recompute=False)[1] is False


def test_work_that_is_done_side_by_side_has_to_fit_together():
    assert plan([10] * 4, free=50 + 40 * 100, width=2) == ([[0, 1], [2, 3]], False)
    assert plan([10] * 4, free=49 + 40 * 100, width=2) == ([[0, 1], [2, 3]], True)


@settings(derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    free=st.integers(0, 10_000),
    most=st.integers(1, 200),
    width=st.integers(1, 3),
)
def test_every_sequence_goes_through_once_in_order_and_only_one_alone_exceeds_what_fits(
    lengths, free, most, width
):
    groups, again = plan(lengths, free, most, width)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in group) for group in groups]
    assert max(tokens) <= most + max(lengths)
    fitting = NEEDS.tokens(free, again) // width
    if width * max(tokens) > NEEDS.tokens(
        free, again
    ):  # something does not fit: then only because it is whole
        assert all(n <= fitting or len(group) == 1 for n, group in zip(tokens, groups, strict=True))


def test_the_footprint_of_an_8b_model_tells_when_16k_tokens_fit(tmp_path):
    """Qwen3-8B at rank 32 in bfloat16: 16,384 tokens fit a GPU of 141 GB beside 16 GB of weights, and one of 80 GB
    only when activations are formed again."""
    config = read_config(make_model("qwen3")[0])
    shape = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    }
    config = type(config)(**(vars(config) | shape))
    needs = footprint(config, adapter_spec(config, 32, True, True, False), "bfloat16", 1 << 30)
    for gigabytes, again in ((141, False), (80, True)):
        groups, recompute = plan_passes([1024] * 16, needs, (gigabytes - 17) * 10**9, 16_384, 1, None)
        assert (len(groups), recompute) == (1, again)


def arrays_in(saved, found):
    """Every array that `saved` holds, however deep, once each: id -> bytes."""
    if isinstance(saved, np.ndarray):
        whole = saved if saved.base is None else saved.base
        found[id(whole)] = whole.nbytes
    elif isinstance(saved, tuple | list):
        for part in saved:
            arrays_in(part, found)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_footprint_is_what_the_forward_keeps_and_a_little_more(family):
    base, layers, tokens = load_base_model(str(make_model(family, num_hidden_layers=6)[0])), 6, 100
    spec = adapter_spec(base.config, 4, True, True, False)
    flat = np.ones(spec.size, np.float32)
    net = Network(reference, base.config, base.placed(reference), views(spec, flat), np.ones(1, np.float32))
    frozen = arrays_in([flat, list(net.weights.values())], {})
    kept = {}
    for recompute in (False, True):
        _, (saved, *_) = hidden_states(net, pack([np.arange(25)] * 4), keep=True, recompute=recompute)
        kept[recompute] = sum(size for one, size in arrays_in(saved, {}).items() if one not in frozen)
    needs = footprint(base.config, spec, "float32", 0)
    at_work = 2 * kept[False] / layers  # about: a layer at a time, and its gradients
    assert kept[False] <= tokens * needs.kept <= 1.5 * (kept[False] + at_work)
    assert kept[True] <= tokens * needs.recomputed <= 1.5 * (kept[True] + at_work)


def test_float32_takes_twice_what_bfloat16_takes():
    config = read_config(make_model("qwen3")[0])
    spec = adapter_spec(config, 8, True, True, True)
    wide, narrow = (footprint(config, spec, dtype, 0) for dtype in ("float32", "bfloat16"))
    assert itemsize("float32") == 2 * itemsize("bfloat16") == np.dtype(np.float32).itemsize
    assert wide.kept == pytest.approx(2 * narrow.kept, abs=1)
    assert wide.recomputed == pytest.approx(2 * narrow.recomputed, abs=1)


def test_the_error_says_what_was_tried_and_what_would_have_fitted():
    error = out_of_memory("a pass", "cuda:0", "about 7 tokens would have", 2_500_000_000)
    assert isinstance(error, APIError)
    said = "out of memory on cuda:0: a pass did not fit, where 2.5 GB are free; about 7 tokens would have"
    assert said in str(error)


def test_an_adapter_that_does_not_fit_is_refused_before_it_is_made():
    spec = adapter_spec(read_config(make_model()[0]), 1 << 20, True, True, True)
    needed = 16 * spec.size  # weights, gradient and two moments
    check_room(spec, "cpu", needed)
    check_room(spec, "cpu", None)
    with pytest.raises(
        APIError, match=r"out of memory on cpu: an adapter of rank 1048576, .* a smaller rank may"
    ):
        check_room(spec, "cpu", needed - 1)
