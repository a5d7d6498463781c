"""What holds of the Triton op beyond the laws of test_adamw.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import COMPILED, TOLERANCE, dtypes, seeds
from poisoned import poisoned

from minitinker import kernels, reference

few = settings(max_examples=20)
lengths = st.sampled_from([1, 2, 127, 2047, 2048, 2049, 4999])  # around the tile of 2048
SETTINGS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.1, "max_norm": 1.0}


def draw(seed, n, dtype=np.float32):
    """param, grad, m, v."""
    rng = np.random.default_rng(seed)
    param, grad, m, v = rng.standard_normal((4, n)).astype(dtype)
    return param, grad, m, v * v


def step(ops, buffers, copy=None, t=3, norm=2.0, **changes):
    """param, m and v after a step; the buffers are left as they are."""
    param, grad, m, v = (ops.array(x.copy()) for x in buffers)
    ops.adamw_(param, grad, m, v, copy, norm, t, **(SETTINGS | changes))
    return [ops.to_numpy(x) for x in (param, m, v)]


@few
@given(n=lengths, scale=st.sampled_from([1e-40, 1e-15, 1.0, 1e15]), dtype=dtypes, seed=seeds)
def test_the_kernel_equals_the_reference(n, scale, dtype, seed):
    param, grad, m, v = draw(seed, n)
    buffers = [x.astype(dtype) for x in (param, grad * scale, m * scale, v * min(scale, 1e10) ** 2)]
    answers = step(kernels, buffers, max_norm=0.0), step(reference, buffers, max_norm=0.0)
    before, gradient, mean, _ = (np.abs(x) for x in buffers)
    terms = before, mean + gradient, 0  # param and m may be what is left of larger terms that cancel
    for actual, expected, size in zip(*answers, terms, strict=True):
        most = TOLERANCE[np.dtype(dtype)] * (np.abs(expected) + size) + 1e-6 * min(scale, 1e-30)
        assert (np.abs(actual - expected) <= most).all()


class Launches(list):
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.append(args)
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """The launches of each kernel."""
    names = [name for name in vars(kernels.adamw) if name.endswith("_kernel")]
    kept = {name: Launches(getattr(kernels.adamw, name)) for name in names}
    for name, recorder in kept.items():
        monkeypatch.setattr(kernels.adamw, name, recorder)
    return kept


@pytest.mark.parametrize("n", [1, 5000, 150_000])
def test_a_step_is_one_launch_and_a_norm_two_whatever_the_size(launches, n):
    buffers = draw(0, n)
    step(kernels, buffers)
    assert {name: len(x) for name, x in launches.items()} == {
        "_step_kernel": 1,
        "_square_kernel": 0,
        "_sum_kernel": 0,
    }
    kernels.global_norm(kernels.array(buffers[1]))
    assert {name: len(x) for name, x in launches.items()} == {
        "_step_kernel": 1,
        "_square_kernel": 1,
        "_sum_kernel": 1,
    }


def test_hyperparameters_that_change_compile_nothing_anew(launches):
    buffers = draw(0, 9)
    step(kernels, buffers)
    step(
        kernels, buffers, t=1, norm=5.0, lr=1.0, beta1=0.0, beta2=0.5, eps=1.0, weight_decay=0.0, max_norm=0.0
    )
    once, again = (
        [arg for arg in args if not isinstance(arg, torch.Tensor)] for args in launches["_step_kernel"]
    )
    assert once == again


@few
@given(n=lengths, seed=seeds)
def test_the_copy_is_the_new_param_rounded(n, seed):
    wide = np.float32 if COMPILED else np.float64
    narrow = "bfloat16" if COMPILED else "float32"  # the interpreter does not round to bfloat16 as a GPU does
    buffers = draw(seed, n, wide)
    copy = kernels.zeros((n,), narrow).fill_(float("nan"))
    param, m, v = step(kernels, buffers, copy)
    np.testing.assert_array_equal(kernels.to_numpy(copy), kernels.to_numpy(kernels.array(param, copy.dtype)))
    for with_copy, without in zip((param, m, v), step(kernels, buffers), strict=True):
        np.testing.assert_array_equal(with_copy, without)


@pytest.mark.parametrize("which", ["param", "m", "v", "copy"])
def test_a_strided_buffer_to_be_written_is_refused_and_nothing_written(which):
    n = 5
    buffers = dict(zip(["param", "grad", "m", "v"], map(kernels.array, draw(0, n)), strict=True))
    buffers["copy"] = kernels.zeros((n,))
    buffers[which] = kernels.zeros((2 * n,))[::2]
    before = [x.clone() for x in buffers.values()]
    with pytest.raises(ValueError, match=f"{which} is written in place and has to be contiguous"):
        kernels.adamw_(**buffers, norm=1.0, step=1, **SETTINGS)
    assert all(map(torch.equal, before, buffers.values()))


@few
@given(n=st.integers(1, 40), seed=seeds)
def test_the_gradient_may_be_strided(n, seed):
    param, grad, m, v = draw(seed, n)
    wide = kernels.array(np.repeat(grad, 2))[::2]
    buffers = [kernels.array(x.copy()) for x in (param, m, v)]
    kernels.adamw_(buffers[0], wide, *buffers[1:], None, 2.0, 3, **SETTINGS)
    for actual, expected in zip(buffers, step(kernels, [param, grad, m, v]), strict=True):
        np.testing.assert_array_equal(kernels.to_numpy(actual), expected)
    assert kernels.global_norm(wide) == kernels.global_norm(kernels.array(grad))


def test_no_numbers_are_a_step_too():
    assert [x.shape for x in step(kernels, draw(0, 0))] == [(0,)] * 3


@pytest.mark.parametrize("n", [0, 1, 65_535, 65_536, 65_537, 200_003])  # around the chunk of 65,536
def test_the_norm_of_a_long_gradient_counts_every_number_once(n):
    grad = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    with poisoned():
        norm = kernels.global_norm(kernels.array(grad))
    np.testing.assert_allclose(norm, reference.global_norm(grad), rtol=1e-13)


def test_a_norm_of_more_chunks_than_are_added_at_once_leaves_none_out(monkeypatch):
    monkeypatch.setattr(kernels.adamw, "CHUNK", 64)
    monkeypatch.setattr(kernels.adamw, "TILE", 16)
    grad = np.random.default_rng(0).standard_normal(5000)  # 79 chunks
    np.testing.assert_allclose(
        kernels.global_norm(kernels.array(grad)), reference.global_norm(grad), rtol=1e-13
    )


@pytest.mark.parametrize(("wrong", "norm"), [(np.nan, np.nan), (np.inf, np.inf), (-np.inf, np.inf)])
def test_a_gradient_that_is_not_finite_has_a_norm_that_is_not(wrong, norm):
    grad = np.zeros(70_000, np.float32)
    grad[-1] = wrong
    np.testing.assert_equal(kernels.global_norm(kernels.array(grad)), norm)
