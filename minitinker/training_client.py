"""TrainingClient: train one LoRA adapter, save it, sample from it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, TypeVar

from minitinker.conform import argument
from minitinker.engine.custom_loss import CustomLoss
from minitinker.engine.request import Served
from minitinker.engine.session import Session
from minitinker.errors import BadRequestError, TinkerError
from minitinker.futures import APIFuture, ClientFuture
from minitinker.hosted import NO_ACCOUNTS, RetryConfig, hosted, refuse_hosted
from minitinker.loss_handles import LossHandle
from minitinker.model.tokenizer import Tokenizer
from minitinker.sampling_client import SamplingClient, refuse_stability_info
from minitinker.training_run import Run, checked_notes, info_of, load_into, state_of
from minitinker.twins import awaited, twin
from minitinker.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LossFnType,
    OptimParams,
    OptimStepResponse,
    SamplingClientKind,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

T = TypeVar("T")
LossFnConfig = Mapping[str, float | str]


class TrainingClient(ClientFuture):
    """One LoRA adapter in training. Made by `ServiceClient.create_lora_training_client` and its siblings.

    Every call returns at once; calls run in the order in which they were made. The client may be used right
    away, awaited, or asked for `.result()`; the last two raise what went wrong when it was made.

    Each method that returns an APIFuture has an `_async` twin that is a coroutine returning the same future; those
    that make a client have one that returns the client when it is made. The twins, and `load_state`, are what
    older scripts use; the hosted service's library warns of them.
    """

    def __init__(self, session: Session, begin: Callable[[], Run]) -> None:
        self._session = session
        self._run: Run
        self._since_step: list[APIFuture[ForwardBackwardOutput]] = []
        self._inflight: Served | None = None  # what all inflight sampling clients of this run sample from

        def begin_here() -> None:
            self._run = begin()

        super().__init__(session.worker.submit(begin_here), session.worker.thread)

    def forward(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: LossFnConfig | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Loss and logprobs of the data, without gradients.

        Args:
            data: at least one Datum. Position i of its model_input, N tokens, predicts target_tokens[i]; every
                input has shape (N,), those of cross_entropy also (N, K).
            loss_fn: "cross_entropy", "importance_sampling", "ppo", "cispo", "dro" or "gspo"; see minitinker.losses
                for the formulas. Losses are sums over tokens and datums.
            loss_fn_config: clip_low_threshold and clip_high_threshold for ppo, cispo and gspo, beta for dro. Give
                gspo thresholds nearer to 1 than its defaults, ppo's.

        The result's `loss_fn_outputs[i]["logprobs"]` has the shape of the datum's target_tokens, and
        `metrics["loss:sum"]`, also `.loss`, is the loss. Bad data raises BadRequestError naming the datum and
        the key.
        """
        items = _items(data)
        return self._ask(lambda run: run.trainer.forward(items, loss_fn, loss_fn_config))

    def forward_backward(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: LossFnConfig | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Like `forward`, and adds the gradient to what has added up since the last optim_step.

        If it fails, the gradients are as before, and an optim_step queued behind it fails too.
        """
        items = _items(data)
        return self._ask_for_gradients(
            lambda run: run.trainer.forward_backward(items, loss_fn, loss_fn_config)
        )

    def forward_backward_custom(
        self,
        data: list[Datum],
        loss_fn: CustomLoss | LossHandle,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """forward_backward with a loss of your own, differentiated by torch.

        Args:
            data: each Datum needs target_tokens, (N,) or (N, K); other inputs are yours and only passed through.
            loss_fn: (data, logprobs) -> (loss, metrics), where logprobs is a list of float32 tensors in the
                shapes of target_tokens, and loss a tensor of one number; or a LossHandle of this session. It runs
                in the worker's thread.
            loss_type_input: "logprobs", which a loss gets anyway.

        The result has your metrics and, as "loss:sum", your loss.
        """
        argument(Literal["logprobs"] | None, loss_type_input, "loss_type_input")
        handle = loss_fn if isinstance(loss_fn, LossHandle) else None
        if handle and handle.session_id != self._session.id:
            raise BadRequestError(
                f"the loss {handle.name} was made by another ServiceClient; make it with this one"
            )
        items = _items(data)

        def job(run: Run) -> ForwardBackwardOutput:
            if handle:
                handle.check(items)
            return run.trainer.forward_backward_custom(items, loss_fn)

        return self._ask_for_gradients(job)

    def optim_step(
        self, optim_params: OptimParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """One step of AdamW with the gradients that have added up, which are zero afterwards.

        Args:
            optim_params: an AdamParams.
            adam_params: its name in older scripts; give one of the two.

        The result's metrics hold the gradient's norm before clipping, "unclipped_grad_l2:mean". Raises
        BadRequestError if nothing has added up or a field of the AdamParams is out of its range. It fails too, with
        the weights as they were, if a forward_backward since the last optim_step fails of which you cannot have
        known: one whose error nobody had been told when you called this.
        """
        adam = _adam(optim_params, adam_params)
        awaited = [answer.future() for answer in self._since_step if not answer.failure_seen]
        self._since_step = []

        def step(run: Run) -> OptimStepResponse:
            for future in awaited:
                cause = TinkerError("it was cancelled") if future.cancelled() else future.exception()
                if cause is not None:
                    raise BadRequestError(
                        f"optim_step was left out, since the forward_backward before it failed: {cause}"
                    ) from cause
            return OptimStepResponse(metrics=run.trainer.optim_step(adam))

        return self._ask(step)

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Save weights, Adam's moments and the step, to go on from, as tinker://<run-id>/weights/<name>.

        Args:
            name: 1 to 200 bytes of printable text, with no slash or backslash, and no dot at its beginning.
            ttl_seconds: how long it is kept, a whole number from 1 to ten years; None: for good.
            overwrite: take the place of a checkpoint of that name, notes included; else that is a ConflictError.
            user_metadata: notes that are kept with the checkpoint.

        Where it fails (a full disk is an APIError that says so), what was there is as it was.
        """
        notes, overwrite = checked_notes(user_metadata), argument(bool, overwrite, "overwrite")

        def save(run: Run) -> SaveWeightsResponse:
            state = state_of(run, self._session.ops, notes, whole=True)
            path = self._session.store.save(run.run_id, "weights", name, state, overwrite, ttl_seconds)
            return SaveWeightsResponse(path=path)

        return self._ask(save)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Save the weights alone, a folder in PEFT's format, as tinker://<run-id>/sampler_weights/<name>.

        The arguments are those of `save_state`.
        """
        notes = checked_notes(user_metadata)

        def save(run: Run) -> SaveWeightsForSamplerResponse:
            state = state_of(run, self._session.ops, notes, whole=False)
            path = self._session.store.save(
                run.run_id, "sampler_weights", name, state, ttl_seconds=ttl_seconds
            )
            return SaveWeightsForSamplerResponse(path=path)

        return self._ask(save)

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: list[str] | None = None,
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """Save base + adapter, merged, as a Hugging Face folder: tinker://<run-id>/external_weights/<name>.

        It is managed like any other checkpoint; `RestClient.get_external_weights_urls` tells where its files
        are, and `minitinker.merge` writes such a folder anywhere else. Any library loads it, and here it is a
        base_model. name, ttl_seconds: as in `save_state`. age_encryption_recipients: None only, for nothing is
        encrypted here.
        """
        refuse_hosted(
            "age_encryption_recipients", age_encryption_recipients, "files are not encrypted; leave it out"
        )

        def save(run: Run) -> SaveWeightsExternalResponse:
            state = state_of(run, self._session.ops, None, whole=False)
            path = self._session.store.save_merged(run.run_id, name, state, run.trainer.base, ttl_seconds)
            return SaveWeightsExternalResponse(path=path)

        return self._ask(save)

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Replace the weights by those of a checkpoint; the optimizer begins anew, gradients are dropped.

        weights_access_token: None only, for there are no accounts on one machine.
        """
        refuse_hosted("weights_access_token", weights_access_token, NO_ACCOUNTS)
        return self._ask(lambda run: load_into(run, self._session.store, path, with_optimizer=False))

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Replace weights, moments and step by those of a checkpoint; gradients are dropped. See `load_state`."""
        refuse_hosted("weights_access_token", weights_access_token, NO_ACCOUNTS)
        return self._ask(lambda run: load_into(run, self._session.store, path, with_optimizer=True))

    def get_info(self) -> GetInfoResponse:
        """What is being trained: ids, base model, rank."""
        return self._ask(info_of).result()

    def get_tokenizer(self) -> Tokenizer:
        """The base model's tokenizer."""
        return self._session.tokenizer(self.result()._run.trainer.base)

    @property
    def model_id(self) -> str:
        """The id of this training run."""
        return self.result()._run.run_id

    def create_sampling_client(
        self, model_path: str, retry_config: RetryConfig | None = None, record_stability_info: bool = False
    ) -> SamplingClient:
        """A SamplingClient with the weights saved at a tinker:// path; see `ServiceClient.create_sampling_client`."""
        argument(RetryConfig | None, retry_config, "retry_config")
        refuse_stability_info(record_stability_info)
        return SamplingClient.from_path(self._session, model_path)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> SamplingClient:
        """A SamplingClient with the weights as they are at this call's turn; nothing is written to disk.

        Args:
            name: has no effect; such weights have no name.
            retry_config: a RetryConfig, for the hosted service, where calls are tried again; has no effect.
            record_stability_info: False only.
            kind: "snapshot": the client keeps these weights. "inflight": this client, and all that were made so
                before, sample from these weights until the next such call; see SamplingClient.
        """
        argument(RetryConfig | None, retry_config, "retry_config")
        refuse_stability_info(record_stability_info)
        argument(SamplingClientKind, kind, "kind")
        argument(str | None, name, "name")

        def serve() -> tuple[Run, Served]:
            run = self._begun()
            snapshot = run.trainer.snapshot()
            if kind == "snapshot":
                return run, Served(snapshot)
            if self._inflight is None:
                self._inflight = Served(snapshot)
            self._inflight.snapshot = snapshot
            return run, self._inflight

        return SamplingClient.from_run(self._session, serve)

    def get_console_url(self) -> str:
        """Raises HostedServiceError."""
        raise hosted(
            "TrainingClient.get_console_url()",
            "a RestClient lists what there is",
        )

    def get_telemetry(self) -> None:
        """Raises HostedServiceError."""
        raise hosted("TrainingClient.get_telemetry()", "nothing is sent anywhere")

    @property
    def holder(self) -> None:
        """Raises HostedServiceError."""
        raise hosted("TrainingClient.holder", "there is no connection to hold")

    forward_async = twin(forward)
    forward_backward_async = twin(forward_backward)
    forward_backward_custom_async = twin(forward_backward_custom)
    optim_step_async = twin(optim_step)
    save_state_async = twin(save_state)
    save_weights_for_sampler_async = twin(save_weights_for_sampler)
    save_weights_external_async = twin(save_weights_external)
    load_state_async = twin(load_state)
    load_state_with_optimizer_async = twin(load_state_with_optimizer)
    create_sampling_client_async = awaited(create_sampling_client)
    save_weights_and_get_sampling_client_async = awaited(save_weights_and_get_sampling_client)

    async def get_info_async(self) -> GetInfoResponse:
        """`get_info`, without blocking the event loop."""
        return await self._ask(info_of)

    def _ask(self, job: Callable[[Run], T]) -> APIFuture[T]:
        return self._session.submit(lambda: job(self._begun()))

    def _ask_for_gradients(
        self, job: Callable[[Run], ForwardBackwardOutput]
    ) -> APIFuture[ForwardBackwardOutput]:
        answer = self._ask(job)
        self._since_step.append(answer)
        return answer

    def _begun(self) -> Run:
        """The run, in the worker's thread, where it has begun already; raises what its beginning raised."""
        self._made.result()
        return self._run


def _items(data: list[Datum]) -> list[Datum]:
    """The data as they are now: what the caller does to the list or to a datum's inputs later changes nothing."""
    if not isinstance(data, list | tuple):
        return data
    return [replace(d) if isinstance(d, Datum) else d for d in data]


def _adam(optim_params: OptimParams | None, adam_params: AdamParams | None) -> AdamParams:
    """The one that was given."""
    if optim_params is not None and adam_params is not None:
        raise BadRequestError("optim_params and adam_params are two names of one thing; give one of them")
    given = adam_params if optim_params is None else optim_params
    if not isinstance(given, AdamParams):
        raise BadRequestError(
            f"optim_params is of type {type(given).__name__}; it must be an AdamParams, for AdamW is the one "
            "optimizer here"
        )
    return given


# The hosted library's name for a future that may be used as the client: every client here is one.
BackcompatTrainingClientFuture = TrainingClient
