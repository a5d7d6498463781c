"""RestClient: look at what is in storage, and manage it. What needs a hosted account says so and does nothing."""

import socket
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, date, datetime
from reprlib import repr as shortened
from typing import Any, Literal, TypeVar

from minitinker.backend import storage_folder
from minitinker.conform import argument
from minitinker.engine.checkpoints import CheckpointStore, check_name
from minitinker.engine.runs import user_name
from minitinker.engine.session import Session
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.futures import APIFuture
from minitinker.hosted import NO_ACCOUNTS, check_connection, hosted, refuse_hosted
from minitinker.listing import (
    checkpoints,
    page,
    server_capabilities,
    sessions,
    storage_usage,
    training_run,
    training_runs,
    weights_info,
)
from minitinker.samplers import living_samplers
from minitinker.twins import awaited
from minitinker.types import (
    CheckpointsListResponse,
    CurrentCheckpointStorageUsageResponse,
    ExternalWeightsUrlsResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ModelID,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)

T = TypeVar("T")
Scope = Literal["owned", "accessible"]

_NO_PROJECTS = "there is one storage folder and there are no projects"
_NO_BILL = "nothing is billed or audited; get_current_checkpoint_storage_usage() tells what checkpoints take"


class RestClient:
    """Training runs and checkpoints of the storage folder, $MINITINKER_HOME or ~/.minitinker.

    Made by `ServiceClient.create_rest_client()`, or by `RestClient()` for storage alone. Each call does its work
    at once, whatever waits in other clients' queues, and what went wrong is raised when its result is asked for.
    Paths are tinker:// paths: BadRequestError for what is none, NotFoundError for a checkpoint that is not there
    or has expired. Each method has an `_async` twin that returns the result.

    base_url, api_key: for the hosted service; they have no effect. _holder: the session that a ServiceClient hands
    over.
    """

    def __init__(
        self, _holder: Session | None = None, *, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        check_connection(base_url=base_url, api_key=api_key)
        if _holder is not None and not isinstance(_holder, Session):
            raise BadRequestError(
                f"_holder is {shortened(_holder)}; a ServiceClient hands it over, leave it out"
            )
        self._session = _holder
        self._store = CheckpointStore(storage_folder()) if _holder is None else _holder.store

    # Training runs

    def get_training_run(
        self, training_run_id: ModelID, access_scope: Scope = "owned"
    ) -> APIFuture[TrainingRun]:
        """What a run is, and its last checkpoints. Here, all runs are one's own, whatever the scope."""
        _check_scope(access_scope)
        return _done(lambda: training_run(self._store, training_run_id))

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: Scope = "owned"
    ) -> APIFuture[TrainingRun]:
        """The run that a checkpoint is of."""
        _check_scope(access_scope)
        parse = ParsedCheckpointTinkerPath.from_tinker_path
        return _done(lambda: training_run(self._store, parse(tinker_path).training_run_id))

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned", project_id: str | None = None
    ) -> APIFuture[TrainingRunsResponse]:
        """All runs, the one last used first. project_id: None only."""
        _check_scope(access_scope)
        refuse_hosted("project_id", project_id, _NO_PROJECTS)

        def runs() -> TrainingRunsResponse:
            shown, cursor = page(training_runs(self._store), limit, offset)
            return TrainingRunsResponse(training_runs=shown, cursor=cursor)

        return _done(runs)

    # Checkpoints

    def list_checkpoints(self, training_run_id: ModelID) -> APIFuture[CheckpointsListResponse]:
        """The checkpoints of a run, the newest first. NotFoundError for a run of which nothing is known."""

        def found() -> CheckpointsListResponse:
            training_run(self._store, training_run_id)
            return CheckpointsListResponse(checkpoints=checkpoints(self._store, training_run_id))

        return _done(found)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        """The checkpoints of all runs, the newest first."""

        def found() -> CheckpointsListResponse:
            shown, cursor = page(checkpoints(self._store), limit, offset)
            return CheckpointsListResponse(checkpoints=shown, cursor=cursor)

        return _done(found)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        """Base model, rank, and which linears a checkpoint adapts."""
        return _done(lambda: weights_info(self._store, tinker_path))

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[ExternalWeightsUrlsResponse]:
        """file:// URLs of the files of a checkpoint that save_weights_external wrote.

        They hold until the checkpoint expires: where it does not, `expires` is the last time that Python knows.
        """

        def urls() -> ExternalWeightsUrlsResponse:
            folder = self._store.find(tinker_path, ["external_weights"])
            expires = self._store.info(tinker_path).expires_at or datetime.max.replace(tzinfo=UTC)
            files = {path.name: path.absolute().as_uri() for path in sorted(folder.iterdir())}
            return ExternalWeightsUrlsResponse(urls=files, expires=expires)

        return _done(urls)

    def delete_checkpoint(self, training_run_id: ModelID, checkpoint_id: str) -> APIFuture[None]:
        """Delete a checkpoint from the disk. checkpoint_id: "weights/<name>" and the like."""

        def delete() -> None:
            check_name(training_run_id, "run id")
            argument(str, checkpoint_id, "checkpoint_id")
            self._store.delete(f"tinker://{training_run_id}/{checkpoint_id}")

        return _done(delete)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Delete a checkpoint from the disk."""
        return _done(lambda: self._store.delete(tinker_path))

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copy a checkpoint of any kind into a new run; the result is the copy's path.

        Files are shared on the disk where the file system can. The copy has the source's notes, and not its expiry.
        ttl_seconds: how long it is kept, a whole number from 1 to ten years; None: for good.
        destination_project_id, weights_access_token: None only.
        """
        refuse_hosted("destination_project_id", destination_project_id, _NO_PROJECTS)
        refuse_hosted("weights_access_token", weights_access_token, NO_ACCOUNTS)
        session_id = self._session.id if self._session else None
        return _done(lambda: self._store.copy(path, ttl_seconds, session_id=session_id))

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> APIFuture[None]:
        """Let a checkpoint expire so many seconds from now, from 1 to ten years, or never (None)."""
        return _done(lambda: self._store.set_ttl(tinker_path, ttl_seconds))

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Note that a checkpoint is public, as `Checkpoint.public` then says. Nothing leaves this machine.

        ConflictError where it is public already.
        """
        return _done(lambda: self._store.set_public(tinker_path, True))

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Note that a checkpoint is private. ConflictError where it is already."""
        return _done(lambda: self._store.set_public(tinker_path, False))

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[CurrentCheckpointStorageUsageResponse]:
        """What all checkpoints take. A copy that shares its files counts like another. project_id: None only."""
        refuse_hosted("project_id", project_id, _NO_PROJECTS)
        return _done(lambda: storage_usage(self._store))

    # Sessions, samplers, and who is there

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: Scope = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """Ids of the ServiceClients that began the runs in storage, the newest first, with this client's own."""

        _check_scope(access_scope)

        def found() -> ListSessionsResponse:
            own = [self._session.id] if self._session else []
            ids = dict.fromkeys([*own, *sessions(self._store)])
            return ListSessionsResponse(sessions=page(list(ids), limit, offset)[0])

        return _done(found)

    def get_session(self, session_id: str, access_scope: Scope = "owned") -> APIFuture[GetSessionResponse]:
        """What a ServiceClient made: its runs in storage and, for this client's own, the samplers in use."""
        _check_scope(access_scope)

        def session() -> GetSessionResponse:
            argument(str, session_id, "session_id")
            runs = {run_id: one for run_id, one in self._store.runs().items() if one.session_id == session_id}
            own = self._session if self._session and self._session.id == session_id else None
            if not runs and own is None:
                raise NotFoundError(
                    f"there is no session {session_id!r:.80}; list_sessions() says which there are"
                )
            notes = own.user_metadata if own else next(iter(runs.values())).session_metadata
            return GetSessionResponse(
                training_run_ids=list(runs),
                sampler_ids=[sampler.sampler_id for sampler in living_samplers(own)] if own else [],
                user_metadata=notes,
            )

        return _done(session)

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        """What a SamplingClient of this process draws from; get_session() says which there are."""

        def sampler() -> GetSamplerResponse:
            argument(str, sampler_id, "sampler_id")
            found = [one for one in living_samplers() if one.sampler_id == sampler_id]
            if not found:
                raise NotFoundError(f"there is no sampler {sampler_id!r:.80} in this process")
            return found[0]

        return _done(sampler)

    def whoami(self) -> APIFuture[WhoamiResponse]:
        """The operating system's user on this machine, for there are no accounts."""
        return _done(
            lambda: WhoamiResponse(
                user_urn=f"local:user:{user_name()}", org_urn=f"local:machine:{socket.gethostname()}"
            )
        )

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        """The base model that is always there. Any local folder or hub name of a supported architecture works too."""
        return _done(server_capabilities)

    # What there is only with a hosted account

    def get_telemetry(self) -> None:
        raise hosted("RestClient.get_telemetry()", "nothing is sent anywhere")

    def get_audit_log(
        self,
        event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
        day: date | None = None,
    ) -> APIFuture[Any]:
        raise hosted("RestClient.get_audit_log()", _NO_BILL)

    def get_billing_usage(self, starting_on: datetime | str, ending_before: datetime | str) -> APIFuture[Any]:
        raise hosted("RestClient.get_billing_usage()", _NO_BILL)

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        raise hosted("RestClient.assign_session_project()", _NO_PROJECTS)

    def export_session_trace(self, session_id: str) -> APIFuture[str]:
        raise hosted("RestClient.export_session_trace()", "no traces are kept; profile the script itself")

    def search_sessions(self, request: object) -> APIFuture[Any]:
        raise hosted("RestClient.search_sessions()", "list_sessions() and get_session() tell all there is")

    get_training_run_async = awaited(get_training_run)
    get_training_run_by_tinker_path_async = awaited(get_training_run_by_tinker_path)
    list_training_runs_async = awaited(list_training_runs)
    list_checkpoints_async = awaited(list_checkpoints)
    list_user_checkpoints_async = awaited(list_user_checkpoints)
    get_external_weights_urls_async = awaited(get_external_weights_urls)
    delete_checkpoint_async = awaited(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = awaited(delete_checkpoint_from_tinker_path)
    copy_weights_async = awaited(copy_weights)
    set_checkpoint_ttl_from_tinker_path_async = awaited(set_checkpoint_ttl_from_tinker_path)
    publish_checkpoint_from_tinker_path_async = awaited(publish_checkpoint_from_tinker_path)
    unpublish_checkpoint_from_tinker_path_async = awaited(unpublish_checkpoint_from_tinker_path)
    get_current_checkpoint_storage_usage_async = awaited(get_current_checkpoint_storage_usage)
    list_sessions_async = awaited(list_sessions)
    get_session_async = awaited(get_session)
    get_sampler_async = awaited(get_sampler)
    get_audit_log_async = awaited(get_audit_log)
    get_billing_usage_async = awaited(get_billing_usage)
    assign_session_project_async = awaited(assign_session_project)
    export_session_trace_async = awaited(export_session_trace)


def _done(job: Callable[[], T]) -> APIFuture[T]:
    """A future that has the job's result, or what it raised."""
    future: Future[T] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return APIFuture(future)


def _check_scope(scope: str) -> None:
    argument(Scope, scope, "access_scope")
