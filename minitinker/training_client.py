"""TrainingClient: train one LoRA adapter, save it, sample from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from minitinker.engine.checkpoints import SavedState
from minitinker.engine.session import Session
from minitinker.engine.trainer import CustomLoss, Trainer
from minitinker.errors import BadRequestError, TinkerError
from minitinker.futures import APIFuture, ClientFuture
from minitinker.model.tokenizer import Tokenizer
from minitinker.sampling_client import SamplingClient
from minitinker.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LossFnType,
    ModelData,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

T = TypeVar("T")
LossFnConfig = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A training run: its id, the base model's lasting name, the trainer, and the user's notes."""

    run_id: str
    base_model: str
    trainer: Trainer
    user_metadata: dict[str, str] | None


class TrainingClient(ClientFuture):
    """One LoRA adapter in training. Made by `ServiceClient.create_lora_training_client` and its siblings.

    Every call returns at once; calls run in the order in which they were made. The client may be used right
    away, awaited, or asked for `.result()`; the last two raise what went wrong when it was made.

    Each method that returns an APIFuture has an `_async` twin that is a coroutine returning the same future.
    """

    def __init__(self, session: Session, begin: Callable[[], Run]) -> None:
        self._session = session
        self._run: Run
        self._since_step: list[APIFuture[ForwardBackwardOutput]] = []

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
            loss_fn: "cross_entropy", "importance_sampling", "ppo", "cispo" or "dro"; see minitinker.losses for
                the formulas. Losses are sums over tokens and datums.
            loss_fn_config: clip_low_threshold and clip_high_threshold for ppo and cispo, beta for dro.

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
        self, data: list[Datum], loss_fn: CustomLoss
    ) -> APIFuture[ForwardBackwardOutput]:
        """forward_backward with a loss of your own, differentiated by torch.

        Args:
            data: each Datum needs target_tokens; other inputs are yours and only passed through.
            loss_fn: (data, logprobs) -> (loss, metrics), where logprobs is a list of float32 tensors in the
                shapes of target_tokens, and loss a tensor of one number. It runs in the worker's thread.

        The result has your metrics and, as "loss:sum", your loss.
        """
        items = _items(data)
        return self._ask_for_gradients(lambda run: run.trainer.forward_backward_custom(items, loss_fn))

    def optim_step(self, adam_params: AdamParams) -> APIFuture[OptimStepResponse]:
        """One step of AdamW with the gradients that have added up, which are zero afterwards.

        The result's metrics hold the gradient's norm before clipping, "unclipped_grad_l2:mean". Raises
        BadRequestError if nothing has added up or a field of adam_params is out of its range. It fails too, with
        the weights as they were, if a forward_backward since the last optim_step fails of which you cannot have
        known: one whose error nobody had been told when you called this.
        """
        if not isinstance(adam_params, AdamParams):
            raise BadRequestError(f"adam_params is a {type(adam_params).__name__}; it must be an AdamParams")
        awaited = [answer.future() for answer in self._since_step if not answer.failure_seen]
        self._since_step = []

        def step(run: Run) -> OptimStepResponse:
            for future in awaited:
                cause = TinkerError("it was cancelled") if future.cancelled() else future.exception()
                if cause is not None:
                    raise BadRequestError(
                        f"optim_step was left out, since the forward_backward before it failed: {cause}"
                    ) from cause
            return OptimStepResponse(metrics=run.trainer.optim_step(adam_params))

        return self._ask(step)

    def save_state(self, name: str) -> APIFuture[SaveWeightsResponse]:
        """Save weights, Adam's moments and the step, to go on from, as tinker://<run-id>/weights/<name>."""
        return self._ask(lambda run: SaveWeightsResponse(path=self._save(run, "weights", name)))

    def save_weights_for_sampler(self, name: str) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Save the weights alone, a folder in PEFT's format, as tinker://<run-id>/sampler_weights/<name>."""
        return self._ask(
            lambda run: SaveWeightsForSamplerResponse(path=self._save(run, "sampler_weights", name))
        )

    def load_state(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Replace the weights by those of a checkpoint; the optimizer begins anew, gradients are dropped."""
        return self._ask(lambda run: self._load(run, path, with_optimizer=False))

    def load_state_with_optimizer(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Replace weights, moments and step by those of a checkpoint; gradients are dropped."""
        return self._ask(lambda run: self._load(run, path, with_optimizer=True))

    def get_info(self) -> GetInfoResponse:
        """What is being trained: ids, base model, rank."""
        return self._ask(_info).result()

    def get_tokenizer(self) -> Tokenizer:
        """The base model's tokenizer."""
        return self._session.tokenizer(self.result()._run.trainer.base)

    def create_sampling_client(self, model_path: str, retry_config: object = None) -> SamplingClient:
        """A SamplingClient with the weights saved at a tinker:// path.

        retry_config is for the hosted service: there is no network here, and nothing to try again.
        """
        return SamplingClient.from_path(self._session, model_path)

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, retry_config: object = None
    ) -> SamplingClient:
        """A SamplingClient with the weights as they are at this call's turn; nothing is written to disk.

        name and retry_config are the hosted service's: such weights have no name, and nothing is tried again.
        """
        return SamplingClient.from_run(self._session, lambda: self._begun())

    async def forward_async(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: LossFnConfig | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: LossFnConfig | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward(data, loss_fn, loss_fn_config)

    async def forward_backward_custom_async(
        self, data: list[Datum], loss_fn: CustomLoss
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward_custom(data, loss_fn)

    async def optim_step_async(self, adam_params: AdamParams) -> APIFuture[OptimStepResponse]:
        return self.optim_step(adam_params)

    async def save_state_async(self, name: str) -> APIFuture[SaveWeightsResponse]:
        return self.save_state(name)

    async def save_weights_for_sampler_async(self, name: str) -> APIFuture[SaveWeightsForSamplerResponse]:
        return self.save_weights_for_sampler(name)

    async def load_state_async(self, path: str) -> APIFuture[LoadWeightsResponse]:
        return self.load_state(path)

    async def load_state_with_optimizer_async(self, path: str) -> APIFuture[LoadWeightsResponse]:
        return self.load_state_with_optimizer(path)

    async def get_info_async(self) -> GetInfoResponse:
        return await self._ask(_info)

    async def create_sampling_client_async(
        self, model_path: str, retry_config: object = None
    ) -> SamplingClient:
        return await self.create_sampling_client(model_path, retry_config)

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, retry_config: object = None
    ) -> SamplingClient:
        return await self.save_weights_and_get_sampling_client(name, retry_config)

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

    def _save(self, run: Run, kind: Any, name: str) -> str:
        trainer, ops = run.trainer, self._session.ops
        whole = kind == "weights"
        state = SavedState(
            spec=trainer.spec,
            flat=ops.to_numpy(trainer.flat),
            base_model=run.base_model,
            m=ops.to_numpy(trainer.m) if whole else None,
            v=ops.to_numpy(trainer.v) if whole else None,
            step=trainer.step,
            user_metadata=run.user_metadata,
        )
        return self._session.store.save(run.run_id, kind, name, state)

    def _load(self, run: Run, path: str, with_optimizer: bool) -> LoadWeightsResponse:
        state = self._session.store.load(path)
        if state.base_model != run.base_model:
            raise BadRequestError(
                f"{path} was trained on {state.base_model}, and this run trains {run.base_model}"
            )
        restore(run.trainer, state, path, with_optimizer)
        return LoadWeightsResponse(path=path, model_id=run.run_id)


def restore(trainer: Trainer, state: SavedState, path: str, with_optimizer: bool) -> None:
    """Put a checkpoint into a trainer of the same shape. Raises BadRequestError if it does not fit."""
    if state.spec != trainer.spec:
        raise BadRequestError(
            f"{path} holds an adapter of rank {state.spec.rank} on {len(state.spec.shapes)} linears, this run "
            f"trains rank {trainer.spec.rank} on {len(trainer.spec.shapes)}; "
            "create_training_client_from_state makes a run that fits"
        )
    if not with_optimizer:
        trainer.restore(state.flat, None, None, 0)
    elif state.m is None or state.v is None:
        raise BadRequestError(f"{path} holds no optimizer state; save_state writes it, or use load_state")
    else:
        trainer.restore(state.flat, state.m, state.v, state.step)


def _info(run: Run) -> GetInfoResponse:
    spec, config = run.trainer.spec, run.trainer.base.config
    data = ModelData(
        arch=config.architecture,
        model_name=run.base_model,
        tokenizer_id=run.base_model,
        model_id=run.run_id,
        lora_rank=spec.rank,
    )
    return GetInfoResponse(
        model_data=data,
        model_id=run.run_id,
        is_lora=True,
        lora_rank=spec.rank,
        model_name=run.base_model,
        type="get_info",
    )


def _items(data: list[Datum]) -> list[Datum]:
    """The data as they are now: what the caller does to the list or to a datum's inputs later changes nothing."""
    if not isinstance(data, list | tuple):
        return data
    return [Datum(d.model_input, d.loss_fn_inputs) if isinstance(d, Datum) else d for d in data]
