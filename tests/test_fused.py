"""fused.py: fewer steps, the same states."""

import numpy as np
import pytest
from tiny_models import FAMILIES, make_model

from minitinker import reference
from minitinker.engine.cache import Arena
from minitinker.model.fused import fuse, sampled_states
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
    for lengths, wanted in [
        ((5, 1, 9), (1, 1, 1)),
        ((4, 3, 1), (0, 0, 0)),
        ((1, 3, 2), (0, 2, 2)),
        ((1, 1, 1), None),
        ((2, 1, 2), (2, 1, 2)),
    ]:
        texts = [rng.integers(0, base.config.vocab_size, n) for n in lengths]
        expected, _ = hidden_states(nets[0], pack_for_cache(texts, done, regions), arenas[0].cache)
        last = lengths if wanted is None else wanted
        rows = np.concatenate(
            [np.arange(end - n, end) for end, n in zip(np.cumsum(lengths), last, strict=True)]
        )
        batch = pack_for_cache(texts, done, regions, None if wanted is None else np.array(wanted))
        for net, arena in zip(nets, arenas, strict=True):
            np.testing.assert_allclose(sampled_states(net, batch, arena.cache), expected[rows], atol=2e-5)
        done = done + lengths
    for keys, expected in zip(arenas[1].cache.keys, arenas[0].cache.keys, strict=True):
        np.testing.assert_allclose(keys, expected, atol=2e-5)
