"""ServiceClient: where every script begins."""

import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from reprlib import repr as shortened
from types import TracebackType
from typing import Any, Literal, Self

from minitinker.backend import load_backend, storage_folder
from minitinker.conform import argument
from minitinker.engine.fitting import check_room
from minitinker.engine.origin import read_origin
from minitinker.engine.runs import new_record
from minitinker.engine.session import Session
from minitinker.engine.trainer import Trainer
from minitinker.errors import BadRequestError, ServiceClosedError
from minitinker.futures import APIFuture
from minitinker.hosted import NO_ACCOUNTS, RetryConfig, check_connection, hosted, refuse_hosted
from minitinker.listing import server_capabilities
from minitinker.loss_handles import LossHandle, PerDatumLossFn, trace_loss
from minitinker.model.adapter import AdapterSpec, adapter_spec, check_seed
from minitinker.model.weights import lasting_name
from minitinker.rest_client import RestClient
from minitinker.sampling_checks import check_whole
from minitinker.sampling_client import SamplingClient, refuse_stability_info
from minitinker.training_client import TrainingClient
from minitinker.training_run import Run, checked_notes, restore
from minitinker.twins import awaited, twin
from minitinker.types import (
    AdamOptimizerConfig,
    CustomLossInputRank,
    GetServerCapabilitiesResponse,
    OptimizerConfig,
)

# What HTTP clients are told; there is none here.
_OF_CONNECTIONS = {
    "timeout",
    "max_retries",
    "default_headers",
    "default_query",
    "http_client",
    "_strict_response_validation",
}


class ServiceClient:
    """Makes training and sampling clients that share one worker thread and one copy of each base model.

    Args:
        user_metadata: notes that are kept with what this service makes, its session.
        backend: "reference" (NumPy) or "kernels" (Triton); None takes $MINITINKER_BACKEND, else "kernels" where
            torch sees a GPU, else "reference"; that, too, with a warning, where they do not fit the GPU.
        device: "cuda:0", "cuda:1", ... for the kernels; None: the first one. "cpu" for the reference.
        dtype: of base weights and activations on a GPU: "bfloat16", the default, or "float32".
        recompute: whether the backward forms a layer's activations again instead of keeping them; None: where
            they would not fit into memory otherwise.
        cache_bytes: of the keys and values that sampling from one base model holds at most; None: half of the memory
            that is free when the base is loaded. Samples that find no room wait; one that never can is told so.
        project_id, display_name, base_url, api_key, default_headers_overrides, and from older scripts timeout,
            max_retries, default_headers, default_query, http_client: how the hosted service is reached, and under
            which names a session is shown there. They have no effect here. Any other argument is a TypeError.

    Checkpoints live in $MINITINKER_HOME, else in ~/.minitinker. As a context manager it closes at the end: after all
    that was asked for, or, if an exception ends it, after the call at hand.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        backend: str | None = None,
        device: str | None = None,
        dtype: Literal["bfloat16", "float32"] | None = None,
        recompute: bool | None = None,
        cache_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(set(kwargs) - _OF_CONNECTIONS)
        if unknown:
            raise TypeError(f"ServiceClient takes no argument {unknown[0]!r}")
        check_connection(project_id=project_id, display_name=display_name, base_url=base_url, api_key=api_key)
        argument(dict[str, str] | None, default_headers_overrides, "default_headers_overrides")
        self._recompute = argument(bool | None, recompute, "recompute")
        if cache_bytes is not None:
            cache_bytes = check_whole("cache_bytes", cache_bytes, 1)
        ops = load_backend(backend, device, dtype)
        self._session = Session(ops, storage_folder(), checked_notes(user_metadata), cache_bytes)

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> TrainingClient:
        """Begin to train a new adapter: W + (32 / rank) B A on the linears asked for.

        Args:
            base_model: "minitinker/tiny", a local folder, or a name on the Hugging Face hub.
            rank: rows of A and columns of B.
            seed: makes the initial A the same each time; B is zero.
            train_mlp, train_attn, train_unembed: adapt the MLPs, the attention's four linears, the head.
            user_metadata: notes that are kept with the run.
            optimizer: None or AdamOptimizerConfig().
        """
        check_optimizer(optimizer)
        name, notes = lasting_name(base_model), checked_notes(user_metadata)
        flags = {"train_attn": train_attn, "train_mlp": train_mlp, "train_unembed": train_unembed}
        for flag, value in flags.items():
            flags[flag] = argument(bool, value, flag)
        check_seed(seed)

        def begin() -> Run:
            base = self._session.load_base(name)
            spec = adapter_spec(base.config, rank, **flags)
            return self._run(name, self._trainer(name, spec, seed), notes)

        return TrainingClient(self._session, begin)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> TrainingClient:
        """Begin a new run from a checkpoint's weights; the optimizer begins anew.

        Args:
            path: a tinker:// path; or a local folder: a checkpoint's, or an adapter in PEFT's format that was made
                elsewhere, of float32, float16 or bfloat16. What such an adapter asks for and is not supported (DoRA,
                rank_pattern, some layers only, ...) is refused by the field's name; its dropout is not applied.
            base_model: must be the one that the checkpoint names. It stands in where that is a folder that is not
                on this machine, and says what the base is where a PEFT folder names none.
            user_metadata: notes that are kept with the new run.
            weights_access_token: None only, for there are no accounts on one machine.
            optimizer: None or AdamOptimizerConfig().
        """
        check_optimizer(optimizer)
        return self._from_state(path, base_model, user_metadata, weights_access_token, False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Begin a new run that goes on where the checkpoint's run stood: weights, moments and step.

        The arguments are those of `create_training_client_from_state`.
        """
        return self._from_state(path, base_model, user_metadata, weights_access_token, True)

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> APIFuture[str]:
        """Copy a checkpoint into a new run of this session; the result is the copy's path.

        See `RestClient.copy_weights`.
        """
        return self.create_rest_client().copy_weights(
            path, ttl_seconds=ttl_seconds, weights_access_token=weights_access_token
        )

    def create_rest_client(self) -> RestClient:
        """A RestClient on this service's storage."""
        return RestClient(self._session)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """A SamplingClient on saved weights or on a base model.

        Args:
            model_path: a tinker:// path.
            base_model: as in `create_lora_training_client`; beside a model_path, the one these were trained on.
            retry_config: a RetryConfig, for the hosted service, where calls are tried again; has no effect.
            record_stability_info: False only.
        """
        argument(RetryConfig | None, retry_config, "retry_config")
        refuse_stability_info(record_stability_info)
        if model_path is not None:
            return SamplingClient.from_path(self._session, model_path, base_model)
        if base_model is not None:
            return SamplingClient.from_base(self._session, base_model)
        raise BadRequestError("model_path and base_model are None; give one of the two")

    def create_custom_loss(
        self, fn: PerDatumLossFn, input_ranks: Mapping[str, CustomLossInputRank]
    ) -> APIFuture[LossHandle]:
        """Make a loss of one datum into a handle for `TrainingClient.forward_backward_custom`.

        Args:
            fn: (logprobs, *inputs) -> (loss, metrics): a tensor of one number, and a dict of such by the names
                custom/<name>:sum or custom/<name>:mean, which says how they combine. logprobs has the shape of
                the datum's target_tokens; each further parameter names a key of loss_fn_inputs. It is traced by
                torch.fx: it may call torch and math alone, and not branch on the values of tensors.
            input_ranks: of each parameter, logprobs too: 0 for a number, 1 for (N,), 2 for (N, K).

        The losses of the datums are added up. Raises BadRequestError at once for what breaks these rules.
        """
        made: Future[LossHandle] = Future()
        made.set_result(trace_loss(fn, input_ranks, self._session.id))
        return APIFuture(made)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The base model that is always there. Any local folder or hub name of a supported architecture works too."""
        return server_capabilities()

    def close(
        self, status: Literal["success", "errored", "interrupted"] = "success", detail: str | None = None
    ) -> APIFuture[None]:
        """End the worker: on "success" after all that was asked for, else after the call at hand.

        The clients of this service are of no use afterwards. A program that ends without closing does the same
        by itself. detail is for the hosted service's records.
        """
        argument(Literal["success", "errored", "interrupted"], status, "status")
        argument(str | None, detail, "detail")
        self._session.worker.close(finish=status == "success")
        closed: Future[None] = Future()
        closed.set_result(None)
        return APIFuture(closed)

    def __enter__(self) -> Self:
        if self._session.worker.closed:
            raise ServiceClosedError
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close("success" if exc_type is None else "errored")

    def get_console_url(self) -> str:
        """Raises HostedServiceError."""
        raise hosted(
            "ServiceClient.get_console_url()",
            "a RestClient lists what there is",
        )

    def get_telemetry(self) -> None:
        """Raises HostedServiceError."""
        raise hosted("ServiceClient.get_telemetry()", "nothing is sent anywhere")

    @property
    def holder(self) -> None:
        """Raises HostedServiceError."""
        raise hosted("ServiceClient.holder", "there is no connection to hold")

    create_lora_training_client_async = awaited(create_lora_training_client)
    create_training_client_from_state_async = awaited(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = awaited(
        create_training_client_from_state_with_optimizer
    )
    create_sampling_client_async = awaited(create_sampling_client)
    get_server_capabilities_async = twin(get_server_capabilities)

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        weights_access_token: str | None,
        with_optimizer: bool,
    ) -> TrainingClient:
        refuse_hosted("weights_access_token", weights_access_token, NO_ACCOUNTS)
        notes = checked_notes(user_metadata)
        given = None if base_model is None else lasting_name(base_model)

        def begin() -> Run:
            state = read_origin(path, self._session.store, given, self._session.load_base)
            trainer = self._trainer(state.base_model, state.spec, 0)
            restore(trainer, state, path, with_optimizer)
            return self._run(state.base_model, trainer, notes)

        return TrainingClient(self._session, begin)

    def _trainer(self, base_model: str, spec: AdapterSpec, seed: int | None) -> Trainer:
        base, ops = self._session.load_base(base_model), self._session.ops
        check_room(spec, ops.DEVICE, ops.free_memory())
        return Trainer(ops, base, spec, seed, self._recompute)

    def _run(self, base_model: str, trainer: Trainer, notes: dict[str, str] | None) -> Run:
        """A new run, noted in storage."""
        run, session = Run(uuid.uuid4().hex, base_model, trainer), self._session
        record = new_record(
            base_model,
            trainer.spec.rank,
            session_id=session.id,
            user_metadata=notes,
            session_metadata=session.user_metadata,
        )
        session.store.note_run(run.run_id, record)
        return run


def check_optimizer(optimizer: OptimizerConfig | None) -> None:
    """Raise unless it is None or AdamOptimizerConfig()."""
    if optimizer is not None and not isinstance(optimizer, AdamOptimizerConfig):
        raise BadRequestError(
            f"optimizer is {shortened(optimizer)}; it must be None or AdamOptimizerConfig()"
        )
