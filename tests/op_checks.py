"""What the tests of the ops share: the backends, what is drawn, and how exact an answer has to be.

Hypothesis draws shapes and a seed, NumPy the numbers. Every law is a function of `ops`, a backend: arrays
enter it through `ops.array` and leave it through `ops.to_numpy`, and nothing looks at them in between.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitinker import kernels, reference

COMPILED = torch.cuda.is_available()
# What the kernels compute in: the interpreter is wrong in bfloat16.
DTYPES = ["float32", "bfloat16"] if COMPILED else ["float32"]
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES)
in_float64_too = pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
# Inputs of an op that are float32 also where activations are bfloat16: cosines and sines; the adapters' scales; the
# gradient of logprobs.
WIDE = {"rope_forward": (1, 2), "lora_linear_forward": (5,), "logprob_backward": (0,)}

settings.register_profile("ops", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ops")
torch.set_num_threads(1)  # the arrays are small: a second thread would only be waited for

every_backend = pytest.mark.parametrize(
    "ops", [pytest.param(reference, id="reference"), pytest.param(kernels, id="kernels")]
)

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.float32, np.float64])

# Two ways to the same numbers, relative to the largest of the array or to 1: the numbers drawn are about 1.
TOLERANCE = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-5}
# In bfloat16 twice torch's own error is allowed. Of a few numbers all of torch's may be exact by luck: for them half a
# unit of the last place stands for its error.
MANY, HALF_UNIT = 256, 2.0**-8
# The step of central differences and their error, relative in the same way: the error of the formula falls
# with the step squared, that of rounding grows as 1 / step.
STEP, STEP_TOLERANCE = 1e-5, 1e-7


def law(in_interpreter: int, **drawn: Any) -> Callable[[Callable[..., None]], Callable[[ModuleType], None]]:
    """`@given(**drawn)` for a test of `ops`, with only so many examples where each goes through Triton's interpreter,
    which takes milliseconds for a program of a kernel."""

    def decorate(check: Callable[..., None]) -> Callable[[ModuleType], None]:
        def test(ops: ModuleType) -> None:
            few = ops is kernels and not COMPILED

            @settings(max_examples=in_interpreter if few else settings.default.max_examples)
            @given(**drawn)
            def holds(**values: Any) -> None:
                check(ops, **values)

            holds()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def on(
    ops: ModuleType, inputs: Sequence[Any], dtype: str | None = None, wide: Sequence[int] = ()
) -> list[Any]:
    """The inputs with each NumPy array turned into an array of the backend.

    dtype: what floats become, but for the inputs at the places `wide`; None: they stay as they are.
    """
    return [
        ops.array(x, dtype if x.dtype.kind == "f" and i not in wide else None)
        if isinstance(x, np.ndarray)
        else x
        for i, x in enumerate(inputs)
    ]


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as it is in a dtype; that of bfloat16, which NumPy lacks, in float32."""
    return kernels.to_numpy(torch.tensor(x).to(getattr(torch, dtype)))


def forward(ops: ModuleType, op: str, *inputs: Any, dtype: str | None = None) -> tuple[np.ndarray, Any]:
    """What `op_forward` says to the inputs, as a NumPy array, and what its backward needs."""
    name = f"{op}_forward"
    out, saved = getattr(ops, name)(*on(ops, inputs, dtype, WIDE.get(name, ())))
    return ops.to_numpy(out), saved


def backward(
    ops: ModuleType, op: str, dout: np.ndarray, saved: Any, dtype: str | None = None
) -> tuple[np.ndarray, ...]:
    """The gradients that `op_backward` gives, as NumPy arrays; always a tuple."""
    name = f"{op}_backward"
    gradients = getattr(ops, name)(*on(ops, [dout], dtype, WIDE.get(name, ())), saved)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return tuple(None if x is None else ops.to_numpy(x) for x in gradients)


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0))


def check_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal in shape and dtype, and within TOLERANCE in value."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert largest(actual - expected) <= TOLERANCE[expected.dtype] * max(1, largest(expected))


def check_error(actual: np.ndarray, torchs: np.ndarray, exact: np.ndarray, floor: float = 0.0) -> None:
    """The error against `exact`, in float64, is at most twice that of torch in the same dtype, or twice `floor`: the
    root of its mean square, since the largest of a few thousand errors is a matter of luck."""
    assert (actual.shape, actual.dtype) == (torchs.shape, torchs.dtype)
    if exact.size:
        error, torch_error = (np.sqrt(np.square(x - exact).mean()) for x in (actual, torchs))
        assert error <= 2 * max(torch_error, floor)


def check_equals_reference(
    op: str,
    dtype: str,
    torch_op: Callable[..., torch.Tensor],
    arrays: Sequence[np.ndarray | None],
    constants: Sequence[Any] = (),
    differentiated: Sequence[int] = (0,),
    *,
    seed: int,
) -> None:
    """Output and gradients of the kernels are those of the reference: in float32 the same within TOLERANCE, in
    bfloat16 as near to the reference in float64 as `torch_op` in bfloat16 is."""
    arrays = [None if x is None else rounded(x.astype(np.float32), dtype) for x in arrays]
    exact_dtype = "float32" if dtype == "float32" else "float64"
    out, saved = forward(kernels, op, *arrays, *constants, dtype=dtype)
    dout = rounded(np.random.default_rng(seed).standard_normal(out.shape, np.float32), dtype)
    answers = (out, *backward(kernels, op, dout, saved, dtype))
    wide = [None if x is None else x.astype(exact_dtype) for x in (dout, *arrays)]
    out, saved = forward(reference, op, *wide[1:], *constants)
    expected = (out, *backward(reference, op, wide[0], saved))
    if dtype == "float32":
        for actual, wanted in zip(answers, expected, strict=True):
            check_close(actual, wanted)
        return
    torchs = _torch_answers(torch_op, _as_tensors(arrays, dtype), differentiated, dout)
    for actual, theirs, exact in zip(answers, torchs, expected, strict=True):
        relative = HALF_UNIT if exact.size < MANY else TOLERANCE[np.dtype(np.float32)]
        check_error(actual, theirs, exact, floor=relative * max(1, largest(exact)))


def check_central_differences(
    ops: ModuleType,
    op: str,
    arrays: Sequence[np.ndarray | None],
    constants: Sequence[Any] = (),
    differentiated: Sequence[int] = (0,),
    *,
    seed: int,
) -> None:
    """Each gradient of sum(dout * op(arrays, constants)) is what the op itself says when one number is moved.

    arrays: float64, in the order of the op's arguments; differentiated: which of them have a gradient.
    """
    out, saved = forward(ops, op, *arrays, *constants)
    dout = np.random.default_rng(seed).standard_normal(out.shape)
    gradients = backward(ops, op, dout, saved)
    for place, gradient in zip(differentiated, gradients, strict=True):
        slopes = np.zeros_like(gradient)
        for i in np.ndindex(gradient.shape):
            low, high = list(arrays), list(arrays)
            low[place], high[place] = arrays[place].copy(), arrays[place].copy()
            low[place][i] -= STEP
            high[place][i] += STEP
            change = forward(ops, op, *high, *constants)[0] - forward(ops, op, *low, *constants)[0]
            slopes[i] = (change * dout).sum() / (2 * STEP)
        assert gradient.shape == arrays[place].shape
        assert largest(gradient - slopes) <= STEP_TOLERANCE * max(1, largest(slopes))


def check_against_torch(
    ops: ModuleType,
    op: str,
    torch_op: Callable[..., torch.Tensor],
    arrays: Sequence[np.ndarray | None],
    constants: Sequence[Any] = (),
    differentiated: Sequence[int] = (0,),
    *,
    seed: int,
    many: bool = False,
) -> None:
    """Output and gradients equal those of `torch_op(*arrays)` and its autograd, in float64 and in float32.

    many: the arrays have numbers enough to ask, too, that float32, and bfloat16 where the kernels are compiled,
    be as exact as torch.
    """
    arrays = [None if x is None else x.astype(np.float32) for x in arrays]
    wide = [None if x is None else x.astype(np.float64) for x in arrays]
    out, saved = forward(ops, op, *wide, *constants)
    dout = np.random.default_rng(seed).standard_normal(out.shape, np.float32)
    exact = _torch_answers(torch_op, wide, differentiated, dout.astype(np.float64))
    answers = (out, *backward(ops, op, dout.astype(np.float64), saved))
    for actual, expected in zip(answers, exact, strict=True):
        check_close(actual, expected)

    torchs = _torch_answers(torch_op, arrays, differentiated, dout)
    out, saved = forward(ops, op, *arrays, *constants)
    answers = (out, *backward(ops, op, dout, saved))
    for actual, theirs, expected in zip(answers, torchs, exact, strict=True):
        check_close(actual, expected.astype(np.float32))
        if many:
            check_error(actual, theirs, expected)

    if many and ops is kernels and "bfloat16" in DTYPES:
        half = [None if x is None else rounded(x, "bfloat16") for x in arrays]
        dout = rounded(dout, "bfloat16")
        wide = [None if x is None else x.astype(np.float64) for x in half]
        exact = _torch_answers(torch_op, wide, differentiated, dout.astype(np.float64))
        out, saved = forward(ops, op, *half, *constants, dtype="bfloat16")
        answers = (out, *backward(ops, op, dout, saved, "bfloat16"))
        torchs = _torch_answers(torch_op, _as_tensors(half, "bfloat16"), differentiated, dout)
        for actual, theirs, expected in zip(answers, torchs, exact, strict=True):
            check_error(actual, theirs, expected)


def _as_tensors(arrays: Sequence[np.ndarray | None], dtype: str) -> list[torch.Tensor | None]:
    return [None if x is None else torch.tensor(x).to(getattr(torch, dtype)) for x in arrays]


def _torch_answers(
    torch_op: Callable[..., torch.Tensor],
    arrays: Sequence[Any],
    differentiated: Sequence[int],
    dout: np.ndarray,
) -> list[np.ndarray]:
    """torch's output and its gradients, in the order of `differentiated`; bfloat16 as float32."""
    tensors = [None if x is None else torch.as_tensor(x).detach().clone().requires_grad_() for x in arrays]
    out = torch_op(*tensors)
    wanted = [tensors[i] for i in differentiated]
    gradients = torch.autograd.grad(out, wanted, torch.tensor(dout).to(out.dtype), materialize_grads=True)
    answers = [x.detach() for x in (out, *gradients)]
    return [(x.float() if x.dtype == torch.bfloat16 else x).numpy() for x in answers]
