"""What can go wrong, under the names that the Tinker client library uses.

    TinkerError
      APIError
        APIResponseValidationError
        APIConnectionError
          APITimeoutError            also a TimeoutError
        APIStatusError               status_code
          BadRequestError        400 also a ValueError
          AuthenticationError    401
          BillingError           402
          PermissionDeniedError  403
          NotFoundError          404 also a LookupError
          ConflictError          409
          UnprocessableEntityError 422
          RateLimitError         429
          InternalServerError    500
      RequestFailedError             request_id, category
      ServiceClosedError             also a RuntimeError, which that library raises; the name is ours

There is no server here, so an error needs a message and nothing else, and the status codes are only
there for scripts that look at them. Some kinds (billing, authentication) are never raised on one machine;
a script that catches them must still run.
"""

from enum import StrEnum


class TinkerError(Exception):
    """Base of every error that this library raises on purpose."""


class RequestErrorCategory(StrEnum):
    """Whose fault a failed request was."""

    Unknown = "unknown"
    Server = "server"
    User = "user"


class APIError(TinkerError):
    """A call that could not be served. `message` is the text; `response` and `body` are None unless given."""

    def __init__(self, message: str, *, response: object = None, body: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.response = response
        self.body = body


class APIResponseValidationError(APIError):
    """An answer that is not of the expected form."""

    status_code: int = 500


class APIConnectionError(APIError):
    """What should have served the call cannot be reached."""


class APITimeoutError(APIConnectionError, TimeoutError):
    """A call that took too long."""


class APIStatusError(APIError):
    """A call that was answered with an error status."""

    status_code: int = 500


class BadRequestError(APIStatusError, ValueError):
    """400: an argument is wrong."""

    status_code = 400


class AuthenticationError(APIStatusError):
    """401: credentials are missing or wrong."""

    status_code = 401


class BillingError(APIStatusError):
    """402: the account cannot pay."""

    status_code = 402


class PermissionDeniedError(APIStatusError):
    """403: not allowed."""

    status_code = 403


class NotFoundError(APIStatusError, LookupError):
    """404: no such model, run or checkpoint."""

    status_code = 404


class ConflictError(APIStatusError):
    """409: the state of things does not allow it, for instance a name that is taken."""

    status_code = 409


class UnprocessableEntityError(APIStatusError):
    """422: well formed, but it makes no sense."""

    status_code = 422


class RateLimitError(APIStatusError):
    """429: too many calls."""

    status_code = 429


class InternalServerError(APIStatusError):
    """500: a fault of this library."""

    status_code = 500


class RequestFailedError(TinkerError):
    """A call was accepted, and its work failed later."""

    def __init__(self, message: str, request_id: str, category: RequestErrorCategory) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.category = category

    def __reduce__(self) -> tuple[type["RequestFailedError"], tuple[str, str, RequestErrorCategory]]:
        # An exception is pickled with the arguments of Exception.__init__: here one of three.
        return type(self), (self.message, self.request_id, self.category)


class ServiceClosedError(TinkerError, RuntimeError):
    """A call on a ServiceClient that was closed, or on a client that it made."""

    def __init__(self, message: str = "the ServiceClient is closed; make a new one") -> None:
        super().__init__(message)


class ExperimentalWarning(FutureWarning):
    """The hosted library warns so of calls that may change; scripts silence it. Nothing here warns."""
