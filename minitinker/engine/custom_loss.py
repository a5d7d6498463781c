"""A loss of the user's own: differentiated by torch, and handed on as a cross-entropy with the same gradient."""

import math
from collections.abc import Callable, Mapping
from reprlib import repr as shortened
from typing import Any

from minitinker.errors import BadRequestError
from minitinker.types import Datum, ForwardBackwardOutput, TensorData

CustomLoss = Callable[[list[Datum], list[Any]], tuple[Any, Mapping[str, float]]]


def linearised(
    data: list[Datum], before: ForwardBackwardOutput, loss_fn: CustomLoss
) -> tuple[list[Datum], float, dict[str, float]]:
    """The data with the weights -dC/dlp at the logprobs of `before`, the loss C, and the user's metrics.

    Raises BadRequestError for an answer of loss_fn that is not a loss, and a derivative that is not finite.
    """
    import torch

    logprobs = [out["logprobs"].to_torch().requires_grad_() for out in before.loss_fn_outputs]
    loss, metrics = _checked_answer(loss_fn(list(data), list(logprobs)))
    gradients = torch.autograd.grad(loss.sum(), logprobs, allow_unused=True)
    weighted = []
    for i, (datum, lp, g) in enumerate(zip(data, logprobs, gradients, strict=True)):
        weights = torch.zeros_like(lp) if g is None else -g
        if not weights.isfinite().all():
            raise BadRequestError(
                f"the custom loss is {loss.item()}, but its derivative by the logprobs of data[{i}] is not finite"
            )
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets, "weights": TensorData.from_torch(weights)}
        weighted.append(Datum(datum.model_input, inputs))
    return weighted, loss.item(), metrics


def check_custom(loss_fn: object) -> None:
    """Raise BadRequestError unless it can be called."""
    if not callable(loss_fn):
        raise BadRequestError(
            f"loss_fn is {shortened(loss_fn)}; it must be a LossHandle, or a function "
            "(data, logprobs) -> (loss, metrics)"
        )


def without_own_inputs(data: list[Datum]) -> list[Datum]:
    """Data with what the logprobs depend on, and without what is meant for the custom loss alone."""
    if not isinstance(data, list | tuple):
        return data  # for check_data to refuse
    return [
        Datum(d.model_input, {key: x for key, x in d.loss_fn_inputs.items() if key == "target_tokens"})
        if isinstance(d, Datum)
        else d
        for d in data
    ]


def _checked_answer(answer: Any) -> tuple[Any, dict[str, float]]:
    """What a custom loss returned: a tensor of one number with its graph, and metrics as plain floats."""
    import torch

    try:
        loss, given = answer
        metrics = {str(key): _number(value) for key, value in given.items()}
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise BadRequestError(
            f"the custom loss returned {shortened(answer)}; it must return (loss, metrics), a tensor of one "
            "number and a dict of numbers"
        ) from error
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise BadRequestError(
            f"the custom loss returned {shortened(loss)}; it must be a tensor of one number made from the logprobs"
        )
    if not math.isfinite(loss.item()):
        raise BadRequestError(f"the custom loss is {loss.item()}; it must be finite")
    return loss, metrics


def _number(value: Any) -> float:
    """A metric, of Python, NumPy or torch, as a plain float. Raises what float() raises, for text too."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, str | bytes):
        raise TypeError("a metric is text")
    return float(plain)
