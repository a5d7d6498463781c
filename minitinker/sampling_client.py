"""SamplingClient: draw tokens from given weights, and ask what they think of given ones."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from minitinker.conform import argument
from minitinker.engine.request import SampleRequest, Served
from minitinker.engine.session import Session
from minitinker.engine.stopping import StopRule, stop_rule
from minitinker.engine.trainer import Snapshot
from minitinker.errors import BadRequestError
from minitinker.futures import APIFuture, ClientFuture, settle
from minitinker.hosted import check_connection, hosted, refuse_hosted
from minitinker.model.tokenizer import Tokenizer
from minitinker.model.weights import lasting_name
from minitinker.samplers import SharedSampler, Source, find_sampler
from minitinker.sampling_checks import (
    MOST_SAMPLES,
    check_alternatives,
    check_last_n,
    check_max_tokens,
    check_number,
    check_prompt,
    check_seed,
    check_targets,
    check_temperature,
    check_whole,
    text_of,
)
from minitinker.twins import awaited
from minitinker.types import ModelInput, SampleResponse, SamplingParams, TensorData

if TYPE_CHECKING:
    from minitinker.training_run import Run


class SamplingClient(ClientFuture):
    """Samples from weights: an immutable snapshot, which training never changes, or those of an inflight client.

    Inflight clients of a training run, made by `save_weights_and_get_sampling_client(kind="inflight")`, all sample
    from the weights of the latest such call, whatever was trained in between. A request in work goes on with
    newer weights from its next token; the keys and values of its earlier tokens stay.

    Like a TrainingClient, it may be used right away, awaited, or asked for `.result()`.

    A client can be pickled, or sent as `get_sampler_handle()`, within its process and as long as a client of
    its sampler lives. Another process has none of the weights: there, loading it raises an error that says
    what to do.
    """

    def __init__(self, sampler: SharedSampler) -> None:
        self._sampler = sampler
        self._session = sampler.session
        super().__init__(sampler.made, sampler.session.worker.thread)

    @classmethod
    def from_base(cls, session: Session, base_model: str) -> "SamplingClient":
        """A client on the base model itself."""
        name = lasting_name(base_model)
        return cls(SharedSampler(session, lambda: Source(name, session.load_base(name), Served(None))))

    @classmethod
    def from_path(cls, session: Session, path: str, base_model: str | None = None) -> "SamplingClient":
        """A client on the weights saved at a tinker:// path. base_model: what they must have been trained on."""
        name = None if base_model is None else lasting_name(base_model)

        def begin() -> Source:
            state = session.store.load(path)
            if name not in (None, state.base_model):
                raise BadRequestError(
                    f"{path} was trained on {state.base_model}; base_model is {name!s:.300}"
                )
            snapshot = Snapshot(state.spec, session.ops.array(state.flat, session.ops.DTYPE))
            return Source(state.base_model, session.load_base(state.base_model), Served(snapshot), path)

        return cls(SharedSampler(session, begin))

    @classmethod
    def from_run(cls, session: Session, serve: Callable[[], tuple["Run", Served]]) -> "SamplingClient":
        """A client on what `serve` gives of a run when this client's turn comes."""

        def begin() -> Source:
            run, served = serve()
            return Source(run.base_model, run.trainer.base, served)

        return cls(SharedSampler(session, begin))

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
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
            topk_prompt_logprobs: also return so many likeliest tokens in each place of the prompt, untempered.
            topk_sample_logprobs: also return so many likeliest tokens in each place of a sample, of the
                distribution that `logprobs` are of.
            target_prompt_logprobs: also return log p, untempered, of these tokens in the prompt's places: int64 of
                shape (prompt - 1, K), row i for the place i + 1, -1 where nothing is asked. May be sparse; the
                answer has the same layout.
            prompt_alt_tokens_k: also draw so many tokens in each place of the prompt after the first, with
                replacement, from the tempered distribution, not cut; their logprobs are untempered.
            prompt_logprobs_last_n: of how many tokens at the prompt's end include_prompt_logprobs, which it needs,
                and topk_prompt_logprobs tell; None: of all.

        `logprobs` of a sequence are those of the tempered distribution before top_k and top_p cut it; at
        temperature 0 they are untempered. Bad arguments raise BadRequestError when the result is asked for.
        """
        answer: Future[SampleResponse] = Future()
        text = text_of(prompt)

        def begin() -> None:
            source = self._begun()
            config = source.base.config
            if not isinstance(sampling_params, SamplingParams):
                given = type(sampling_params).__name__
                raise BadRequestError(f"sampling_params is a {given}; it must be a SamplingParams")
            if sampling_params.stop:
                self.get_tokenizer()  # if there is none, this request says so, and no other
            tokens = check_prompt(text, config, room=1)
            vocab = config.vocab_size
            request = SampleRequest(
                prompt=tokens,
                samples=check_whole("num_samples", num_samples, 1, MOST_SAMPLES),
                served=source.served,
                stop=stop_rule(sampling_params.stop, config.eos_token_ids, self._decode, vocab),
                max_tokens=check_max_tokens(sampling_params, len(tokens), config),
                future=answer,
                temperature=check_temperature(sampling_params.temperature),
                top_k=min(vocab, check_whole("top_k", sampling_params.top_k, -1)),
                top_p=check_number("top_p", sampling_params.top_p, 0, 1, open_below=True),
                seed=check_seed(sampling_params.seed),
                top_logprobs=check_whole("topk_sample_logprobs", topk_sample_logprobs, 0, vocab),
                prompt_logprobs=argument(bool, include_prompt_logprobs, "include_prompt_logprobs"),
                top_prompt_logprobs=check_whole("topk_prompt_logprobs", topk_prompt_logprobs, 0, vocab),
                last_prompt_tokens=check_last_n(prompt_logprobs_last_n, len(tokens), include_prompt_logprobs),
                prompt_targets=check_targets(target_prompt_logprobs, len(tokens), vocab),
                prompt_alternatives=check_alternatives(prompt_alt_tokens_k),
            )
            self._session.sampler(source.base).add(request)

        return self._enqueue(begin, answer)

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """log p of each token of the prompt given those before it, untempered; None for the first.

        prompt_logprobs_last_n: only of so many tokens at the end, None for those before.
        """
        text = text_of(prompt)
        answer: Future[SampleResponse] = Future()
        logprobs: Future[list[float | None]] = Future()

        def begin() -> None:
            source = self._begun()
            tokens = check_prompt(text, source.base.config, room=0)
            request = SampleRequest(
                prompt=tokens,
                samples=0,
                served=source.served,
                stop=StopRule(frozenset(), (), self._decode),
                max_tokens=0,
                future=answer,
                prompt_logprobs=True,
                last_prompt_tokens=check_last_n(prompt_logprobs_last_n, len(tokens), True),
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

    def get_sampler_handle(self) -> str:
        """A string that `from_sampler_handle` makes a client of the same sampler from, in this process."""
        return self._sampler.handle

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> "SamplingClient":
        """A new client of the sampler behind a handle. api_key is for the hosted service and has no effect.

        Raises: HostedServiceError where the handle is another process's; NotFoundError where every client of the
            sampler is gone; BadRequestError for what is no handle.
        """
        check_connection(api_key=api_key)
        return SamplingClient(find_sampler(handle))

    def __reduce__(self) -> tuple[Any, ...]:
        return SamplingClient.from_sampler_handle, (self.get_sampler_handle(),)

    def get_telemetry(self) -> None:
        """Raises HostedServiceError."""
        raise hosted("SamplingClient.get_telemetry()", "nothing is sent anywhere")

    def on_queue_state_change(self, queue_state: object, queue_state_reason: str | None) -> None:
        """Raises HostedServiceError."""
        raise hosted("SamplingClient.on_queue_state_change()", "there is no queue of other users to wait in")

    @property
    def holder(self) -> None:
        """Raises HostedServiceError."""
        raise hosted("SamplingClient.holder", "there is no connection to hold")

    sample_async = awaited(sample)
    compute_logprobs_async = awaited(compute_logprobs)

    async def get_base_model_async(self) -> str:
        """`get_base_model`, awaited."""
        return (await self)._source.base_model

    @property
    def _source(self) -> Source:
        return self._sampler.source

    def _begun(self) -> Source:
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


def refuse_stability_info(record_stability_info: bool) -> None:
    """Raise HostedServiceError where stability information is asked for."""
    refuse_hosted(
        "record_stability_info",
        argument(bool, record_stability_info, "record_stability_info") or None,
        "nothing records it, and the loss that reads it, stable_reinforce, is not there",
    )


# The hosted library's name for a future that may be used as the client: every client here is one.
BackcompatSamplingClientFuture = SamplingClient
