"""SamplingClient: draw tokens from fixed weights, and ask what they think of given ones."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from minitinker.engine.sampler import SampleRequest
from minitinker.engine.session import Session
from minitinker.engine.stopping import StopRule, stop_rule
from minitinker.engine.trainer import Snapshot
from minitinker.errors import BadRequestError
from minitinker.futures import APIFuture, ClientFuture, settle
from minitinker.model.config import ModelConfig
from minitinker.model.tokenizer import Tokenizer
from minitinker.model.weights import BaseModel, lasting_name
from minitinker.types import ModelInput, SampleResponse, SamplingParams

if TYPE_CHECKING:
    from minitinker.training_client import Run


MOST_SAMPLES = 4096  # of one request; they are all drawn side by side


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
        name = lasting_name(base_model)
        return cls(session, lambda: _Source(name, session.load_base(name), None))

    @classmethod
    def from_path(cls, session: Session, path: str) -> "SamplingClient":
        """A client on the weights saved at a tinker:// path."""

        def begin() -> _Source:
            state = session.store.load(path)
            snapshot = Snapshot(state.spec, session.ops.array(state.flat, session.ops.DTYPE))
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
        tokens = _tokens(prompt)

        def begin() -> None:
            source = self._begun()
            config = source.base.config
            if not isinstance(sampling_params, SamplingParams):
                given = type(sampling_params).__name__
                raise BadRequestError(f"sampling_params is a {given}; it must be a SamplingParams")
            if sampling_params.stop:
                self.get_tokenizer()  # if there is none, this request says so, and no other
            request = SampleRequest(
                prompt=_check_prompt(prompt, tokens, config, room=1),
                samples=_check_whole("num_samples", num_samples, 1, MOST_SAMPLES),
                snapshot=source.snapshot,
                stop=stop_rule(sampling_params.stop, config.eos_token_ids, self._decode, config.vocab_size),
                max_tokens=_check_max_tokens(sampling_params, len(tokens), config),
                future=answer,
                temperature=_check_number("temperature", sampling_params.temperature, 0, np.inf),
                top_k=_check_whole("top_k", sampling_params.top_k, -1),
                top_p=_check_number("top_p", sampling_params.top_p, 0, 1, open_below=True),
                seed=_check_seed(sampling_params.seed),
                prompt_logprobs=include_prompt_logprobs,
                top_prompt_logprobs=_check_whole("topk_prompt_logprobs", topk_prompt_logprobs, 0),
            )
            self._session.sampler(source.base).add(request)

        return self._enqueue(begin, answer)

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """log p of each token of the prompt given those before it, untempered; None for the first."""
        tokens = _tokens(prompt)
        answer: Future[SampleResponse] = Future()
        logprobs: Future[list[float | None]] = Future()

        def begin() -> None:
            source = self._begun()
            request = SampleRequest(
                prompt=_check_prompt(prompt, tokens, source.base.config, room=0),
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
            error = None if done.cancelled() else done.exception()
            settle(logprobs, None if done.cancelled() or error else done.result().prompt_logprobs, error)

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
            elif (error := job.exception()) is not None and not answer.done():
                settle(answer, error=error)

        self._session.worker.submit(begin).add_done_callback(tell)
        return APIFuture(answer, self._session.worker.thread)


def _tokens(prompt: ModelInput) -> Any:
    """The prompt's tokens as they are now, so that what the caller does to it later changes nothing."""
    return prompt.to_ints() if isinstance(prompt, ModelInput) else prompt


def _check_prompt(prompt: ModelInput, tokens: Any, config: ModelConfig, room: int) -> Any:
    """The prompt's tokens: (tokens,) int64, with `room` tokens of context left."""
    if not isinstance(prompt, ModelInput):
        raise BadRequestError(f"prompt is a {type(prompt).__name__}; it must be a ModelInput")
    most = config.max_position_embeddings - room
    if not 1 <= len(tokens) <= most:
        raise BadRequestError(f"the prompt has {len(tokens)} tokens; it must have 1 to {most}")
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise BadRequestError(
                f"the prompt holds the token {token}; the vocabulary is 0 to {config.vocab_size - 1}"
            )
    return np.array(tokens, np.int64)


def _check_seed(seed: int | None) -> int | None:
    if seed is not None and not 0 <= seed < 2**64:
        raise BadRequestError(f"seed is {seed}; it must be at least 0 and below 2^64")
    return seed


def _check_max_tokens(params: SamplingParams, prompt_tokens: int, config: ModelConfig) -> int:
    room = config.max_position_embeddings - prompt_tokens
    if params.max_tokens is None:
        return room
    return min(room, _check_whole("max_tokens", params.max_tokens, 1))


def _check_whole(name: str, value: Any, least: int, most: float = np.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        right = f"of at least {least}" + (f" and at most {most}" if np.isfinite(most) else "")
        raise BadRequestError(f"{name} is {value!r}; it must be a whole number {right}")
    return int(value)


def _check_number(name: str, value: float, least: float, most: float, open_below: bool = False) -> float:
    inside = (least < value if open_below else least <= value) and value <= most and np.isfinite(value)
    if not inside:
        right = f"{'above' if open_below else 'at least'} {least:g}"
        right += f" and at most {most:g}" if np.isfinite(most) else " and finite"
        raise BadRequestError(f"{name} is {value!r}; it must be {right}")
    return float(value)
