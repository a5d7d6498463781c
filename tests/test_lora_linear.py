from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    backward,
    check_against_torch,
    check_central_differences,
    check_close,
    every_backend,
    forward,
    law,
    seeds,
)

from minitinker import kernels

pytestmark = every_backend

OP = "lora_linear"

sizes = {
    "tokens": st.integers(1, 40),
    "d_in": st.integers(1, 12),
    "d_out": st.integers(1, 12),
    "rank": st.integers(1, 16),  # often larger than the layer, where one adapter is merged into the weight
    "bias": st.booleans(),
}
small = sizes | {"tokens": st.integers(1, 12), "d_in": st.integers(1, 4), "d_out": st.integers(1, 4)}
adapters = st.integers(1, 4)


def draw(seed, tokens, d_in, d_out, rank, bias, adapters=1):
    """x, w, bias or None, a, b, scale, in float64."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((tokens, d_in)),
        rng.standard_normal((d_out, d_in)),
        rng.standard_normal(d_out) if bias else None,
        rng.standard_normal((adapters, rank, d_in)),
        rng.standard_normal((adapters, d_out, rank)),
        rng.choice([0.25, 1.0, 2.0], adapters),
    ]


def draw_adapter(seed, tokens, adapters):
    """The adapter of each row, -1 for none; some adapters may have no row."""
    return np.random.default_rng(seed).integers(-1, adapters, tokens)


def torch_lora(adapter):
    """The op for given adapters of the rows (None: adapter 0), row by row, of torch's ops."""

    def lora(x, w, bias, a, b, scale):
        y = torch.nn.functional.linear(x, w, bias)
        if a is None:
            return y
        index = torch.zeros(len(x), dtype=torch.int64) if adapter is None else torch.tensor(adapter)
        has_one, index = (index >= 0)[:, None], index.clamp(min=0)
        u = torch.einsum("ti,tri->tr", x, a[index])
        delta = torch.einsum("tr,tor->to", u, b[index]) * scale[index][:, None]
        return y + torch.where(has_one, delta, 0)

    return lora


@law(4, **small, seed=seeds)
def test_the_backward_is_the_slope_of_the_forward(ops, seed, **shape):
    arrays = draw(seed, **shape)
    check_central_differences(ops, OP, arrays, [None], differentiated=(0, 3, 4), seed=seed)


@law(4, **small, adapters=adapters, seed=seeds)
def test_the_backward_is_the_slope_of_the_forward_for_many_adapters(ops, seed, **shape):
    adapter = draw_adapter(seed, shape["tokens"], shape["adapters"])
    arrays = draw(seed, **shape)
    check_central_differences(ops, OP, arrays, [adapter], differentiated=(0, 3, 4), seed=seed)


@given(**sizes, seed=seeds)
def test_output_and_gradients_are_those_of_torch(ops, seed, **shape):
    arrays = draw(seed, **shape)
    check_against_torch(ops, OP, torch_lora(None), arrays, [None], differentiated=(0, 3, 4), seed=seed)


@given(**sizes, adapters=adapters, seed=seeds)
def test_output_and_gradients_are_those_of_torch_for_many_adapters(ops, seed, **shape):
    adapter = draw_adapter(seed, shape["tokens"], shape["adapters"])
    arrays = draw(seed, **shape)
    check_against_torch(ops, OP, torch_lora(adapter), arrays, [adapter], differentiated=(0, 3, 4), seed=seed)


@settings(max_examples=8)
@given(rank=st.sampled_from([8, 64]), adapters=st.sampled_from([None, 3]), seed=seeds)
def test_float32_is_as_exact_as_torch(ops, rank, adapters, seed):
    arrays = draw(seed, tokens=200, d_in=48, d_out=64, rank=rank, bias=True, adapters=adapters or 1)
    adapter = None if adapters is None else draw_adapter(seed, 200, adapters)
    expected, differentiated = torch_lora(adapter), (0, 3, 4)
    check_against_torch(ops, OP, expected, arrays, [adapter], differentiated, seed=seed, many=True)


@given(
    parts=st.lists(st.sampled_from([1, 8, 21, 64]), min_size=1, max_size=3),
    tokens=st.sampled_from([3, 140]),
    exact=st.booleans(),
    seed=seeds,
)
@settings(max_examples=8)
def test_linears_that_stand_below_each_other_are_those_one_by_one(ops, parts, tokens, exact, seed):
    d_out, rank = sum(parts), 20
    x, w, bias, _, b, scale = (x.astype(np.float32) for x in draw(seed, tokens, 9, d_out, rank, True, 3))
    a = draw(seed, 1, 9, 1, len(parts) * rank, False, 3)[3].astype(np.float32)
    for adapter in (None, draw_adapter(seed, tokens, 3)):
        y, _ = forward(ops, OP, x, w, bias, a, b, scale, adapter, exact, parts)
        for i, end in enumerate(np.cumsum(parts)):
            own, ranks = slice(end - parts[i], end), slice(i * rank, (i + 1) * rank)
            alone = x, w[own], bias[own], a[:, ranks], b[:, own], scale, adapter, exact
            check_close(forward(ops, OP, *alone)[0], y[:, own])
            if ops is kernels:
                np.testing.assert_array_equal(forward(ops, OP, *alone)[0], y[:, own])


@given(rank=st.sampled_from([257, 300, 520]), exact=st.booleans(), seed=seeds)
@settings(max_examples=4)
def test_a_rank_beyond_one_tile_of_the_sum_is_the_same_layer(ops, rank, exact, seed):
    arrays = draw(seed, tokens=6, d_in=9, d_out=12, rank=rank, bias=True, adapters=3)
    adapter = draw_adapter(seed, 6, 3)
    y, _ = forward(ops, OP, *arrays, adapter, exact)
    check_close(y, torch_lora(adapter)(*map(torch.tensor, arrays)).numpy())


@pytest.mark.parametrize("rows", range(35))
def test_few_rows_are_those_of_the_product_whatever_else_is_formed_with_them(ops, rows):
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, 50)), rng.standard_normal((30, 50))
    x[-1:] = np.nan  # is of its own row alone
    y, _ = forward(ops, OP, x, w, None, None, None, None, None)
    assert y.shape == (rows, 30)
    check_close(y[:-1], np.einsum("rd,od->ro", x[:-1], w))


@given(**sizes, seed=seeds)
def test_without_an_adapter_it_is_a_linear_layer(ops, seed, **shape):
    x, w, bias, *_ = draw(seed, **shape)
    arrays = [x, w, bias, None, None, None]
    y, saved = forward(ops, OP, *arrays, None)
    assert backward(ops, OP, y, saved)[1:] == (None, None)
    expected = torch_lora(None)(*(None if array is None else torch.tensor(array) for array in arrays))
    check_close(y, expected.numpy())
    check_close(backward(ops, OP, y, saved)[0], y @ w)


@law(
    4,
    tokens=st.integers(0, 40),
    d_in=st.sampled_from([1, 7, 450, 900]),
    d_out=st.sampled_from([64, 65, 128]),
    rank=st.integers(1, 16),
    bias=st.booleans(),
    adapters=adapters,
    seed=seeds,
)
def test_a_weight_laid_out_for_sampling_is_the_same_linear_layer(ops, seed, **shape):
    x, w, *others = draw(seed, **shape)
    adapter = draw_adapter(seed, shape["tokens"], shape["adapters"])
    panels = ops.to_numpy(ops.lora_panels(ops.array(w)))
    for options in ([*others, adapter], [others[0], None, None, None, None]):
        expected, _ = forward(ops, OP, x, w, *options)
        check_close(forward(ops, OP, x, panels, *options)[0], expected)


@law(4, **sizes, adapters=adapters, seed=seeds)
def test_a_row_in_a_batch_of_many_adapters_equals_the_row_alone_with_its_own(ops, seed, **shape):
    arrays = draw(seed, **shape)
    x, w, bias, a, b, scale = arrays
    adapter = draw_adapter(seed, shape["tokens"], shape["adapters"])
    dy = np.random.default_rng(seed + 1).standard_normal((len(x), len(w)))
    y, saved = forward(ops, OP, *arrays, adapter)
    dx, da, db = backward(ops, OP, dy, saved)
    da_sum, db_sum = np.zeros_like(a), np.zeros_like(b)
    for row, i in enumerate(adapter):
        alone = slice(row, row + 1)
        own = [a[i : i + 1], b[i : i + 1], scale[i : i + 1]] if i >= 0 else [None, None, None]
        y_alone, saved = forward(ops, OP, x[alone], w, bias, *own, None)
        dx_alone, da_alone, db_alone = backward(ops, OP, dy[alone], saved)
        check_close(y_alone, y[alone])
        check_close(dx_alone, dx[alone])
        if i >= 0:
            da_sum[i] += da_alone[0]
            db_sum[i] += db_alone[0]
    check_close(da, da_sum)
    check_close(db, db_sum)


@given(**sizes, adapters=adapters, seed=seeds)
def test_without_an_index_every_row_has_adapter_0(ops, seed, **shape):
    arrays = draw(seed, **shape)
    y, saved = forward(ops, OP, *arrays, None)
    y_indexed, saved_indexed = forward(ops, OP, *arrays, np.zeros(len(y), np.int64))
    check_close(y, y_indexed)
    dx, da, db = backward(ops, OP, y, saved)
    for gradient, indexed in zip((dx, da, db), backward(ops, OP, y, saved_indexed), strict=True):
        check_close(gradient, indexed)
    assert not da[1:].any()
    assert not db[1:].any()


@given(**sizes, adapters=adapters, seed=seeds)
def test_an_adapter_whose_b_is_zero_changes_nothing(ops, seed, **shape):
    x, w, bias, a, b, scale = draw(seed, **shape)
    adapter = draw_adapter(seed, len(x), len(a))
    y, _ = forward(ops, OP, x, w, bias, a, np.zeros_like(b), scale, adapter)
    check_close(y, forward(ops, OP, x, w, bias, None, None, None, None)[0])


def with_two_forms(ops):
    """The op's module where the backend chooses between a merged and a factored form."""
    module = import_module(f"{ops.__name__}.{OP}")
    if not hasattr(module, "_merging_pays"):
        pytest.skip("this backend has one form")
    return module


@given(**sizes, seed=seeds)
def test_the_merged_and_the_factored_forms_are_the_same_function(ops, seed, **shape):
    module = with_two_forms(ops)
    arrays = draw(seed, **shape)
    answers = []
    for merges, through_dw in ((False, False), (True, False), (True, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_merging_pays", lambda *_, pays=merges: pays)
            patch.setattr(module, "_dw_pays", lambda *_, pays=through_dw: pays)
            y, saved = forward(ops, OP, *arrays, None)
            answers.append([y, *backward(ops, OP, np.cos(y), saved)])
    for factored, *merged in zip(*answers, strict=True):
        for other in merged:
            check_close(other, factored)


@settings(max_examples=200)
@given(
    tokens=st.integers(1, 3000), rank=st.integers(1, 128), d_in=st.integers(1, 600), d_out=st.integers(1, 600)
)
def test_the_form_that_is_taken_costs_the_fewest_multiplications(ops, tokens, rank, d_in, d_out):
    module = with_two_forms(ops)
    a, b = np.zeros((1, rank, d_in)), np.zeros((1, d_out, rank))
    through_the_adapter = (
        rank * tokens * (d_in + d_out)
    )  # x A^T and its product with B^T, or dy B and its with A
    assert module._merging_pays(tokens, a, b) == (rank * d_out * d_in < through_the_adapter)
    thin = tokens * d_out * rank + rank * tokens * d_in + tokens * d_in * rank + d_out * tokens * rank
    through_dw = d_out * tokens * d_in + rank * d_out * d_in + d_out * d_in * rank
    assert module._dw_pays(tokens, a, b) == (through_dw < thin)
