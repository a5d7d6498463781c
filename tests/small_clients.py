"""Clients on one tiny random model, and what many tests of them need.

Other test files import this one by name: `from small_clients import model, datum, prompt`.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_model, with_tokenizer

from minitinker import SamplingClient, TrainingClient
from minitinker.types import AdamParams, Datum, ModelInput, SampleResponse, SamplingParams

# For tests of the `service` fixture, or of one that is made of it.
on_both_backends = pytest.mark.parametrize(
    "service",
    [
        pytest.param({"backend": "reference"}, id="reference"),
        pytest.param({"backend": "kernels", "dtype": "float32"}, id="kernels"),
    ],
    indirect=True,
)


@cache
def model() -> str:
    """The folder of a model with its tokenizer, as a base model's name. Made once."""
    return str(with_tokenizer(make_model()[0]))


def prompt(*tokens: int) -> ModelInput:
    return ModelInput.from_ints(list(tokens))


PROMPT = prompt(5, 6, 7)


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
    trainer = client._run.trainer
    return trainer.ops.to_numpy(trainer.flat).copy()


def logprobs(client: TrainingClient, text: list[int]) -> np.ndarray:
    """What `forward` says of the tokens text[1:]: (len(text) - 1,)."""
    output = client.forward([datum(*text)], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


def draw(
    client: SamplingClient, samples: int = 1, given: ModelInput = PROMPT, **params: object
) -> SampleResponse:
    """Samples of eight tokens from seed 1, whatever the end tokens; `params` for other SamplingParams."""
    whole = {"max_tokens": 8, "seed": 1, "stop": []} | params
    return client.sample(given, samples, SamplingParams(**whole)).result()


def tokens(response: SampleResponse) -> list[list[int]]:
    """The tokens of each sample."""
    return [sequence.tokens for sequence in response.sequences]


def saved(home: Path, path: str) -> Path:
    """Where the checkpoint of a tinker:// path lies under a MINITINKER_HOME."""
    return home / path.removeprefix("tinker://")
