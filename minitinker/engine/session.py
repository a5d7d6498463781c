"""What the clients of one ServiceClient share: the worker, the backend, the base models, the storage."""

import uuid
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.fitting import explained, itemsize, out_of_memory
from minitinker.engine.sampler import Sampler
from minitinker.engine.worker import Worker
from minitinker.errors import APIError
from minitinker.futures import APIFuture
from minitinker.model.tokenizer import Tokenizer
from minitinker.model.weights import BaseModel, load_base_model

T = TypeVar("T")


class Session:
    """Lives as long as any client of it; then its worker ends."""

    def __init__(
        self,
        ops: ModuleType,
        storage: Path,
        user_metadata: dict[str, str] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.user_metadata = user_metadata
        self.ops = ops
        self._cache_bytes = cache_bytes
        self.store = CheckpointStore(storage)
        self.worker = Worker(partial(explained, ops))
        self.worker.submit(ops.prepare)
        self.worker.submit(self.store.sweep)
        self._samplers: dict[Path, Sampler] = {}
        self._tokenizers: dict[Path, Tokenizer] = {}
        weakref.finalize(self, self.worker.close, finish=True).atexit = False

    def submit(self, job: Callable[[], T]) -> APIFuture[T]:
        """Run a job in the worker's thread, after all that was asked before."""
        return APIFuture(self.worker.submit(job), self.worker.thread)

    def load_base(self, name: str) -> BaseModel:
        """The base model called `name`, kept for as long as the session lives. In the worker's thread."""
        base = load_base_model(name)
        if base.folder not in self._samplers:
            try:
                base.placed(self.ops)
            except self.ops.OutOfMemory:
                placed = False
            else:
                placed = True
            if not placed:  # told here, where what was placed is gone again
                raise self._no_room_for(base)
            self._samplers[base.folder] = Sampler(self.ops, base, self._cache_bytes)
            self.worker.add_sampler(self._samplers[base.folder])
        return base

    def _no_room_for(self, base: BaseModel) -> APIError:
        free = self.ops.free_memory()
        size = base.weights.numbers * itemsize(self.ops.DTYPE)
        fitting = "bfloat16 takes half" if self.ops.DTYPE == "float32" else "a smaller model may"
        return out_of_memory(f"{base.name}, {size / 1e9:.1f} GB,", self.ops.DEVICE, fitting, free)

    def sampler(self, base: BaseModel) -> Sampler:
        """The sampler that serves every SamplingClient on this base."""
        return self._samplers[base.folder]

    def tokenizer(self, base: BaseModel) -> Tokenizer:
        """The base model's tokenizer."""
        if base.folder not in self._tokenizers:
            self._tokenizers[base.folder] = Tokenizer.from_folder(base.folder)
        return self._tokenizers[base.folder]
