"""What SamplingClients sample from, and how copies of a client find it again by its handle."""

import os
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as shortened

from minitinker.engine.request import Served
from minitinker.engine.session import Session
from minitinker.engine.trainer import Snapshot
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.hosted import hosted
from minitinker.model.weights import BaseModel
from minitinker.types import GetSamplerResponse


@dataclass(frozen=True)
class Source:
    """What is sampled from."""

    base_model: str
    base: BaseModel
    served: Served
    path: str | None = None  # where it was saved, if it was

    @property
    def snapshot(self) -> Snapshot | None:
        return self.served.snapshot


class SharedSampler:
    """What the copies of a client share: the session and, once the worker has begun it, the source."""

    def __init__(self, session: Session, begin: Callable[[], Source]) -> None:
        self.session = session
        self.source: Source

        def begin_here() -> None:
            self.source = begin()

        self.made = session.worker.submit(begin_here)
        self.handle = f"minitinker-sampler:{os.getpid()}:{uuid.uuid4().hex}"
        _living[self.handle] = self


# By handle, the samplers that a client of this process still uses.
_living: "weakref.WeakValueDictionary[str, SharedSampler]" = weakref.WeakValueDictionary()


def living_samplers(session: Session | None = None) -> list[GetSamplerResponse]:
    """What the clients of this process, or those of a session, draw from; those still to be made are left out."""
    found = [sampler for sampler in _living.values() if session in (None, sampler.session)]
    return [
        GetSamplerResponse(
            sampler_id=sampler.handle, base_model=sampler.source.base_model, model_path=sampler.source.path
        )
        for sampler in found
        if hasattr(sampler, "source")
    ]


def find_sampler(handle: str) -> SharedSampler:
    """The sampler behind a handle, for a further client of it.

    Raises: HostedServiceError where the handle is another process's; NotFoundError where every client of the
        sampler is gone; BadRequestError for what is no handle.
    """
    kind, _, rest = handle.partition(":") if isinstance(handle, str) else ("", "", "")
    process, _, _ = rest.partition(":")
    if kind != "minitinker-sampler":
        raise BadRequestError(f"the handle is {shortened(handle)}; it must come from get_sampler_handle")
    if process != str(os.getpid()):
        raise hosted(
            "a SamplingClient sent to another process",
            f"the weights stay in process {process}: save them with save_weights_for_sampler and call "
            "create_sampling_client(model_path=...) in the other process",
        )
    sampler = _living.get(handle)
    if sampler is None:
        raise NotFoundError(f"no client of the sampler {handle!r:.80} is left, and its weights are gone")
    return sampler
