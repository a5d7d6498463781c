import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import TOLERANCE, check_close, check_error, dtypes, every_backend, seeds

pytestmark = every_backend

BLOCKS = 70_000  # more elements than the reference steps at once, twice over


def draw_steps(seed, n, steps):
    """(gradient, hyperparameters) of each step; every hyperparameter changes at every step."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield (
            rng.standard_normal(n) * rng.choice([0.01, 1, 100]),
            {
                "lr": 10 ** rng.uniform(-5, -1),
                "beta1": rng.choice([0.0, rng.uniform(0.5, 0.99)]),
                "beta2": rng.uniform(0.9, 0.999),
                "eps": 10 ** rng.uniform(-12, -3),
                "weight_decay": rng.choice([0.0, rng.uniform(0, 0.5)]),
                "max_norm": rng.choice([0.0, rng.uniform(0.1, 10)]),
            },
        )


def run(ops, param, steps):
    """param, m and v after the steps, and the gradient's norm at each."""
    param, m, v = (ops.array(x) for x in (param.copy(), np.zeros_like(param), np.zeros_like(param)))
    norms = []
    for t, (grad, settings) in enumerate(steps, start=1):
        grad = ops.array(grad.astype(ops.to_numpy(param).dtype))
        norms.append(ops.global_norm(grad))
        assert ops.adamw_(param, grad, m, v, None, norms[-1], t, **settings) is None
    return *(ops.to_numpy(x) for x in (param, m, v)), norms


def run_torch(param, steps):
    """The same with torch's optimizer, clip_grad_norm_ and dtype."""
    tensor = torch.tensor(param, requires_grad=True)
    optimizer = torch.optim.AdamW([tensor])
    norms = []
    for grad, settings in steps:
        tensor.grad = torch.tensor(grad.astype(param.dtype))
        norms.append(float(torch.nn.utils.clip_grad_norm_([tensor], settings["max_norm"] or np.inf)))
        optimizer.param_groups[0].update(
            lr=settings["lr"],
            betas=(settings["beta1"], settings["beta2"]),
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
        )
        optimizer.step()
    state = optimizer.state[tensor]
    return *(x.detach().numpy() for x in (tensor, state["exp_avg"], state["exp_avg_sq"])), norms


@given(n=st.integers(1, 50), count=st.integers(1, 30), seed=seeds)
def test_many_steps_with_changing_hyperparameters_are_those_of_torch(ops, n, count, seed):
    param = np.random.default_rng(seed).standard_normal(n)
    steps = list(draw_steps(seed, n, count))
    *ours, norms = run(ops, param, steps)
    *torchs, torch_norms = run_torch(param, steps)
    for actual, expected in zip(ours, torchs, strict=True):
        assert np.abs(actual - expected).max() <= 1e-11 * np.abs(expected).max()
    np.testing.assert_allclose(norms, torch_norms, rtol=1e-13)


@given(count=st.integers(1, 20), seed=seeds)
def test_float32_is_as_exact_as_torch(ops, count, seed):
    param = np.random.default_rng(seed).standard_normal(1000, np.float32)
    steps = [(grad.astype(np.float32), settings) for grad, settings in draw_steps(seed, 1000, count)]
    ours, torchs = run(ops, param, steps)[:3], run_torch(param, steps)[:3]
    exact = run_torch(param.astype(np.float64), steps)[:3]
    for actual, theirs, expected in zip(ours, torchs, exact, strict=True):
        check_error(actual, theirs, expected)


def test_a_long_buffer_is_stepped_to_its_end(ops):
    param = np.random.default_rng(0).standard_normal(BLOCKS)
    steps = list(draw_steps(1, BLOCKS, 3))
    for actual, expected in zip(run(ops, param, steps)[:3], run_torch(param, steps)[:3], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-14)


@given(n=st.integers(2, 50), cut=st.integers(1, 49), seed=seeds)
def test_parts_stepped_with_the_norm_of_the_whole_equal_the_whole(ops, n, cut, seed):
    rng = np.random.default_rng(seed)
    param, grad = rng.standard_normal((2, n))
    norm = ops.global_norm(ops.array(grad))
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.1, "max_norm": 1.0}

    def step(part):
        buffers = [ops.array(x[part].copy()) for x in (param, grad, np.zeros(n), np.zeros(n))]
        ops.adamw_(*buffers, None, norm, 1, **settings)
        return ops.to_numpy(buffers[0])

    parts = [step(slice(None, cut)), step(slice(cut, None))]
    np.testing.assert_array_equal(np.concatenate(parts), step(slice(None)))


@given(n=st.integers(1, 50), dtype=dtypes, seed=seeds)
def test_the_gradient_is_left_as_it_is(ops, n, dtype, seed):
    (grad, settings), *_ = draw_steps(seed, n, 1)
    kept = grad.astype(dtype)
    grad = ops.array(kept.copy())
    buffers = [ops.array(np.ones(n, dtype)) for _ in range(3)]
    ops.adamw_(buffers[0], grad, *buffers[1:], None, 1e3, 1, **(settings | {"max_norm": 0.1}))
    np.testing.assert_array_equal(ops.to_numpy(grad), kept)


@given(n=st.integers(1, 50), dtype=dtypes, seed=seeds)
def test_a_gradient_of_zeros_moves_nothing_but_by_weight_decay(ops, n, dtype, seed):
    param = np.random.default_rng(seed).standard_normal(n).astype(dtype)
    settings = {"lr": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "max_norm": 1.0}
    still = [(np.zeros(n), settings | {"weight_decay": 0.0})]
    decayed = [(np.zeros(n), settings | {"weight_decay": 0.1})]
    after, m, v, (norm,) = run(ops, param, still)
    assert norm == 0
    assert not m.any()
    assert not v.any()
    np.testing.assert_array_equal(after, param)
    check_close(run(ops, param, decayed)[0], (0.95 * param).astype(dtype))


def test_the_first_step_moves_each_number_by_the_learning_rate_against_its_gradient(ops):
    grad = np.array([3.0, -0.01, 1e-6, -500.0])
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "max_norm": 0.0}
    after = run(ops, np.zeros(4), [(grad, settings)])[0]
    np.testing.assert_allclose(after, -0.1 * np.sign(grad), rtol=1e-5)


@given(n=st.integers(0, 2000), dtype=dtypes, exponent=st.sampled_from([-25, 0, 25]), seed=seeds)
def test_the_global_norm_is_euclids_and_neither_overflows_nor_vanishes(ops, n, dtype, exponent, seed):
    grad = (np.random.default_rng(seed).standard_normal(n) * 10.0**exponent).astype(dtype)
    norm = ops.global_norm(ops.array(grad))
    assert isinstance(norm, float)
    expected = np.linalg.norm(grad.astype(np.float64))
    assert abs(norm - expected) <= TOLERANCE[np.dtype(np.float64)] * expected


def test_a_gradient_within_the_limit_is_not_clipped(ops):
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
    grad = np.array([3.0, 4.0])
    m, m_free, m_clipped = (
        run(ops, np.zeros(2), [(grad, settings | {"max_norm": limit})])[1] for limit in (5.1, 0.0, 2.5)
    )
    np.testing.assert_array_equal(m, m_free)
    np.testing.assert_allclose(m_clipped, m_free / 2, rtol=1e-6)
