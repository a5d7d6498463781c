"""What belongs to the hosted service and has no meaning on one machine."""

from reprlib import repr as shortened

from minitinker.errors import TinkerError

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
