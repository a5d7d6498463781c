"""What belongs to the hosted service and has no meaning on one machine."""

from dataclasses import dataclass
from reprlib import repr as shortened

from minitinker.errors import APIConnectionError, BadRequestError, TinkerError

NO_ACCOUNTS = "there are no accounts, and every checkpoint can be read; leave it out"


class HostedServiceError(TinkerError, NotImplementedError):
    """A method, argument or loss of the hosted service that nothing stands for here."""


def hosted(what: str, instead: str) -> HostedServiceError:
    """The error to raise. what: the call or argument as the user wrote it; instead: what to do here."""
    return HostedServiceError(f"{what} belongs to the hosted service; on one machine {instead}")


def refuse_hosted(argument: str, value: object, instead: str) -> None:
    """Raise HostedServiceError where an argument is given that means nothing here. See `hosted`."""
    if value is not None:
        raise hosted(f"{argument}={shortened(value)}", instead)


def check_connection(**settings: object) -> None:
    """Check what says how the hosted service is reached, and has no effect here: each must be a str or None.

    Scripts hand on what their environment holds, so it is taken. Values are not told, for some are secret.
    """
    for name, value in settings.items():
        if not isinstance(value, str | None):
            raise BadRequestError(f"{name} is of type {type(value).__name__}; it must be a str or None")


@dataclass(unsafe_hash=True)
class RetryConfig:
    """How often and when a call of the hosted service is tried again. Here it has no effect: a call runs once."""

    max_connections: int | None = 1000
    progress_timeout: float = 7200
    retry_delay_base: float = 0.5
    retry_delay_max: float = 10.0
    jitter_factor: float = 0.25
    enable_retry_logic: bool = True
    enable_stuck_detection: bool = True
    retryable_exceptions: tuple[type[Exception], ...] = (TimeoutError, APIConnectionError)

    def __post_init__(self) -> None:
        if self.max_connections is not None and self.max_connections <= 0:
            raise ValueError(f"max_connections is {self.max_connections}; it must be above 0, or None")


def is_retryable_status_code(status_code: int) -> bool:
    """Whether the hosted service's library tries a call again that was answered so."""
    return status_code in (408, 409, 429) or 500 <= status_code < 600
