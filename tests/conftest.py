"""Fixtures of the tests that go through clients."""

import os
import threading

import huggingface_hub.constants
import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as minitinker.backend does
os.environ.setdefault("MINITINKER_BACKEND", "reference")  # also where there is a GPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    from triton.runtime import interpreter

    def dot(builder, a, b, d, *precision):
        """Triton's own asks BLAS, many of which let the bits of a row depend on where in the tile it stands."""
        product = np.einsum("...ik,...kj->...ij", a.data, b.data, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot
from bad_values import summary
from bad_world import World
from small_clients import model, train

from minitinker import ServiceClient


@pytest.fixture(scope="module")
def service(request, tmp_path_factory):
    """A ServiceClient for the tests of one file, with its own storage: on the backend that $MINITINKER_BACKEND
    names, or on each in turn for a test marked `on_both_backends`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITINKER_HOME", str(tmp_path_factory.mktemp("home")))
        service = ServiceClient(**getattr(request, "param", {}))
    yield service
    service.close("errored")


@pytest.fixture
def client(service):
    """A new TrainingClient."""
    return service.create_lora_training_client(model(), rank=4, seed=0)


@pytest.fixture
def held(service):
    """An event that the worker's thread waits for, so that what a test asks for stays in the queue."""
    go_on = threading.Event()
    service._session.submit(go_on.wait)
    yield go_on
    go_on.set()


@pytest.fixture
def base(service):
    """A SamplingClient on the base model itself."""
    return service.create_sampling_client(base_model=model())


@pytest.fixture
def trained(client):
    """A TrainingClient whose weights have moved, and a SamplingClient on them."""
    train(client)
    return client, client.save_weights_and_get_sampling_client()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What bad input is given to, with no way to the Hugging Face hub. It tells at its end how much was tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("MINITINKER_HOME", str(tmp_path_factory.mktemp("home") / "storage"))
        world = World()
        yield world
        world.close()
    print(f"\n{summary()}")
