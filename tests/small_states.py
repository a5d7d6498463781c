"""A small state to save, and what many tests of storage need.

Other test files import this one by name: `from small_states import state, holds`.
"""

import os
from pathlib import Path

import numpy as np
from random_models import random_flat

from minitinker.engine.checkpoints import CheckpointStore, SavedState
from minitinker.model.adapter import AdapterSpec

SPEC = AdapterSpec(2, {"model.layers.0.self_attn.q_proj": (6, 4), "lm_head": (10, 4)})
PATH = "tinker://run/weights/a"


def state(seed: int = 0, **fields: object) -> SavedState:
    flat, m, v = (random_flat(SPEC, 3 * seed + i) for i in range(3))
    return SavedState(SPEC, flat, **({"base_model": "owner/name", "step": seed, "m": m, "v": v} | fields))


def holds(store: CheckpointStore, path: str, seed: int) -> bool:
    """Whether the checkpoint is whole and is state(seed)."""
    found, wanted = store.load(path), state(seed)
    pairs = ((found.flat, wanted.flat), (found.m, wanted.m), (found.v, wanted.v))
    same = [found.step == wanted.step, *(np.array_equal(ours, theirs) for ours, theirs in pairs)]
    assert all(same) == any(same)
    return all(same)


def everything(folder: Path) -> set[Path]:
    """All paths under a folder; links are not followed."""
    return {Path(at, name) for at, folders, names in os.walk(folder) for name in (*folders, *names)}
