"""Clients on one tiny random model, and what many tests of them need.

Other test files import this one by name: `from small_clients import MODEL, datum, prompt`.
"""

from functools import cache
from pathlib import Path

import numpy as np
from tiny_models import make_model, with_tokenizer

from minitinker.training_client import TrainingClient
from minitinker.types import AdamParams, Datum, ModelInput


@cache
def model() -> str:
    """The folder of a model with its tokenizer, as a base model's name. Made once."""
    return str(with_tokenizer(make_model()[0]))


def prompt(*tokens: int) -> ModelInput:
    return ModelInput.from_ints(list(tokens))


def datum(*tokens: int, **inputs: object) -> Datum:
    """Each token predicts the next; further loss_fn_inputs by name."""
    return Datum(prompt(*tokens[:-1]), {"target_tokens": list(tokens[1:]), **inputs})


def bad_datum() -> Datum:
    """One that forward_backward refuses."""
    return datum(1, 2, 10**6)


def train(client: TrainingClient, steps: int = 2, learning_rate: float = 0.02) -> None:
    """Move every weight of the adapter well away from where it began."""
    for step in range(steps):
        client.forward_backward([datum(5, 6, 7, 8, 9 + step), datum(40, 50, 60)], "cross_entropy")
        client.optim_step(AdamParams(learning_rate=learning_rate)).result()


def weights(client: TrainingClient) -> np.ndarray:
    """A copy of the adapter's weights, once all that was asked for is done: (size,) float32."""
    client.get_info()
    return client._run.trainer.flat.copy()


def logprobs(client: TrainingClient, tokens: list[int]) -> np.ndarray:
    """What `forward` says of tokens[1:]: (len(tokens) - 1,)."""
    output = client.forward([datum(*tokens)], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


def saved(home: Path, path: str) -> Path:
    """Where the checkpoint of a tinker:// path lies under a MINITINKER_HOME."""
    return home / path.removeprefix("tinker://")
