"""fused.py: fewer steps, the same states."""

import numpy as np
import pytest
from tiny_models import FAMILIES, make_model

from minitinker import reference
from minitinker.engine.cache import Arena
from minitinker.model.fused import fuse, fused_states
from minitinker.model.packing import pack_for_cache
from minitinker.model.transformer import Network, hidden_states
from minitinker.model.weights import load_base_model


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_what_follows_have_the_states_of_the_plain_network(family):
    base = load_base_model(str(make_model(family)[0]))
    weights = base.placed(reference)
    nets = (
        Network(reference, base.config, weights),
        Network(reference, base.config, fuse(base.config, dict(weights), reference), fused=True),
    )
    arenas = [Arena(reference, base.config) for _ in nets]
    for arena in arenas:
        arena.allocate(64)
    rng, done, regions = np.random.default_rng(0), np.zeros(3, np.int64), np.array([0, 20, 40])
    for lengths in [(5, 1, 9), (1, 3, 1), (1, 1, 1), (1, 1, 1)]:
        batch = pack_for_cache([rng.integers(0, base.config.vocab_size, n) for n in lengths], done, regions)
        expected, _ = hidden_states(nets[0], batch, arenas[0].cache)
        np.testing.assert_allclose(fused_states(nets[1], batch, arenas[1].cache), expected, atol=2e-5)
        done = done + lengths
    for keys, expected in zip(arenas[1].cache.keys, arenas[0].cache.keys, strict=True):
        np.testing.assert_allclose(keys, expected, atol=2e-5)
