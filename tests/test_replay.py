"""replay.py: a function that is asked for again and again gives what it gives when it is called."""

import gc
import weakref

import numpy as np
import pytest
import torch
from minitinker.kernels.replay import SETS, round_number
from op_checks import every_backend

from minitinker import kernels

WEIGHT = np.random.default_rng(0).standard_normal((24, 16), np.float32)
compiled = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def double_rows(ops, w, calls):
    """rows -> (rows W^T, twice the rows), and how often it was called as it is."""

    def function(x, factor):
        calls.append(len(x))
        y, _ = ops.lora_linear_forward(x, w, None, None, None, None, None)
        return y, x * factor[:, None]

    return function


@every_backend
@pytest.mark.parametrize("counts", [[1] * 4, [5, 6, 5, 6, 5, 6, 7, 3, 3, 3, 130, 129, 131]], ids=str)
def test_each_call_gives_what_the_function_gives(ops, counts):
    w, replays, rng, calls = ops.array(WEIGHT), ops.Replays(), np.random.default_rng(0), []
    function = double_rows(ops, w, calls)
    for count in counts:
        x, factor = rng.standard_normal((count, 16), np.float32), np.full(count, 2.0)
        found = [ops.to_numpy(y) for y in replays([w], function, x, factor)]
        expected = [ops.to_numpy(y) for y in function(ops.array(x), ops.array(factor))]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@compiled
def test_a_number_of_rows_is_called_twice_and_from_then_on_replayed():
    w, calls = kernels.array(WEIGHT), []
    replays, function = kernels.Replays(), double_rows(kernels, w, calls)
    for count in (9, 12, 10, 11, 12, 13, 13, 13):
        replays([w], function, np.ones((count, 16), np.float32), np.ones(count))
    assert calls == [12, 12, 16, 16]


@compiled
def test_with_other_weights_nothing_recorded_is_used_and_the_old_ones_are_gone():
    w, calls = kernels.array(WEIGHT), []
    replays, x = kernels.Replays(), np.ones((2, 16), np.float32)
    for _ in range(3):
        replays([w], double_rows(kernels, w, calls), x, np.ones(2))
    gone = weakref.ref(w)
    w = kernels.array(2 * WEIGHT)
    gc.collect()
    assert gone() is None
    for _ in range(3):
        y, _ = replays([w], double_rows(kernels, w, calls), x, np.ones(2))
        np.testing.assert_allclose(kernels.to_numpy(y), 2 * x @ WEIGHT.T, rtol=1e-5)
    assert calls == [2] * 4


@compiled
def test_what_was_recorded_with_several_weights_is_used_in_turns():
    weights, calls = [kernels.array(i * WEIGHT) for i in (1, 2)], []
    replays, x = kernels.Replays(), np.ones((2, 16), np.float32)
    for _ in range(3):
        for i, w in enumerate(weights, 1):
            y, _ = replays([w], double_rows(kernels, w, calls), x, np.ones(2))
            np.testing.assert_allclose(kernels.to_numpy(y), i * x @ WEIGHT.T, rtol=1e-5)
    assert calls == [2] * 4


@compiled
def test_what_was_recorded_is_kept_for_some_sets_of_weights_and_not_for_more():
    weights, calls = [kernels.array(i * WEIGHT) for i in range(1, SETS + 2)], []
    replays, x = kernels.Replays(), np.ones((2, 16), np.float32)
    for w in [*weights, weights[0], weights[-1]]:
        replays([w], double_rows(kernels, w, calls), x, np.ones(2))
        replays([w], double_rows(kernels, w, calls), x, np.ones(2))
    assert len(calls) == 2 * (len(weights) + 1)


def test_round_numbers_are_few_and_near():
    found = [round_number(n) for n in range(1, 1025)]
    assert all(n <= rounded <= max(n, 1.5 * n) for n, rounded in enumerate(found, 1))
    assert sorted(set(found)) == [
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
    ]
