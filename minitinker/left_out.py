"""What the hosted service's library has and this package leaves out, and why.

The rest of its names are here; `python tests/test_surface.py` prints this table, and a test holds it to be whole.
"""

import sys

# Why -> the names, below `tinker`.
LEFT_OUT = {
    "a request or an answer on the wire; a call takes and returns what stands in its signature": """
        types.CopyWeightsRequest types.CopyWeightsResponse types.CreateCustomLossRequest
        types.CreateCustomLossResponse types.CreateModelRequest types.CreateModelResponse
        types.CreateSamplingSessionRequest types.CreateSamplingSessionResponse types.CreateSessionRequest
        types.CreateSessionResponse types.CustomLossGraph types.CustomLossNode types.ForwardBackwardInput
        types.ForwardBackwardRequest types.ForwardRequest types.GetCurrentCheckpointStorageUsageRequest
        types.GetInfoRequest types.JoinSamplingSessionRequest types.JoinSamplingSessionResponse
        types.LoadWeightsRequest types.OptimStepRequest types.SampleRequest types.SaveWeightsExternalRequest
        types.SaveWeightsExternalResponseInternal types.SaveWeightsForSamplerRequest
        types.SaveWeightsForSamplerResponseInternal types.SaveWeightsRequest types.UnloadModelRequest
        types.UnloadModelResponse OptimStepRequest SampleRequest""",
    "how a hosted call is asked for its result again and again; here its future has it": """
        types.FutureCompletion types.FutureFailed types.FutureFinished types.FutureRetrieveRequest
        types.FutureRetrieveResponse types.FuturesRetrieveRequest types.FuturesRetrieveResponse
        types.RequestFailedResponse types.RequestID types.SamplingSessionFuturesTarget types.UntypedAPIFuture""",
    "how a session of the hosted service is kept alive, ends and is searched for": """
        types.SessionHeartbeatRequest types.SessionHeartbeatResponse types.SessionStatus types.SessionActive
        types.SessionCancelled types.SessionFailed types.SessionFailedReason types.SessionFailedRequestReason
        types.SessionFailedSamplingSessionReason types.SessionFailedTrainingRunReason types.ClientSessionFinished
        types.ClientSessionFinishErrored types.ClientSessionFinishInterrupted types.ClientSessionFinishReason
        types.ClientSessionFinishReasonType types.ClientSessionFinishSuccess types.SessionStatusQuery
        types.ActiveSessionStatusQuery types.CancelledSessionStatusQuery types.ClientFinishedSessionStatusQuery
        types.FailedSessionStatusQuery types.SessionSearchCursor types.SessionSearchRequest
        types.SessionSearchResponse types.SessionSummary types.SearchOwner types.OwnSearchOwner
        types.UserSearchOwner types.AccessibleSearchOwner""",
    "telemetry: nothing is sent anywhere": """
        types.EventType types.SessionEndEvent types.SessionStartEvent types.Severity types.TelemetryBatch
        types.TelemetryEvent types.TelemetryResponse types.TelemetrySendRequest types.UnhandledExceptionEvent""",
    "billing: nothing is billed": """
        types.BillingEventInfo types.BillingUsageEvent types.BillingUsageResponse types.BillingUsageSession
        types.CheckpointBillingEvent types.GetBillingUsageRequest types.SamplingPrefillBillingEvent
        types.SamplingSampleBillingEvent types.StorageBillingEvent types.TrainingBillingEvent""",
    "accounts, their keys, teams and audit log: there are none": """
        types.AuditLogEntry types.AuditLogResponse types.AuthTokenResponse AdminClient auth""",
    "the connection to a server: there is none": """
        types.ClientConfigRequest types.ClientConfigResponse types.ClientDynamicConfigResponse types.HealthResponse
        Timeout RequestOptions APIResponse AsyncAPIResponse SamplingClient.create""",
}

WHY = {name: reason for reason, names in LEFT_OUT.items() for name in names.split()}


def no_attribute(module: str, name: str) -> AttributeError:
    """The error to raise for a name that `module`, minitinker or minitinker.types, does not have."""
    path = f"{module}.{name}"
    why = WHY.get(path.removeprefix("minitinker."))
    said = f"module {module!r} has no attribute {name!r}" if why is None else f"{path} is left out ({why})"
    return AttributeError(said, name=name, obj=sys.modules[module])
