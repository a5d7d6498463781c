"""One LoRA adapter in training: its weights, the gradients that add up, Adam's moments.

Everything here runs in the worker's thread, one call after the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitinker.engine.custom_loss import CustomLoss, check_custom, linearised, without_own_inputs
from minitinker.engine.fitting import Footprint, footprint, out_of_memory, plan_passes
from minitinker.errors import APIError, BadRequestError
from minitinker.losses import Config, Example, Loss, check_data, find_loss
from minitinker.model.adapter import AdapterSpec, initial_weights, views
from minitinker.model.packing import pack
from minitinker.model.transformer import (
    Network,
    head_chunks,
    hidden_states,
    hidden_states_backward,
    logits_backward,
    logits_forward,
    target_logprobs,
)
from minitinker.model.weights import BaseModel
from minitinker.types import AdamParams, Datum, ForwardBackwardOutput, TensorData

Array = Any

_LARGE = 1e15  # of a hyperparameter: what a step computes from two of them is finite in float32


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An adapter's weights at one moment, never written to again. flat: (spec.size,), in the ops' DTYPE."""

    spec: AdapterSpec
    flat: Array


class Trainer:
    """Owns the state of one training run. A call that raises leaves that state as it was."""

    def __init__(
        self,
        ops: ModuleType,
        base: BaseModel,
        spec: AdapterSpec,
        seed: int | None,
        recompute: bool | None = None,
    ) -> None:
        """recompute: whether the backward forms activations again; None: where they would or did not fit otherwise."""
        self.ops, self.base, self.spec, self.recompute = ops, base, spec, recompute
        self.flat = ops.array(initial_weights(spec, seed))
        # What the layers compute with: the weights themselves, or, where activations are narrower, a copy.
        self.copy = None if ops.DTYPE == "float32" else ops.array(self.flat, ops.DTYPE)
        self.grad = ops.zeros((spec.size,))
        self.m = ops.zeros((spec.size,))
        self.v = ops.zeros((spec.size,))
        self.step = 0
        self.accumulated = 0  # forward_backward calls since the last optim_step
        self._network = Network(
            ops,
            base.config,
            base.placed(ops),
            views(spec, self._working),
            ops.array(np.array([spec.scale], np.float32)),
        )

    def forward(
        self, data: list[Datum], loss_fn: str, config: Mapping[str, Any] | None
    ) -> ForwardBackwardOutput:
        """Loss and logprobs; touches nothing."""
        return self._run(data, loss_fn, config, None)

    def forward_backward(
        self, data: list[Datum], loss_fn: str, config: Mapping[str, Any] | None
    ) -> ForwardBackwardOutput:
        """Loss and logprobs, and the gradient added to what is there already."""
        grad = self.ops.zeros((self.spec.size,))
        output = self._run(data, loss_fn, config, grad)
        with np.errstate(over="ignore"):
            grad += self.grad
        if not math.isfinite(self.ops.global_norm(grad)):
            raise BadRequestError(f"the gradient is not finite (the loss is {output.loss}); it was not added")
        self.grad = grad
        self.accumulated += 1
        return output

    def forward_backward_custom(self, data: list[Datum], loss_fn: CustomLoss) -> ForwardBackwardOutput:
        """The loss C is the user's: (data, logprobs as torch tensors) -> (loss, metrics).

        By the chain rule its gradient is that of a cross-entropy with weights -dC/dlp, and dC/dlp is torch's. The
        metric "surrogate_loss:sum" is the value of that cross-entropy.
        """
        check_custom(loss_fn)
        before = self.forward(without_own_inputs(data), "cross_entropy", None)
        weighted, loss, metrics = linearised(data, before, loss_fn)
        output = self.forward_backward(weighted, "cross_entropy", None)
        whole = {**metrics, "loss:sum": loss, "surrogate_loss:sum": output.loss}
        return ForwardBackwardOutput(output.loss_fn_output_type, before.loss_fn_outputs, whole)

    def optim_step(self, adam: AdamParams) -> dict[str, float]:
        """One step of AdamW with the gradient that has added up, which is zero afterwards.

        The metric is the gradient's norm before clipping, under the hosted service's name for it.
        """
        _check_adam(adam)
        if self.accumulated == 0:
            raise BadRequestError("optim_step with no gradient; call forward_backward first")
        norm = self.ops.global_norm(self.grad)
        if not math.isfinite(norm):
            raise BadRequestError(f"the gradient's norm is {norm}; the weights were left as they were")
        with np.errstate(over="ignore", invalid="ignore"):  # a step once begun is made on all numbers
            self.ops.adamw_(
                self.flat,
                self.grad,
                self.m,
                self.v,
                self.copy,
                norm,
                self.step + 1,
                adam.learning_rate,
                adam.beta1,
                adam.beta2,
                adam.eps,
                adam.weight_decay,
                adam.grad_clip_norm,
            )
        self.step += 1
        self.grad[...] = 0
        self.accumulated = 0
        return {"unclipped_grad_l2:mean": norm}

    def snapshot(self) -> Snapshot:
        """The weights as they are now."""
        return Snapshot(self.spec, self._working + 0)

    @property
    def _working(self) -> Array:
        return self.flat if self.copy is None else self.copy

    def restore(self, flat: Array, m: Array | None, v: Array | None, step: int) -> None:
        """Put back what a checkpoint holds, with no gradients; without moments the optimizer begins anew."""
        # All are made before any is written, so that memory that runs out changes nothing.
        new_flat, new_m, new_v = (0 if x is None else self.ops.array(x) for x in (flat, m, v))
        self.flat[...] = new_flat
        self._working[...] = self.flat
        self.m[...] = new_m
        self.v[...] = new_v
        self.step = step
        self.grad[...] = 0
        self.accumulated = 0

    def _run(
        self, data: list[Datum], loss_fn: str, config: Mapping[str, Any] | None, grad: Array | None
    ) -> ForwardBackwardOutput:
        """Micro-batches side by side; their gradients are added to `grad` in order, unless it is None."""
        loss, whole_config = find_loss(loss_fn, config)
        model = self.base.config
        examples = check_data(data, loss_fn, whole_config, model.vocab_size, model.max_position_embeddings)

        def attempt(recompute: bool | None) -> tuple[float, list[Array]] | None:
            """None where memory ran out; the failed pass's arrays are gone then."""
            try:
                return self._in_passes(examples, loss, whole_config, grad, recompute)
            except self.ops.OutOfMemory:
                return None

        answer = attempt(self.recompute)
        if answer is None and grad is not None and self.recompute is None:
            grad[...] = 0  # of what the failed pass added
            answer = attempt(True)
        if answer is None:
            raise self._out_of_memory(examples)
        total, logprobs = answer
        if not math.isfinite(total):
            raise BadRequestError(
                f"the loss is {total}; check the inputs of {loss_fn} and the learning rate so far"
            )
        outputs = [
            {"logprobs": TensorData.from_numpy(lp[:, : e.targets.shape[1]].reshape(e.shape))}
            for lp, e in zip(logprobs, examples, strict=True)
        ]
        return ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": total})

    def _in_passes(
        self,
        examples: list[Example],
        loss: Loss,
        config: Config,
        grad: Array | None,
        recompute: bool | None,
    ) -> tuple[float, list[Array]]:
        """Loss and logprobs, and the gradient added to `grad`: as many examples at once as fit."""
        ops, width = self.ops, self.ops.width()
        groups, again = plan_passes(
            [len(example.tokens) for example in examples],
            self._footprint(),
            ops.free_memory(),
            ops.MICRO_BATCH_TOKENS,
            width,
            recompute,
        )
        parts = [examples[group.start : group.stop] for group in groups]

        def run(part: list[Example]) -> tuple[float, list[Array], Array | None]:
            part_grad = None if grad is None else ops.zeros((self.spec.size,))
            return *self._micro_batch(part, loss, config, part_grad, again), part_grad

        total, logprobs = 0.0, []
        for first in range(0, len(parts), width):
            for part_loss, part_logprobs, part_grad in ops.side_by_side(run, parts[first : first + width]):
                total += part_loss
                logprobs += part_logprobs
                if grad is not None:
                    with np.errstate(over="ignore", invalid="ignore"):  # refused by forward_backward
                        grad += part_grad
        return total, logprobs

    def _footprint(self) -> Footprint:
        return footprint(self.base.config, self.spec, self.ops.DTYPE, self.ops.HEAD_BYTES)

    def _out_of_memory(self, examples: list[Example]) -> APIError:
        free = self.ops.free_memory()
        longest = max(len(example.tokens) for example in examples)
        fitting = "a shorter one may"
        if free is not None:
            tokens = self._footprint().tokens(free, recompute=self.recompute is not False)
            if tokens < longest:  # else the estimate is wrong, and best not told
                fitting = f"about {tokens} tokens would have"
        return out_of_memory(f"a pass with a sequence of {longest} tokens", self.ops.DEVICE, fitting, free)

    @np.errstate(over="ignore", invalid="ignore")  # the callers refuse what is not finite
    def _micro_batch(
        self, examples: list[Example], loss: Loss, config: Config, grad: Array | None, recompute: bool
    ) -> tuple[float, list[Array]]:
        """Loss and logprobs of some examples in one pass; adds their gradient to `grad`, unless it is None.

        Every loss is a sum of terms of one token each, so the head goes forward and backward chunk by chunk
        and the logits of a chunk are gone before the next. A loss of whole sequences has the head go forward
        once more before, for what its terms need of all logprobs of a sequence.
        """
        ops, net = self.ops, self._network
        columns = max(e.targets.shape[1] for e in examples)
        targets = np.concatenate([_widen(e.targets, columns) for e in examples])
        inputs = {
            key: np.concatenate([_widen(e.inputs[key], columns) for e in examples]) for key in loss.inputs
        }
        h, saved = hidden_states(
            net, pack([e.tokens for e in examples]), keep=grad is not None, recompute=recompute
        )
        if loss.per_sequence is not None:
            key, values = loss.per_sequence
            first = np.split(target_logprobs(net, h, targets[:, 0]), _ends(examples))
            inputs[key] = np.concatenate(
                [
                    values(lp[:, None].astype(np.float64), e.inputs)
                    for lp, e in zip(first, examples, strict=True)
                ]
            )
        grads = None if grad is None else views(self.spec, grad)
        dh = ops.zeros(h.shape, h.dtype) if grads is not None else h
        logprobs = np.empty(targets.shape, np.float32)

        def head(rows: slice) -> float:
            """The loss of some rows, whose logits are gone when it returns."""
            logits, saved_head = logits_forward(net, h[rows])
            lp, saved_lp = ops.logprob_forward(logits, ops.array(targets[rows]))
            logprobs[rows] = ops.to_numpy(lp)
            terms, dlp = loss.per_token(
                logprobs[rows].astype(np.float64), {key: x[rows] for key, x in inputs.items()}, config
            )
            if grads is not None:
                dlogits = ops.logprob_backward(ops.array(dlp.astype(np.float32)), saved_lp)
                dh[rows] = logits_backward(net, dlogits, saved_head, grads)
            return float(terms.sum())

        total = sum(head(rows) for rows in head_chunks(net, len(h)))
        if grads is not None:
            hidden_states_backward(net, dh, saved, grads)
        return total, np.split(logprobs, _ends(examples))


def _ends(examples: list[Example]) -> NDArray[np.int64]:
    """Where each example but the last ends, laid one behind the other."""
    return np.cumsum([len(e.tokens) for e in examples])[:-1]


def _widen(x: Array, columns: int) -> Array:
    """(n, K) -> (n, columns): more targets, of token 0 and weight 0, to stand with datums of a larger K."""
    return x if x.shape[1] == columns else np.pad(x, ((0, 0), (0, columns - x.shape[1])))


def _check_adam(adam: AdamParams) -> None:
    """Raise BadRequestError naming the field that is out of its range."""
    large = f"at least 0 and below {_LARGE:g}"
    ranges = {
        "learning_rate": (0, _LARGE, large),
        "beta1": (0, 1, "at least 0 and below 1"),
        "beta2": (0, 1, "at least 0 and below 1"),
        "eps": (
            float(np.finfo(np.float32).tiny),
            _LARGE,
            f"a number that float32 holds, above 0 and below {_LARGE:g}",
        ),
        "weight_decay": (0, _LARGE, large),
        "grad_clip_norm": (0, math.inf, "a finite number of at least 0 (0: no clipping)"),
    }
    for name, (least, below, right) in ranges.items():
        value = getattr(adam, name)
        if not least <= value < below:
            raise BadRequestError(f"AdamParams.{name} is {value}; it must be {right}")
