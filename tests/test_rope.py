import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    backward,
    check_against_torch,
    check_central_differences,
    check_close,
    dtypes,
    every_backend,
    forward,
    law,
    on,
    seeds,
)
from rope_settings import settings_of_models, transformers_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minitinker.model.frequencies import rope_frequencies

pytestmark = every_backend

shapes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 8).map(lambda half: 2 * half))


def draw(seed, shape):
    """x: (tokens, heads, head_dim), and the table of any angles, float64."""
    rng = np.random.default_rng(seed)
    tokens, _, head_dim = shape
    return rng.standard_normal(shape), *table(rng.uniform(-np.pi, np.pi, (tokens, head_dim // 2)))


def table(angles):
    """cos and sin of angles: (tokens, head_dim / 2), as a table holds them: (tokens, head_dim)."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)


def torch_rope(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, half:], sin[:, None, half:]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


@law(4, shape=shapes, seed=seeds)
def test_the_backward_is_the_slope_of_the_forward(ops, shape, seed):
    check_central_differences(ops, "rope", draw(seed, shape), seed=seed)


@given(shape=shapes, seed=seeds)
def test_output_and_gradient_are_those_of_torch(ops, shape, seed):
    check_against_torch(ops, "rope", torch_rope, draw(seed, shape), seed=seed)


@settings(max_examples=5)
@given(seed=seeds)
def test_float32_is_as_exact_as_torch(ops, seed):
    check_against_torch(ops, "rope", torch_rope, draw(seed, (32, 4, 32)), seed=seed, many=True)


@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_the_backward_undoes_the_forward(ops, shape, dtype, seed):
    x, cos, sin = (array.astype(dtype) for array in draw(seed, shape))
    y, saved = forward(ops, "rope", x, cos, sin)
    check_close(backward(ops, "rope", y, saved)[0], x)


@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_norms_are_preserved(ops, shape, dtype, seed):
    x, cos, sin = (array.astype(dtype) for array in draw(seed, shape))
    y, _ = forward(ops, "rope", x, cos, sin)
    check_close(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1))


@given(shift=st.integers(0, 5000), seed=seeds)
def test_the_product_of_a_query_and_a_key_depends_only_on_how_far_they_are_apart(ops, shift, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 1, 16))
    frequencies = rope_frequencies(16, 10_000.0)

    def product(positions):
        angles = positions[:, None] * frequencies
        y, _ = forward(ops, "rope", x, *table(angles))
        return float((y[0] * y[1]).sum())

    near, far = product(np.array([0, 7])), product(np.array([shift, shift + 7]))
    assert abs(near - far) <= 1e-10 * np.linalg.norm(x[0]) * np.linalg.norm(x[1])


@settings_of_models
def test_table_and_turn_are_those_of_transformers(ops, head_dim, theta, llama3):
    positions = np.array(
        [0, 1, 2, 3, 50, 200, 199]
    )  # small: transformers' angles are float32, in error by position
    rope = transformers_rope(head_dim, theta, llama3)
    x = np.random.default_rng(0).standard_normal((len(positions), 3, head_dim), np.float32)
    cos, sin = ops.rope_table(*on(ops, [positions, rope_frequencies(head_dim, theta, llama3)]))
    y = ops.to_numpy(ops.rope_forward(ops.array(x), cos, sin)[0])
    cos, sin = ops.to_numpy(cos), ops.to_numpy(sin)
    their_cos, their_sin = rope(torch.tensor(x), torch.tensor(positions)[None])
    their_x = torch.tensor(x).transpose(0, 1)[None]
    their_y = apply_rotary_pos_emb(their_x, their_x, their_cos, their_sin)[0][0].transpose(0, 1)
    half = head_dim // 2
    their_sin[..., :half] *= -1
    for ours, theirs in [(cos, their_cos[0]), (sin, their_sin[0]), (y, their_y)]:
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


def test_the_table_is_exact_at_far_positions(ops):
    positions, frequencies = np.array([0, 1, 8191, 131_071]), np.array([1.0, 0.3, 1e-5])
    cos, sin = (ops.to_numpy(x) for x in ops.rope_table(*on(ops, [positions, frequencies])))
    for actual, expected in zip((cos, sin), table(positions[:, None] * frequencies), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=np.finfo(np.float32).eps)
