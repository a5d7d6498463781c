"""What the tests of the trainer share: its whole state, its gradients, and how exact they have to be."""

from tiny_models import make_batch, make_trainer, relative_errors

from minitinker.types import AdamParams, Datum

GRADIENT = WEIGHT = 1e-4  # relative, per A and B
LOSS = 1e-5  # relative
LENGTHS = (7, 1, 33, 12, 150)
NORM = "unclipped_grad_l2:mean"
NAN, INF = float("nan"), float("inf")
HUGE = 3e38  # as large as float32 goes


def state(trainer):
    """All that a failure must leave as it was, bit by bit."""
    arrays = (trainer.flat, trainer.grad, trainer.m, trainer.v)
    return [x.tobytes() for x in arrays], trainer.step, trainer.accumulated


def in_the_middle(trainer):
    """The trainer, with gradients and moments that are not zero."""
    trainer.forward_backward(make_batch(), "cross_entropy", None)
    trainer.optim_step(AdamParams())
    trainer.forward_backward(make_batch(), "cross_entropy", None)
    return trainer


def gradient_of(base, data, loss_fn="cross_entropy", config=None):
    """What a call on a trainer of its own gives, and the gradient that it leaves: (size,)."""
    trainer = make_trainer(base)
    return trainer.forward_backward(data, loss_fn, config), trainer.grad


def assert_same_gradient(actual, expected, trainer):
    errors = relative_errors(actual, expected, trainer.spec)
    assert max(errors.values()) <= GRADIENT, errors


def with_weights(data, change):
    """The same data with `change` of each datum's weights, an array like target_tokens."""
    return [
        Datum(d.model_input, d.loss_fn_inputs | {"weights": change(d.loss_fn_inputs["weights"].to_numpy())})
        for d in data
    ]
