"""The losses of the Tinker API: from logprobs to a sum over tokens and its derivative.

lp = logprobs under the model, q = `logprobs` input, A = `advantages`, r = exp(lp - q), lo and hi the
thresholds:

    cross_entropy         -sum w lp                              dlp = -w
    importance_sampling   -sum r A                               dlp = -r A
    ppo                   -sum min(r A, clip(r, lo, hi) A)       dlp = -r A where r A is the smaller, else 0
    cispo                 -sum stopgrad(clip(r, lo, hi)) lp A    dlp = -clip(r, lo, hi) A
    dro                   -sum (lp A - beta/2 (lp - q)^2)        dlp = -(A - beta (lp - q))
    gspo                  -sum min(s A, clip(s, lo, hi) A)       dlp = -s A where s A is the smaller, else 0

s is one ratio for the whole sequence, that is, for all tokens of a datum: with M the tokens whose
`sequence_ratio_mask` is not 0, usually those that were sampled,

    s = exp(1/|M| sum over M of (lp - q)),    s_t = stopgrad(s) exp(lp_t) / stopgrad(exp(lp_t))

Each token has the value of s and the gradient of its own lp (GSPO-token), so that advantages may differ from token
to token. Where they are equal on M and 0 elsewhere, -sum over M of dlp is also the gradient of -|M| s A, the
sequence's loss, since ds/dlp_t = s / |M|.

importance_sampling is the policy gradient with the sampler's distribution corrected for, ppo is Schulman et
al. 2017 (arXiv:1707.06347, eq. 7), cispo MiniMax-M1 (arXiv:2506.13585, eq. 4), dro Richemond et al. 2024
(arXiv:2405.19107), gspo Zheng et al. 2025 (arXiv:2507.18071, eq. 7 for s, 14 and 17 for GSPO-token). All are
sums, never means: whoever wants a mean divides the weights or advantages.

The thresholds lo and hi come from the config, or from inputs of the same names, token by token. Those of gspo are by
default ppo's, 0.8 and 1.2; s is a mean over a sequence and stays far nearer to 1 than r does, so that these
hardly ever clip: the paper trains with 1 - 3e-4 and 1 + 4e-4 (section 5.1).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from reprlib import repr as shortened
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.conform import argument
from minitinker.errors import BadRequestError
from minitinker.hosted import hosted
from minitinker.types import Datum, ModelInput

Array = NDArray[np.float64]
Inputs = Mapping[str, Array]
Config = Mapping[str, float]


def cross_entropy(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    return -inputs["weights"] * lp, -inputs["weights"]


def importance_sampling(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    r_a = _ratio(lp, inputs) * inputs["advantages"]
    return -r_a, -r_a


def ppo(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    return _clipped_surrogate(_ratio(lp, inputs), inputs)


def cispo(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    a, clipped = inputs["advantages"], _clip(_ratio(lp, inputs), inputs)
    return -clipped * lp * a, -clipped * a


def dro(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    a, beta, log_r = inputs["advantages"], config["beta"], lp - inputs["logprobs"]
    return -(lp * a - beta / 2 * log_r**2), -(a - beta * log_r)


def gspo(lp: Array, inputs: Inputs, config: Config) -> tuple[Array, Array]:
    s = np.exp(np.where(inputs["advantages"] == 0, 0, inputs["sequence_log_ratio"]))
    return _clipped_surrogate(s, inputs)


def sequence_log_ratio(lp: Array, inputs: Inputs) -> Array:
    """log s of one datum, in every place: lp: (n, 1) -> (n, 1). 0 where the mask marks nothing."""
    marked = inputs["sequence_ratio_mask"] != 0
    log_r = np.where(marked, lp - inputs["logprobs"], 0)
    return np.full_like(lp, log_r.sum() / max(1, marked.sum()))


def _clipped_surrogate(r: Array, inputs: Inputs) -> tuple[Array, Array]:
    """-min(r A, clip(r, lo, hi) A), and its derivative by the log of r."""
    a = inputs["advantages"]
    clipped = _clip(r, inputs) * a
    return -np.minimum(r * a, clipped), np.where(r * a <= clipped, -r * a, 0)


def _clip(r: Array, inputs: Inputs) -> Array:
    return np.clip(r, inputs["clip_low_threshold"], inputs["clip_high_threshold"])


def _ratio(lp: Array, inputs: Inputs) -> Array:
    """r; 1 where the advantage is 0 and nothing depends on it, so that a huge one does no harm there."""
    return np.exp(np.where(inputs["advantages"] == 0, 0, lp - inputs["logprobs"]))


@dataclass(frozen=True)
class Loss:
    """A loss function with what it takes beside `target_tokens`.

    per_token: (logprobs, inputs, config) -> (loss, dloss/dlogprob), all of one shape. inputs: the keys that
    per_token reads; a datum must have those that `absent` does not name. absent: key -> what an absent input holds
    in every place, a number or the config key with that number. defaults: config key -> its default, None if it
    must be given.

    per_sequence: for a loss that depends on a whole sequence, a further input by its key and, for one datum,
    (logprobs, inputs) -> its values, which count as constants.
    """

    per_token: Callable[[Array, Inputs, Config], tuple[Array, Array]]
    inputs: tuple[str, ...]
    absent: dict[str, float | str] = field(default_factory=dict)
    defaults: dict[str, float | None] = field(default_factory=dict)
    per_sequence: tuple[str, Callable[[Array, Inputs], Array]] | None = None


_RL = ("logprobs", "advantages")
_CLIPPED = (*_RL, "clip_low_threshold", "clip_high_threshold")
_FROM_CONFIG: dict[str, float | str] = {key: key for key in _CLIPPED[2:]}
_PPO_CLIP: dict[str, float | None] = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
LOSSES = {
    "cross_entropy": Loss(cross_entropy, ("weights",), {"weights": 1.0}),
    "importance_sampling": Loss(importance_sampling, _RL),
    "ppo": Loss(ppo, _CLIPPED, _FROM_CONFIG, _PPO_CLIP),
    "cispo": Loss(cispo, _CLIPPED, _FROM_CONFIG, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": Loss(dro, _RL, defaults={"beta": None}),
    "gspo": Loss(
        gspo,
        (*_CLIPPED, "sequence_ratio_mask"),
        _FROM_CONFIG,
        _PPO_CLIP,
        ("sequence_log_ratio", sequence_log_ratio),
    ),
}
_ELSEWHERE = {
    "stable_reinforce": "nothing records the stability information of samples that it weighs tokens by; "
    "importance_sampling and ppo need none",
    "custom": "forward_backward_custom runs the LossHandle that create_custom_loss made",
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
    argument(str, name, "loss_fn")
    argument(dict[str, Any] | None, config, "loss_fn_config")
    if name in _ELSEWHERE:
        raise hosted(f"the loss {name!r}", _ELSEWHERE[name])
    if name not in LOSSES:
        raise BadRequestError(f"there is no loss {name!r:.80}; there are: {', '.join(LOSSES)}")
    loss, given = LOSSES[name], dict(config or {})
    for key, value in given.items():
        if key not in loss.defaults:
            known = ", ".join(loss.defaults) or "none"
            raise BadRequestError(f"{name} has no config key {key!r:.80}; its keys are: {known}")
        if not _is_finite(value):
            raise BadRequestError(f"{name}: config {key!r} is {value!r:.80}; it must be a finite number")
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


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a number that no float holds
        return False


def check_data(data: list[Datum], name: str, config: Config, vocab_size: int, context: int) -> list[Example]:
    """Every datum as an Example for the loss called `name` with its whole config.

    Raises BadRequestError, naming the datum and the key, for an empty list, a missing or unknown key, a wrong
    shape or dtype, a number that is not finite, a token outside the vocabulary, a length over the context.
    """
    if not isinstance(data, list | tuple) or len(data) == 0:
        raise BadRequestError(f"data is {shortened(data)}; it must be a list of at least one Datum")
    return [
        _check_datum(f"data[{i}]", datum, name, config, vocab_size, context) for i, datum in enumerate(data)
    ]


def _check_datum(
    which: str, datum: Datum, name: str, config: Config, vocab_size: int, context: int
) -> Example:
    if not isinstance(datum, Datum):
        raise BadRequestError(f"{which} is a {type(datum).__name__}; it must be a Datum")
    tokens = _check_text(f"{which}.model_input", datum.model_input, vocab_size, context)
    loss, given = LOSSES[name], datum.loss_fn_inputs
    wanted = ("target_tokens", *loss.inputs)
    for key in given:
        if key not in wanted:
            raise BadRequestError(f"{which}: {name} takes no input {key!r:.80}; it takes {', '.join(wanted)}")
    for key in wanted:
        if key not in given and key not in loss.absent:
            raise BadRequestError(
                f"{which}: {name} needs the input {key!r}; there is {', '.join(given) or 'none'}"
            )
    arrays = {}
    for key, tensor in given.items():
        where, dtype = f"{which}.loss_fn_inputs[{key!r}]", "int64" if key == "target_tokens" else "float32"
        if tensor.dtype != dtype and key == "target_tokens":  # whole numbers elsewhere widen exactly
            raise BadRequestError(f"{where} is {tensor.dtype}; it must be {dtype}")
        shape, wanted_shape = tuple(tensor.shape), tuple(given["target_tokens"].shape)
        many = len(shape) == 2 and 1 <= shape[1] <= vocab_size and name == "cross_entropy"
        if shape[:1] != (len(tokens),) or not (len(shape) == 1 or many):
            right = f"({len(tokens)},)"
            right += f" or ({len(tokens)}, K), K up to {vocab_size}" if name == "cross_entropy" else ""
            raise BadRequestError(f"{where} has shape {shape}; model_input's length asks for {right}")
        if shape != wanted_shape:
            raise BadRequestError(
                f"{where} has shape {shape}, target_tokens {wanted_shape}; they must be the same"
            )
        array = tensor.to_numpy()
        if not np.isfinite(array).all():
            bad = array[~np.isfinite(array)][0]
            raise BadRequestError(f"{where} holds {bad}; every number must be finite")
        arrays[key] = array
    targets = _check_tokens(
        f"{which}.loss_fn_inputs['target_tokens']", arrays.pop("target_tokens"), vocab_size
    )
    for key, value in loss.absent.items():
        number = config[value] if isinstance(value, str) else value
        arrays.setdefault(key, np.full(targets.shape, number))
    inputs = {key: array.reshape(len(tokens), -1).astype(np.float64) for key, array in arrays.items()}
    _check_together(which, name, inputs)
    return Example(tokens, targets.reshape(len(tokens), -1), inputs, targets.shape)


def _check_together(which: str, name: str, inputs: Inputs) -> None:
    """What must hold between the inputs of a datum."""
    if "clip_low_threshold" in inputs:
        low, high = (inputs[f"clip_{end}_threshold"].astype(np.float32) for end in ("low", "high"))
        if (low > high).any():
            i = int((low > high)[:, 0].argmax())
            raise BadRequestError(
                f"{which}: {name}: clip_low_threshold is {low[i, 0]!s} at token {i}, above clip_high_threshold, "
                f"{high[i, 0]!s}; both are ratios around 1"
            )
    mask = inputs.get("sequence_ratio_mask")
    if mask is not None and not mask.any() and inputs["advantages"].any():
        raise BadRequestError(
            f"{which}.loss_fn_inputs['sequence_ratio_mask'] is 0 everywhere; mark the tokens that were sampled with 1"
        )


def _check_text(where: str, model_input: ModelInput, vocab_size: int, context: int) -> NDArray[np.int64]:
    try:
        tokens = np.array(model_input.to_ints(), np.int64)
    except OverflowError:
        tokens = np.array(model_input.to_ints(), object)  # so that the check below names the token
    except BadRequestError as error:
        raise BadRequestError(f"{where}.{error}") from None
    tokens = _check_tokens(where, tokens, vocab_size)
    if not 1 <= len(tokens) <= context:
        raise BadRequestError(f"{where} has {len(tokens)} tokens; it must have 1 to {context}")
    return tokens


def _check_tokens(where: str, tokens: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise BadRequestError(
            f"{where} holds the token {outside[0]}; the vocabulary is 0 to {vocab_size - 1}"
        )
    return tokens
