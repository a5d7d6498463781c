"""The `_async` twins of the clients' methods, which older scripts await: coroutine functions of the same parameters.

The methods themselves return at once, and what they return can be awaited.
"""

from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
Twin = TypeVar("Twin")


def twin(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """One that returns what the method returns: a future, to be awaited in its turn."""

    @wraps(method)
    async def same(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    return _named(same, method, f"`{method.__name__}`, for scripts that await the call before its result.")


def awaited(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """One that returns the result of the future that the method returns."""

    @wraps(method)
    async def result(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    return _named(result, method, f"`{method.__name__}`, awaited.")


def _named(made: Twin, method: Any, doc: str) -> Twin:
    names = {"__name__": f"{method.__name__}_async", "__qualname__": f"{method.__qualname__}_async"}
    for attribute, value in (names | {"__doc__": doc}).items():
        setattr(made, attribute, value)
    return made
