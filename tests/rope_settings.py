"""Settings of RoPE that models have, and transformers' answer to them, for the tests of several files."""

from dataclasses import asdict

import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minitinker.model.config import Llama3Scaling


def transformers_rope(head_dim, theta, llama3):
    """The rotary embedding of transformers' Llama."""
    scaling = None
    if llama3 is not None:
        scaling = {"rope_type": "llama3", **asdict(llama3)}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=100_000,
            rope_theta=theta,
            rope_scaling=scaling,
        )
    )


settings_of_models = pytest.mark.parametrize(
    ("head_dim", "theta", "llama3"),
    [
        (64, 10_000.0, None),
        (128, 1_000_000.0, None),
        (2, 10_000.0, None),
        (64, 500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        (128, 500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        (32, 10_000.0, Llama3Scaling(4.0, 2.0, 3.0, 128)),
    ],
)
