"""SamplingClient: draw tokens from fixed weights, and ask what they think of given ones."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minitinker.engine.sampler import SampleRequest
from minitinker.engine.session import Session
from minitinker.engine.stopping import StopRule, stop_rule
from minitinker.engine.trainer import Snapshot
from minitinker.errors import BadRequestError
from minitinker.futures import APIFuture, ClientFuture
from minitinker.model.config import ModelConfig
from minitinker.model.tokenizer import Tokenizer
from minitinker.model.weights import BaseModel
from minitinker.types import ModelInput, SampleResponse, SamplingParams

if TYPE_CHECKING:
    from minitinker.training_client import Run


@dataclass(frozen=True)
class _Source:
    """What is sampled from. snapshot None: the base model itself."""

    base_model: str
    base: BaseModel
    snapshot: Snapshot | None


class SamplingClient(ClientFuture):
    """An immutable snapshot of weights to sample from: what training does later never changes it.

    Like a TrainingClient, it may be used right away, awaited, or asked for `.result()`.
    """

    def __init__(self, session: Session, begin: Callable[[], _Source]) -> None:
        self._session = session
        self._source: _Source

        def begin_here() -> None:
            self._source = begin()

        super().__init__(session.worker.submit(begin_here), session.worker.thread)

    @classmethod
    def from_base(cls, session: Session, base_model: str) -> "SamplingClient":
        """A client on the base model itself."""
        return cls(session, lambda: _Source(base_model, session.load_base(base_model), None))

    @classmethod
    def from_path(cls, session: Session, path: str) -> "SamplingClient":
        """A client on the weights saved at a tinker:// path."""

        def begin() -> _Source:
            state = session.store.load(path)
            snapshot = Snapshot(state.spec, session.ops.array(state.flat))
            return _Source(state.base_model, session.load_base(state.base_model), snapshot)

        return cls(session, begin)

    @classmethod
    def from_run(cls, session: Session, run: Callable[[], "Run"]) -> "SamplingClient":
        """A client on the weights that a run has when this client's turn comes."""

        def begin() -> _Source:
            trainer = run().trainer
            return _Source(run().base_model, trainer.base, trainer.snapshot())

        return cls(session, begin)

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> APIFuture[SampleResponse]:
        """Draw completions of a prompt.

        Args:
            prompt: at least one token, and fewer than the model's context holds.
            num_samples: how many completions. Sample j of a seed s is the same whenever and beside whatever it
                is drawn.
            sampling_params: temperature 0 takes the likeliest token; top_k and top_p cut the tempered
                distribution, top_k first; max_tokens None goes on to the end of the context; stop, a string,
                strings or token ids, is heeded beside the model's end tokens, None means these alone, and []
                not even these. What stopped a sample stands at the end of its tokens.
            include_prompt_logprobs: also return log p of each token of the prompt given those before it,
                untempered; None for the first.
            topk_prompt_logprobs: also return so many likeliest tokens in each place of the prompt.

        `logprobs` of a sequence are those of the tempered distribution before top_k and top_p cut it; at
        temperature 0 they are untempered. Bad arguments raise BadRequestError when the result is asked for.
        """
        answer: Future[SampleResponse] = Future()

        def begin() -> None:
            source = self._begun()
            config = source.base.config
            request = SampleRequest(
                prompt=_check_prompt(prompt, config, room=1),
                samples=_check_whole("num_samples", num_samples, 1),
                snapshot=source.snapshot,
                stop=stop_rule(sampling_params.stop, config.eos_token_ids, self._decode, config.vocab_size),
                max_tokens=_check_max_tokens(sampling_params, prompt, config),
                future=answer,
                temperature=_check_number("temperature", sampling_params.temperature, 0, np.inf),
                top_k=_check_whole("top_k", sampling_params.top_k, -1),
                top_p=_check_number("top_p", sampling_params.top_p, 0, 1, open_below=True),
                seed=sampling_params.seed,
                prompt_logprobs=include_prompt_logprobs,
                top_prompt_logprobs=_check_whole("topk_prompt_logprobs", topk_prompt_logprobs, 0),
            )
            self._session.sampler(source.base).add(request)

        return self._enqueue(begin, answer)

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """log p of each token of the prompt given those before it, untempered; None for the first."""
        answer: Future[SampleResponse] = Future()
        logprobs: Future[list[float | None]] = Future()

        def begin() -> None:
            source = self._begun()
            request = SampleRequest(
                prompt=_check_prompt(prompt, source.base.config, room=0),
                samples=0,
                snapshot=source.snapshot,
                stop=StopRule(frozenset(), (), self._decode),
                max_tokens=0,
                future=answer,
                prompt_logprobs=True,
            )
            self._session.sampler(source.base).add(request)

        def hand_on(done: "Future[SampleResponse]") -> None:
            if done.cancelled():
                logprobs.cancel()
            if not logprobs.set_running_or_notify_cancel():
                return
            error = done.exception()
            if error is not None:
                logprobs.set_exception(error)
            else:
                logprobs.set_result(done.result().prompt_logprobs or [])

        answer.add_done_callback(hand_on)
        logprobs.add_done_callback(lambda own: own.cancelled() and answer.cancel())
        self._enqueue(begin, answer)
        return APIFuture(logprobs, self._session.worker.thread)

    def get_tokenizer(self) -> Tokenizer:
        """The base model's tokenizer."""
        return self._session.tokenizer(self.result()._source.base)

    def get_base_model(self) -> str:
        """The base model's name, as it was asked for."""
        return self.result()._source.base_model

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> SampleResponse:
        """`sample`, awaited."""
        return await self.sample(
            prompt, num_samples, sampling_params, include_prompt_logprobs, topk_prompt_logprobs
        )

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        """`compute_logprobs`, awaited."""
        return await self.compute_logprobs(prompt)

    async def get_base_model_async(self) -> str:
        """`get_base_model`, awaited."""
        return (await self)._source.base_model

    def _begun(self) -> _Source:
        """What is sampled from, in the worker's thread; raises what the client's making raised."""
        self._made.result()
        return self._source

    def _decode(self, tokens: Any) -> str:
        text: str = self._session.tokenizer(self._source.base).decode(tokens)
        return text

    def _enqueue(
        self, begin: Callable[[], None], answer: "Future[SampleResponse]"
    ) -> APIFuture[SampleResponse]:
        """Put a request in line; if it cannot begin, `answer` says why."""

        def tell(job: "Future[None]") -> None:
            if job.cancelled():
                answer.cancel()
                answer.set_running_or_notify_cancel()
            elif (error := job.exception()) is not None and answer.set_running_or_notify_cancel():
                answer.set_exception(error)

        self._session.worker.submit(begin).add_done_callback(tell)
        return APIFuture(answer, self._session.worker.thread)


def _check_prompt(prompt: ModelInput, config: ModelConfig, room: int) -> Any:
    """The prompt's tokens: (tokens,) int64, with `room` tokens of context left."""
    if not isinstance(prompt, ModelInput):
        raise BadRequestError(f"prompt is a {type(prompt).__name__}; it must be a ModelInput")
    tokens = np.array(prompt.to_ints(), np.int64)
    most = config.max_position_embeddings - room
    if not 1 <= len(tokens) <= most:
        raise BadRequestError(f"the prompt has {len(tokens)} tokens; it must have 1 to {most}")
    outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if outside.size:
        raise BadRequestError(
            f"the prompt holds the token {outside[0]}; the vocabulary is 0 to {config.vocab_size - 1}"
        )
    return tokens


def _check_max_tokens(params: SamplingParams, prompt: ModelInput, config: ModelConfig) -> int:
    room = config.max_position_embeddings - prompt.length
    if params.max_tokens is None:
        return room
    return min(room, _check_whole("max_tokens", params.max_tokens, 1))


def _check_whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadRequestError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return value


def _check_number(name: str, value: float, least: float, most: float, open_below: bool = False) -> float:
    inside = (least < value if open_below else least <= value) and value <= most and np.isfinite(value)
    if not inside:
        right = f"{'above' if open_below else 'at least'} {least:g}"
        right += f" and at most {most:g}" if np.isfinite(most) else " and finite"
        raise BadRequestError(f"{name} is {value!r}; it must be {right}")
    return float(value)
