"""ServiceClient: where every script begins."""

import uuid
from concurrent.futures import Future
from numbers import Integral
from typing import Literal

from minitinker.backend import load_backend, storage_folder
from minitinker.conform import conform
from minitinker.engine.checkpoints import SavedState
from minitinker.engine.session import Session
from minitinker.engine.trainer import Trainer
from minitinker.errors import BadRequestError
from minitinker.futures import APIFuture
from minitinker.model.adapter import AdapterSpec, adapter_spec
from minitinker.model.config import read_config
from minitinker.model.weights import EMBEDDED_MODEL, find_model, lasting_name
from minitinker.sampling_client import SamplingClient
from minitinker.training_client import Run, TrainingClient, restore
from minitinker.types import GetServerCapabilitiesResponse, SupportedModel


class ServiceClient:
    """Makes training and sampling clients that share one worker thread and one copy of each base model.

    Args:
        user_metadata: notes that are saved with every checkpoint.
        backend: "reference" (NumPy) or "kernels" (Triton); None takes $MINITINKER_BACKEND, else "kernels" where
            torch sees a GPU, else "reference".
        device: "cuda:0", "cuda:1", ... for the kernels; None: the first one.
        dtype: of base weights and activations on a GPU: "bfloat16", the default, or "float32".
        recompute: whether the backward forms a layer's activations again instead of keeping them; None: where
            they would not fit into memory otherwise.

    Checkpoints live in $MINITINKER_HOME, else in ~/.minitinker.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        *,
        backend: str | None = None,
        device: str | None = None,
        dtype: Literal["bfloat16", "float32"] | None = None,
        recompute: bool | None = None,
    ) -> None:
        self._user_metadata = _checked(user_metadata)
        self._recompute = conform(bool | None, recompute, "recompute")
        self._session = Session(load_backend(backend, device, dtype), storage_folder())

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
    ) -> TrainingClient:
        """Begin to train a new adapter: W + (32 / rank) B A on the linears asked for.

        Args:
            base_model: "minitinker/tiny", a local folder, or a name on the Hugging Face hub.
            rank: rows of A and columns of B.
            seed: makes the initial A the same each time; B is zero.
            train_mlp, train_attn, train_unembed: adapt the MLPs, the attention's four linears, the head.
            user_metadata: notes that are saved with the run's checkpoints.
        """

        name, notes = lasting_name(base_model), _checked(user_metadata)
        if seed is not None and (not isinstance(seed, Integral) or seed < 0):
            raise BadRequestError(f"seed is {seed!r}; it must be a whole number of at least 0, or None")

        def begin() -> Run:
            base = self._session.load_base(name)
            spec = adapter_spec(base.config, rank, train_attn, train_mlp, train_unembed)
            return self._run(name, spec, seed, notes)

        return TrainingClient(self._session, begin)

    def create_training_client_from_state(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> TrainingClient:
        """Begin a new run from a checkpoint's weights; the optimizer begins anew."""
        return self._from_state(path, user_metadata, with_optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> TrainingClient:
        """Begin a new run that goes on where the checkpoint's run stood: weights, moments and step."""
        return self._from_state(path, user_metadata, with_optimizer=True)

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None, retry_config: object = None
    ) -> SamplingClient:
        """A SamplingClient on saved weights (a tinker:// path) or on a base model; exactly one of the two.

        retry_config is for the hosted service: there is no network here, and nothing to try again.
        """
        if model_path is not None and base_model is None:
            return SamplingClient.from_path(self._session, model_path)
        if base_model is not None and model_path is None:
            return SamplingClient.from_base(self._session, base_model)
        raise BadRequestError(
            f"model_path is {model_path!r} and base_model is {base_model!r}; give one of the two"
        )

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The base model that is always there. Any local folder or hub name of a supported architecture works too."""
        config = read_config(find_model(EMBEDDED_MODEL))
        model = SupportedModel(
            model_name=EMBEDDED_MODEL,
            max_context_length=config.max_position_embeddings,
            trainable=True,
            sampleable=True,
        )
        return GetServerCapabilitiesResponse(supported_models=[model])

    def close(
        self, status: Literal["success", "errored", "interrupted"] = "success", detail: str | None = None
    ) -> APIFuture[None]:
        """End the worker: on "success" after all that was asked for, else after the call at hand.

        The clients of this service are of no use afterwards. A program that ends without closing does the same
        by itself. detail is for the hosted service's records.
        """
        if status not in ("success", "errored", "interrupted"):
            raise BadRequestError(f"status is {status!r}; it must be success, errored or interrupted")
        self._session.worker.close(finish=status == "success")
        closed: Future[None] = Future()
        closed.set_result(None)
        return APIFuture(closed)

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
    ) -> TrainingClient:
        """`create_lora_training_client`, awaited."""
        return await self.create_lora_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata
        )

    async def create_training_client_from_state_async(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> TrainingClient:
        """`create_training_client_from_state`, awaited."""
        return await self.create_training_client_from_state(path, user_metadata)

    async def create_training_client_from_state_with_optimizer_async(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> TrainingClient:
        """`create_training_client_from_state_with_optimizer`, awaited."""
        return await self.create_training_client_from_state_with_optimizer(path, user_metadata)

    async def create_sampling_client_async(
        self, model_path: str | None = None, base_model: str | None = None, retry_config: object = None
    ) -> SamplingClient:
        """`create_sampling_client`, awaited."""
        return await self.create_sampling_client(model_path, base_model, retry_config)

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """`get_server_capabilities`, for scripts that await it."""
        return self.get_server_capabilities()

    def _from_state(
        self, path: str, user_metadata: dict[str, str] | None, with_optimizer: bool
    ) -> TrainingClient:
        notes = _checked(user_metadata)

        def begin() -> Run:
            state: SavedState = self._session.store.load(path)
            run = self._run(state.base_model, state.spec, 0, notes or state.user_metadata or {})
            restore(run.trainer, state, path, with_optimizer)
            return run

        return TrainingClient(self._session, begin)

    def _run(self, base_model: str, spec: AdapterSpec, seed: int | None, notes: dict[str, str]) -> Run:
        base = self._session.load_base(base_model)
        trainer = Trainer(self._session.ops, base, spec, seed, self._recompute)
        return Run(uuid.uuid4().hex, base_model, trainer, self._user_metadata | notes)


def _checked(user_metadata: dict[str, str] | None) -> dict[str, str]:
    """A copy of the notes. Raises TypeError if they are not a dict of strings."""
    return conform(dict[str, str], user_metadata or {}, "user_metadata")  # type: ignore[no-any-return]
