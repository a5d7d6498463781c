"""A conversation as text: chat templates, the Jinja programs that come with a model.

A template is code from whoever published the model, so it runs in Jinja's immutable sandbox and sees plain
JSON values only: nothing that it is given has a method worth calling. What it may use besides is what
transformers offers: `raise_exception`, `strftime_now`, a `tojson` that escapes nothing, `break` and
`continue`, and `{% generation %} ... {% endgeneration %}` around the text that the assistant wrote.
"""

import dataclasses
import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minitinker.errors import BadRequestError

Message = Mapping[str, Any]
Span = tuple[int, int]

# The names under which models and services hand over what the model thought before it answered.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GENERATION_MARK = "generation_mark"
_GENERATION_TAGS = {"generation"}


def choose_template(own: str | Mapping[str, str] | None, asked: str | None, has_tools: bool) -> str:
    """The template to use: what is asked for (a template, or the name of one of several own ones), else the own.

    Of several own ones that is "tool_use" where there are tools, else "default". BadRequestError for none.
    """
    named = own if isinstance(own, Mapping) else {}
    if asked is not None:
        return named.get(asked, asked)
    if isinstance(own, str):
        return own
    template = named.get("tool_use") if has_tools else None
    template = template or named.get("default")
    if template is None:
        names = f"; it has {', '.join(sorted(named))}" if named else ""
        raise BadRequestError(
            f"this tokenizer has no default chat template{names}; give one as chat_template=, or set"
            " tokenizer.chat_template"
        )
    return template


def render(
    template: str,
    conversation: Sequence[Message],
    variables: Mapping[str, Any],
    continue_final_message: bool | str = False,
) -> str:
    """The conversation as one text.

    `variables` is what the template sees besides `messages`. Messages lose fields that are None, and their
    reasoning gets the name that templates read. With `continue_final_message` the text ends where the last
    message ends, without what would close it; a string names the field to continue instead of "content".
    Raises BadRequestError where the template fails or refuses, or an input is not fit for it.
    """
    messages = _messages(conversation)
    if not continue_final_message:
        return _run(template, messages, variables)
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    mark = _new_mark()
    # The space behind the mark tells whether the template trims its messages: then it is gone afterwards.
    text = _append_to_final_message(messages[-1], field, f"{mark} ")
    before, found, after = _run(template, messages, variables).rpartition(mark)
    if not found or text.strip() not in before:
        raise BadRequestError(
            f"continue_final_message cannot continue {field!r}: the chat template leaves it out or changes it"
        )
    return before if after.startswith(" ") else before.rstrip()


def render_with_spans(
    template: str, conversation: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """The conversation as one text, and which characters of it the assistant wrote, as [start, end) pairs.

    The template says so with `{% generation %}`; BadRequestError where it never does.
    """
    if "endgeneration" not in template:
        raise BadRequestError(
            "return_assistant_tokens_mask needs a chat template that puts what the assistant writes into"
            " {% generation %} ... {% endgeneration %}; this one does not"
        )
    mark = _new_mark()
    marked = _run(template, _messages(conversation), {**variables, _GENERATION_MARK: mark})
    spans = []
    position = 0
    pieces = marked.split(mark)  # outside, inside, outside, ..., inside, outside
    for index, piece in enumerate(pieces):
        if index % 2:
            spans.append((position, position + len(piece)))
        position += len(piece)
    return "".join(pieces), spans


def assistant_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token that has a character of a span, else 0. offsets: the characters of each token."""
    return [int(any(first < end and last > start for start, end in spans)) for first, last in offsets]


def to_plain(value: Any) -> Any:
    """A copy of None, bool, int, float, str, list, tuple and dict alone, which a template cannot misuse.

    Dataclasses and Pydantic models become dicts, NumPy scalars Python's. BadRequestError for anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return to_plain(value.item())
    # A subclass may bring methods along, so it is taken back to its base.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(to_plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return to_plain(value.model_dump())
    raise BadRequestError(
        f"a chat template was given a {type(value).__name__}; messages, tools, documents and template"
        " variables are made of strings, numbers, booleans, None, lists and dicts"
    )


def _messages(conversation: Sequence[Message]) -> list[dict[str, Any]]:
    messages = to_plain(list(conversation))
    if not messages:
        raise BadRequestError("the conversation is empty; it needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRequestError(
                f"message {index} is a {type(message).__name__}; a message is a dict such as"
                ' {"role": "user", "content": "Hello"}'
            )
    return [_with_reasoning({k: v for k, v in message.items() if v is not None}) for message in messages]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    for name in _REASONING:
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _append_to_final_message(message: dict[str, Any], field: str, ending: str) -> str:
    """Append to the text of one field, in place (under all its names); returns the text that was there."""
    value = message.get(field)
    if isinstance(value, list):  # content in parts: the last part that is text
        for part in reversed(value):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text: str = part["text"]
                part["text"] = text + ending
                return text
    if not isinstance(value, str):
        raise BadRequestError(
            f"continue_final_message: the last message has no text in {field!r} to continue"
        )
    names = [name for name in _REASONING if message.get(name) == value] if field in _REASONING else [field]
    message.update(dict.fromkeys(names, value + ending))
    return value


def _new_mark() -> str:
    """A text that no message holds: a Unicode noncharacter on both sides of a random number."""
    return f"\ufdd0{secrets.token_hex(8)}\ufdd0"


def _run(template: str, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
    if "messages" in variables:
        raise BadRequestError("messages is not a template variable to set: it is the conversation itself")
    try:
        return _compile(template).render({**to_plain(variables), "messages": messages})
    except jinja2.TemplateError as error:
        raise BadRequestError(f"the chat template failed: {error}") from error
    except Exception as error:  # whatever a foreign program runs into, such as None + str
        raise BadRequestError(f"the chat template failed: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise BadRequestError(
            f"the chat template is wrong at line {error.lineno}: {error.message}"
        ) from error


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # the type itself would hand out dict.update
        namespace=_PublicNamespace,
    )
    return environment


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: its text, with the mark on both sides if one was given."""

    tags = _GENERATION_TAGS

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_between_marks", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _between_marks(self, context: Context, caller: Macro) -> str:
        mark = context.get(_GENERATION_MARK, "")
        return f"{mark}{caller()}{mark}"


class _PublicNamespace(Namespace):
    """Jinja's namespace, without names such as `__call__`, by which a template could get past the sandbox."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}, which starts with '_'")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
