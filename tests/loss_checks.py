"""What the tests of the losses share: their formulas in torch, and how they are evaluated."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from minitinker.losses import LOSSES

VOCAB, CONTEXT = 11, 8
FIXED = settings(derandomize=True, deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 8), st.integers(1, 3))


def gspo(lp, x, c):
    """As the API's document writes it: the sequence's ratio, with the gradient of each token's own logprob."""
    log_ratio = (lp.detach() - x["logprobs"])[x["sequence_ratio_mask"] != 0].mean()
    s = torch.exp(log_ratio + lp - lp.detach())
    clipped = s.clamp(x["clip_low_threshold"], x["clip_high_threshold"])
    return -torch.minimum(s * x["advantages"], clipped * x["advantages"])


# The table of the API's document, in torch, for autograd to differentiate.
IN_TORCH = {
    "cross_entropy": lambda lp, x, c: -(x["weights"] * lp),
    "importance_sampling": lambda lp, x, c: -(torch.exp(lp - x["logprobs"]) * x["advantages"]),
    "ppo": lambda lp, x, c: (
        -torch.minimum(
            torch.exp(lp - x["logprobs"]) * x["advantages"],
            torch.exp(lp - x["logprobs"]).clamp(x["clip_low_threshold"], x["clip_high_threshold"])
            * x["advantages"],
        )
    ),
    "cispo": lambda lp, x, c: (
        -(
            torch.exp(lp - x["logprobs"]).clamp(x["clip_low_threshold"], x["clip_high_threshold"]).detach()
            * lp
            * x["advantages"]
        )
    ),
    "dro": lambda lp, x, c: -(lp * x["advantages"] - c["beta"] / 2 * (lp - x["logprobs"]) ** 2),
    "gspo": gspo,
}
CONFIGS = {"dro": {"beta": 0.3}}


def numbers(name, shape, seed, apart=1.0):
    """Logprobs and inputs of a loss; `apart` is how far lp and q are from each other."""
    rng = np.random.default_rng(seed)
    lp = -np.abs(rng.normal(3, 2, shape))
    drawn = {
        "weights": rng.standard_normal(shape),
        "logprobs": lp + apart * rng.standard_normal(shape),
        "advantages": rng.standard_normal(shape),
        "sequence_ratio_mask": np.where(np.arange(shape[0]) > 0, rng.integers(0, 2, shape[0]), 1)[:, None]
        * np.ones(shape),
    }
    return lp, {key: drawn[key] for key in LOSSES[name].inputs if key in drawn}


def evaluated(name, lp, inputs, config):
    """The loss and its derivative, with the thresholds of the config where there are none among the inputs."""
    inputs = {key: np.full(lp.shape, config[key]) for key in config if key in LOSSES[name].inputs} | inputs
    if LOSSES[name].per_sequence:
        key, values = LOSSES[name].per_sequence
        inputs[key] = values(lp, inputs)
    return *LOSSES[name].per_token(lp, inputs, config), inputs


def check_against_autograd(name, lp, inputs, config):
    loss, dlp, inputs = evaluated(name, lp, inputs, config)
    leaf = torch.tensor(lp, requires_grad=True)
    theirs = IN_TORCH[name](leaf, {key: torch.tensor(x) for key, x in inputs.items()}, config)
    (gradient,) = torch.autograd.grad(theirs.sum(), leaf)
    np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dlp, gradient.numpy(), rtol=1e-12, atol=1e-14)
