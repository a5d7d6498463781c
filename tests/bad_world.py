"""Clients whose state can be looked at bit by bit, before and after a call with bad input.

Other test files import this one by name: `from bad_world import World`; the fixture `world` is in conftest.py.
"""

import itertools
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
from bad_values import LIMIT, MOST_WORDS
from small_clients import PROMPT, datum, model, train

from minitinker import APIFuture, ServiceClient
from minitinker.errors import TinkerError
from minitinker.types import SamplingParams

DATA = [datum(1, 2, 3, 4), datum(9, 8, 7)]
FIELDS = ("flat", "grad", "m", "v")


class World:
    """Clients of all kinds, trained and with gradients, and a storage folder with checkpoints."""

    def __init__(self) -> None:
        self.home = Path(os.environ["MINITINKER_HOME"])
        self.pristine = self.home.with_name("pristine")
        self.service = ServiceClient(backend="reference")
        self.training = self.service.create_lora_training_client(model(), rank=4, seed=0)
        train(self.training)
        self.sampling = self.training.save_weights_and_get_sampling_client()
        self.rest = self.service.create_rest_client()
        self.run_id = self.training.model_id
        self.path = self.training.save_state("state").result().path
        self.external = self.training.save_weights_external("external").result().path
        other = self.service.create_lora_training_client(model(), rank=2, seed=0)
        self.misfit = other.save_state("misfit").result().path
        self.without_moments = self.training.save_weights_for_sampler("sampler").result().path
        self.training.forward_backward(DATA, "cross_entropy").result()
        self.trainer = self.training._run.trainer
        self.numbers = {name: getattr(self.trainer, name).copy() for name in FIELDS}
        self.counts = (self.trainer.step, self.trainer.accumulated)
        self.good = [self._outcome(future) for future in self._good_calls()]
        shutil.copytree(self.home, self.pristine, symlinks=True)
        self.files = self._files()

    def checked(self, call: Callable[[], Any]) -> TinkerError | None:
        """What a call raises. Good calls, made right behind it, must give what they always give."""
        try:
            answer = call()
        except TinkerError as error:
            answer = error
        beside = self._good_calls()
        raised = answer if isinstance(answer, TinkerError) else None
        if isinstance(answer, APIFuture):
            try:
                answer.result(LIMIT)
            except TinkerError as error:
                raised = error
        if raised is not None:
            self._check_good(beside)
            assert len(str(raised)) < MOST_WORDS, raised
            assert self._trace() is None, (self._trace(), raised)
        else:
            wait([future.future() for future in beside], LIMIT)
            self._restore()
        return raised

    def close(self) -> None:
        self._check_good(self._good_calls())
        for path in self.pristine.rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (self.home / path.relative_to(self.pristine)).read_bytes(), path
        self.service.close("errored")

    def _good_calls(self) -> list[APIFuture[Any]]:
        params = SamplingParams(max_tokens=2, seed=1, stop=[])
        return [self.training.forward(DATA, "cross_entropy"), self.sampling.sample(PROMPT, 1, params)]

    def _check_good(self, futures: list[APIFuture[Any]]) -> None:
        """Logprobs of samples may differ in their last bits, by what else is in the step."""
        found = [self._outcome(future) for future in futures]
        assert found[0] == self.good[0]
        assert found[1][0] == self.good[1][0]
        np.testing.assert_allclose(found[1][1], self.good[1][1], atol=1e-5)

    def _outcome(self, future: APIFuture[Any]) -> Any:
        answer = future.result(LIMIT)
        sequences = getattr(answer, "sequences", None)
        return answer if sequences is None else (sequences[0].tokens, sequences[0].logprobs)

    def _trace(self) -> str | None:
        """What differs from how it began."""
        for name, numbers in self.numbers.items():
            if getattr(self.trainer, name).tobytes() != numbers.tobytes():
                return name
        if (self.trainer.step, self.trainer.accumulated) != self.counts:
            return "step"
        files = self._files()
        return None if files == self.files else f"storage: {set(files.items()) ^ set(self.files.items())}"

    def _files(self) -> dict[str, tuple[int, ...]]:
        """Every path in storage, with what tells that a file was written to. Their bytes are compared at the end."""
        found = {
            os.path.join(at, name) for at, *names in os.walk(self.home) for name in itertools.chain(*names)
        }
        stats = {path: os.lstat(path) for path in found}
        return {
            path: (s.st_size, s.st_mtime_ns, s.st_mode) if stat.S_ISREG(s.st_mode) else ()
            for path, s in stats.items()
        }

    def _restore(self) -> None:
        """Undo what a call did that was taken."""
        for name, numbers in self.numbers.items():
            getattr(self.trainer, name)[...] = numbers
        self.trainer.step, self.trainer.accumulated = self.counts
        self.training._since_step.clear()
        if self._files() != self.files:
            shutil.rmtree(self.home)
            shutil.copytree(self.pristine, self.home, symlinks=True)
