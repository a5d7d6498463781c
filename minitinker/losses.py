"""The losses of the Tinker API: from logprobs to a sum over tokens and its derivative.

lp = logprobs under the model, q = `logprobs` input, A = `advantages`, r = exp(lp - q), lo and hi the
thresholds:

    cross_entropy         -sum w lp                              dlp = -w
    importance_sampling   -sum r A                               dlp = -r A
    ppo                   -sum min(r A, clip(r, lo, hi) A)       dlp = -r A where r A is the smaller, else 0
    cispo                 -sum stopgrad(clip(r, lo, hi)) lp A    dlp = -clip(r, lo, hi) A
    dro                   -sum (lp A - beta/2 (lp - q)^2)        dlp = -(A - beta (lp - q))

importance_sampling is the policy gradient with the sampler's distribution corrected for, ppo is Schulman et
al. 2017 (arXiv:1707.06347, eq. 7), cispo MiniMax-M1 (arXiv:2506.13585, eq. 4), dro Richemond et al. 2024
(arXiv:2405.19107). All are sums, never means: whoever wants a mean divides the weights or advantages.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.errors import BadRequestError
from minitinker.types import Datum

Array = NDArray[np.float64]
Inputs = Mapping[str, Array]
Config = Mapping[str, float]


def cross_entropy(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    return -inputs["weights"] * lp, -inputs["weights"]


def importance_sampling(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    r_a = _ratio(lp, inputs) * inputs["advantages"]
    return -r_a, -r_a


def ppo(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    r, a = _ratio(lp, inputs), inputs["advantages"]
    clipped = np.clip(r, config["clip_low_threshold"], config["clip_high_threshold"]) * a
    return -np.minimum(r * a, clipped), np.where(r * a <= clipped, -r * a, 0)


def cispo(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    r, a = _ratio(lp, inputs), inputs["advantages"]
    clipped = np.clip(r, config["clip_low_threshold"], config["clip_high_threshold"])
    return -clipped * lp * a, -clipped * a


def dro(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    a, beta, log_r = inputs["advantages"], config["beta"], lp - inputs["logprobs"]
    return -(lp * a - beta / 2 * log_r**2), -(a - beta * log_r)


def _ratio(lp: Array, inputs: Inputs) -> Array:
    """r; 1 where the advantage is 0 and nothing depends on it, so that a huge one does no harm there."""
    return np.exp(np.where(inputs["advantages"] == 0, 0, lp - inputs["logprobs"]))


@dataclass(frozen=True)
class Loss:
    """A loss function with what it takes beside `target_tokens`.

    per_token: (logprobs, inputs, config) -> (loss, dloss/dlogprob), all of one shape. inputs: the keys a
    datum must have. defaults: config key -> its default, None if it must be given.
    """

    per_token: Callable[[Array, Inputs, Config], tuple[Array, Array]]
    inputs: tuple[str, ...]
    defaults: dict[str, float | None] = field(default_factory=dict)


_RL = ("logprobs", "advantages")
LOSSES = {
    "cross_entropy": Loss(cross_entropy, ("weights",)),
    "importance_sampling": Loss(importance_sampling, _RL),
    "ppo": Loss(ppo, _RL, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": Loss(cispo, _RL, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": Loss(dro, _RL, {"beta": None}),
}


@dataclass(frozen=True)
class Example:
    """A datum, checked: tokens: (n,) int64, targets: (n, K) int64, inputs: key -> (n, K) float64."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    inputs: dict[str, Array]
    shape: tuple[int, ...]  # of target_tokens as the user gave it: (n,) or (n, K)


def find_loss(name: str, config: Mapping[str, Any] | None) -> tuple[Loss, dict[str, float]]:
    """The loss called `name` and its whole config. Raises BadRequestError naming what is unknown or unfit."""
    if name not in LOSSES:
        raise BadRequestError(f"there is no loss {name!r}; there are: {', '.join(LOSSES)}")
    loss, given = LOSSES[name], dict(config or {})
    for key, value in given.items():
        if key not in loss.defaults:
            known = ", ".join(loss.defaults) or "none"
            raise BadRequestError(f"{name} has no config key {key!r}; its keys are: {known}")
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise BadRequestError(f"{name}: config {key!r} is {value!r}; it must be a finite number")
    whole: dict[str, float] = {}
    for key, default in loss.defaults.items():
        value = given.get(key, default)
        if value is None:
            raise BadRequestError(f"{name} needs the config key {key!r}, a number")
        whole[key] = float(value)
    if "beta" in whole and whole["beta"] < 0:
        raise BadRequestError(f"{name}: config 'beta' is {whole['beta']}; it must be at least 0")
    if "clip_low_threshold" in whole and whole["clip_low_threshold"] > whole["clip_high_threshold"]:
        raise BadRequestError(
            f"{name}: clip_low_threshold is {whole['clip_low_threshold']}, above clip_high_threshold, "
            f"{whole['clip_high_threshold']}; both are ratios around 1"
        )
    return loss, whole


def check_data(data: list[Datum], name: str, vocab_size: int, context: int) -> list[Example]:
    """Every datum as an Example for the loss called `name`.

    Raises BadRequestError, naming the datum and the key, for an empty list, a missing or unknown key, a wrong
    shape or dtype, a number that is not finite, a token outside the vocabulary, a length over the context.
    """
    if not isinstance(data, list | tuple) or len(data) == 0:
        raise BadRequestError(f"data is {data!r}; it must be a list of at least one Datum")
    return [_check_datum(i, datum, name, vocab_size, context) for i, datum in enumerate(data)]


def _check_datum(i: int, datum: Datum, name: str, vocab_size: int, context: int) -> Example:
    if not isinstance(datum, Datum):
        raise BadRequestError(f"data[{i}] is a {type(datum).__name__}; it must be a Datum")
    ids = datum.model_input.to_ints()
    try:
        tokens = np.array(ids, np.int64)
    except OverflowError:
        tokens = np.array(ids, object)  # so that the check below names the token
    tokens = _check_tokens(f"data[{i}].model_input", tokens, vocab_size)
    if not 1 <= len(tokens) <= context:
        raise BadRequestError(f"data[{i}].model_input has {len(tokens)} tokens; it must have 1 to {context}")
    given, wanted = datum.loss_fn_inputs, ("target_tokens", *LOSSES[name].inputs)
    for key in given:
        if key not in wanted:
            raise BadRequestError(f"data[{i}]: {name} takes no input {key!r}; it takes {', '.join(wanted)}")
    for key in wanted:
        if key not in given and key != "weights":
            raise BadRequestError(
                f"data[{i}]: {name} needs the input {key!r}; there is {', '.join(given) or 'none'}"
            )
    arrays = {}
    for key, tensor in given.items():
        where, dtype = f"data[{i}].loss_fn_inputs[{key!r}]", "int64" if key == "target_tokens" else "float32"
        array = tensor.to_numpy()
        if tensor.dtype != dtype and key == "target_tokens":  # whole numbers elsewhere widen exactly
            raise BadRequestError(f"{where} is {tensor.dtype}; it must be {dtype}")
        columns = array.ndim == 2 and array.shape[1] > 0 and name == "cross_entropy"
        if len(array.shape) == 0 or len(array) != len(tokens) or not (array.ndim == 1 or columns):
            right = f"({len(tokens)},)" + (f" or ({len(tokens)}, K)" if name == "cross_entropy" else "")
            raise BadRequestError(f"{where} has shape {array.shape}; model_input's length asks for {right}")
        if array.shape != given["target_tokens"].to_numpy().shape:
            raise BadRequestError(
                f"{where} has shape {array.shape}, target_tokens {given['target_tokens'].to_numpy().shape}; "
                "they must be the same"
            )
        arrays[key] = array
    targets = _check_tokens(
        f"data[{i}].loss_fn_inputs['target_tokens']", arrays.pop("target_tokens"), vocab_size
    )
    if name == "cross_entropy":
        arrays.setdefault("weights", np.ones(targets.shape, np.float32))
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            bad = array[~np.isfinite(array)][0]
            raise BadRequestError(
                f"data[{i}].loss_fn_inputs[{key!r}] holds {bad}; every number must be finite"
            )
    inputs = {key: array.reshape(len(tokens), -1).astype(np.float64) for key, array in arrays.items()}
    return Example(tokens, targets.reshape(len(tokens), -1), inputs, targets.shape)


def _check_tokens(where: str, tokens: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise BadRequestError(
            f"{where} holds the token {outside[0]}; the vocabulary is 0 to {vocab_size - 1}"
        )
    return tokens
