import inspect
import pickle

import pytest
import tinker

from minitinker import errors

# Everything that takes a message; RequestFailedError wants more.
MESSAGE_ONLY = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.APIError)
]


def names(kind: type) -> list[str]:
    """`kind` and the error classes above it, nearest first, without those of Python."""
    return [base.__name__ for base in kind.__mro__ if base.__module__ not in ("builtins", "enum")]


def test_every_error_of_the_client_library_is_here_with_the_same_bases():
    public = {name: getattr(tinker, name) for name in tinker.__all__}
    theirs = {
        name: value
        for name, value in public.items()
        if inspect.isclass(value) and issubclass(value, tinker.TinkerError)
    }
    assert len(theirs) > 10
    for name, value in theirs.items():
        assert names(getattr(errors, name)) == names(value)


def test_status_codes_are_those_of_the_client_library():
    codes = {}
    for kind in MESSAGE_ONLY:
        code = getattr(getattr(tinker, kind.__name__), "status_code", None)
        if code is not None:
            codes[kind.__name__] = kind("no").status_code
            assert kind("no").status_code == code
    assert len(codes) == 8


def test_categories_of_failed_requests_are_those_of_the_client_library():
    theirs = {member.name: member.value for member in tinker.types.RequestErrorCategory}
    assert {member.name: member.value for member in errors.RequestErrorCategory} == theirs


@pytest.mark.parametrize("kind", MESSAGE_ONLY)
def test_an_error_needs_only_a_message(kind):
    error = kind("rank is 0; it must be at least 1")
    assert str(error) == error.message == "rank is 0; it must be at least 1"
    assert (error.response, error.body) == (None, None)
    assert kind("no", body={"a": 1}).body == {"a": 1}


@pytest.mark.parametrize("kind", MESSAGE_ONLY)
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("no", body={"a": 1})))
    assert type(error) is kind
    assert (str(error), error.message, error.body) == ("no", "no", {"a": 1})


def test_a_failed_request_knows_its_request_also_after_pickling():
    error = errors.RequestFailedError("no", "request-1", errors.RequestErrorCategory.User)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == again.message == "no"
    assert (again.request_id, again.category) == ("request-1", errors.RequestErrorCategory.User)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.BadRequestError, ValueError),
        (errors.NotFoundError, LookupError),
        (errors.APITimeoutError, TimeoutError),
    ],
)
def test_errors_are_also_what_python_calls_them(kind, builtin):
    with pytest.raises(builtin, match="no"):
        raise kind("no")
