"""Conversations become the text and tokens that transformers makes of them, and templates stay in their box."""

import dataclasses
import datetime
import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import LLAMA_TEMPLATE, QWEN_TEMPLATE, WRITERS
from transformers import AutoTokenizer

from minitinker.errors import BadRequestError
from minitinker.model.chat_template import assistant_mask, render, render_with_spans, to_plain
from minitinker.model.tokenizer import Tokenizer

Pair = tuple[Tokenizer, Any]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather, in <b>words</b> & ünïcode",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "  Hello 🙂  "}
REPLY = {"role": "assistant", "content": "Hi, é!  "}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER, REPLY, {"role": "user", "content": "More?"}],
    "reply": [USER, REPLY],
    "thoughts": [USER, {"role": "assistant", "reasoning_content": "Hm.", "content": "Well, yes."}],
    "old thoughts": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nWell."}, USER],
    "thinking": [USER, {"role": "assistant", "thinking": "Hm.", "content": "Well, yes."}],
    "none": [{**USER, "name": None, "tool_calls": None}, {**REPLY, "reasoning_content": None}],
    "special": [{"role": "user", "content": "a<|im_end|>b<|eot_id|>"}, {"role": "assistant", "content": ""}],
    "call": [
        USER,
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich", "days": 1.5}}}],
        },
        {"role": "tool", "content": "Rain 🌧"},
        REPLY,
    ],
}
PARTS = [
    USER,
    {"role": "assistant", "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two."}]},
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    made = {}
    for family in ("llama", "qwen", "old_qwen"):
        folder = tmp_path_factory.mktemp(family)
        WRITERS[family](folder)
        made[family] = (Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder))
        for tokenizer in made[family]:
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return made


@pytest.fixture(params=["llama", "qwen", "old_qwen"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"tools": [TOOL]},
        {"add_generation_prompt": True, "enable_thinking": False},
    ],
)
def test_text_and_tokens_are_those_of_transformers(pair: Pair, name: str, options: dict[str, Any]) -> None:
    ours, theirs = pair
    conversation = CONVERSATIONS[name]
    text = theirs.apply_chat_template(conversation, tokenize=False, **options)
    assert ours.apply_chat_template(conversation, tokenize=False, **options) == text
    out = ours.apply_chat_template(conversation, **options)
    assert out.data == theirs.apply_chat_template(conversation, **options).data
    assert ours.apply_chat_template(conversation, return_dict=False, **options) == out["input_ids"]


@given(content=st.text(), reply=st.text())
def test_any_content_is_rendered_as_transformers_does(
    pairs: dict[str, Pair], content: str, reply: str
) -> None:
    ours, theirs = pairs["qwen"]
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    for options in ({"tokenize": False}, {"return_dict": False, "chat_template": "{{ messages | tojson }}"}):
        assert ours.apply_chat_template(conversation, **options) == theirs.apply_chat_template(
            conversation, **options
        )


@pytest.mark.parametrize("kind", [None, "np", "pt"])
def test_a_batch_is_that_of_transformers(pair: Pair, kind: str | None) -> None:
    ours, theirs = pair
    batch = [*CONVERSATIONS.values()]
    options = {"padding": True, "truncation": True, "max_length": 40, "return_tensors": kind}
    for more in (
        {},
        {"tokenizer_kwargs": {"padding_side": "left"}},
        {"return_dict": False},
        {"tokenize": False},
    ):
        expected = theirs.apply_chat_template(batch, **options, **more)
        out = ours.apply_chat_template(batch, **options, **more)
        if hasattr(expected, "keys"):
            assert list(out) == list(expected)
            for key in expected:
                assert np.array_equal(out[key], expected[key])
        else:
            assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("conversation", "field"),
    [
        (CONVERSATIONS["one"], True),
        (CONVERSATIONS["reply"], True),
        (CONVERSATIONS["thoughts"], True),
        (PARTS, True),
        (CONVERSATIONS["thoughts"], "content"),
        (CONVERSATIONS["thoughts"], "reasoning_content"),
        (CONVERSATIONS["thinking"], "thinking"),
    ],
)
def test_a_final_message_is_left_open_as_transformers_does(
    pairs: dict[str, Pair], conversation: Any, field: bool | str
) -> None:
    families = (
        ["qwen"] if conversation is PARTS or "thinking" in str(field) or "reasoning" in str(field) else pairs
    )
    for family in families:
        ours, theirs = pairs[family]
        options = {"tokenize": False, "continue_final_message": field}
        text = ours.apply_chat_template(conversation, **options)
        assert text == theirs.apply_chat_template(conversation, **options)
        assert not text.endswith(("<|im_end|>\n", "<|eot_id|>"))


def test_an_open_message_needs_a_template_that_shows_its_end(pair: Pair) -> None:
    ours, theirs = pair
    for conversation, options in (
        (CONVERSATIONS["one"], {"continue_final_message": "summary"}),
        ([{**REPLY, "summary": "x"}], {"continue_final_message": "summary"}),
        (CONVERSATIONS["one"], {"continue_final_message": True, "add_generation_prompt": True}),
        (
            CONVERSATIONS["one"],
            {"continue_final_message": True, "chat_template": "{{ messages[0].content[:3] }}"},
        ),
        (
            CONVERSATIONS["one"],
            {"continue_final_message": True, "chat_template": "{{ messages[0].content|upper }}"},
        ),
    ):
        with pytest.raises(ValueError, match="continue_final_message"):
            theirs.apply_chat_template(conversation, tokenize=False, **options)
        with pytest.raises(BadRequestError, match="continue_final_message"):
            ours.apply_chat_template(conversation, tokenize=False, **options)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_assistant_mask_is_that_of_transformers(pairs: dict[str, Pair], name: str) -> None:
    ours, theirs = pairs["qwen"]
    options = {"return_assistant_tokens_mask": True}
    out = ours.apply_chat_template(CONVERSATIONS[name], **options)
    assert out.data == theirs.apply_chat_template(CONVERSATIONS[name], **options).data
    written = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    replies = [message for message in CONVERSATIONS[name] if message["role"] == "assistant"]
    assert written.count(ours.eos_token_id) == len(replies)


def test_the_assistant_mask_of_a_padded_batch_is_that_of_transformers(pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs["qwen"]
    batch = [CONVERSATIONS["one"], CONVERSATIONS["reply"], CONVERSATIONS["call"]]
    for kind in (None, "np", "pt"):
        options = {"return_assistant_tokens_mask": True, "padding": True, "return_tensors": kind}
        for conversation in (batch, batch[1]):
            out = ours.apply_chat_template(conversation, **options)
            expected = theirs.apply_chat_template(conversation, **options)
            assert list(out) == list(expected)
            assert np.array_equal(out["assistant_masks"], expected["assistant_masks"])


@given(texts=st.lists(st.text(), min_size=1, max_size=4), around=st.text())
def test_spans_hold_what_the_assistant_wrote(texts: list[str], around: str) -> None:
    template = (
        "{% for m in messages %}{{ around }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": text} for text in texts]
    rendered, spans = render_with_spans(template, messages, {"around": around})
    assert (
        rendered == "".join(around + text for text in texts) == render(template, messages, {"around": around})
    )
    assert [rendered[start:end] for start, end in spans] == texts


def test_a_token_counts_as_written_if_one_of_its_characters_is() -> None:
    offsets = [(0, 2), (2, 5), (5, 5), (5, 6), (5, 6), (6, 8), (0, 0)]
    assert assistant_mask(offsets, [(3, 6)]) == [0, 1, 1, 1, 1, 0, 0]
    assert assistant_mask(offsets, [(0, 1), (7, 8)]) == [1, 0, 0, 0, 0, 1, 0]
    assert assistant_mask(offsets, []) == [0] * 7


def test_a_template_without_generation_blocks_gives_no_mask(pairs: dict[str, Pair]) -> None:
    ours, _ = pairs["llama"]
    with pytest.raises(BadRequestError, match="generation"):
        ours.apply_chat_template(CONVERSATIONS["reply"], return_assistant_tokens_mask=True)
    with pytest.raises(BadRequestError, match="tokenize=True"):
        ours.apply_chat_template(CONVERSATIONS["reply"], return_assistant_tokens_mask=True, tokenize=False)


def test_the_template_is_chosen_as_transformers_does(tmp_path: Path) -> None:
    WRITERS["qwen"](tmp_path)
    pair = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    choices: list[dict[str, Any]] = [
        {},
        {"tools": [TOOL]},
        {"chat_template": "rag"},
        {"chat_template": "default", "tools": [TOOL]},
        {"chat_template": "{{ messages }}"},
    ]
    for own in (
        QWEN_TEMPLATE,
        {"default": "a", "rag": "b"},
        {"default": "a", "tool_use": "c", "rag": "b"},
        {"rag": "b"},
        None,
    ):
        for tokenizer in pair:
            tokenizer.chat_template = own
        ours, theirs = pair
        for choice in choices:
            try:
                expected = theirs.get_chat_template(**choice)
            except ValueError:
                with pytest.raises(BadRequestError, match="no default chat template"):
                    ours.get_chat_template(**choice)
            else:
                assert ours.get_chat_template(**choice) == expected


def test_variables_are_seen_by_the_template_and_go_before_special_tokens(pair: Pair) -> None:
    ours, theirs = pair
    options = {
        "tokenize": False,
        "chat_template": "{{ [eos_token, pad_token, day, documents, tools, messages] | tojson(indent=1) }}",
        "documents": [{"title": "é", "text": "<&>"}],
        "eos_token": "END",
        "day": {"a": [1, 2.5, True, None, ("x",)]},
    }
    assert ours.apply_chat_template([USER], **options) == theirs.apply_chat_template([USER], **options)
    with pytest.raises(BadRequestError, match="messages"):
        ours.apply_chat_template([USER], messages=[])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i > 2 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "02",
        ),
        ('{{ {"b": "<é>", "a": 1} | tojson }}', '{"b": "<é>", "a": 1}'),
        (
            '{{ {"b": "é", "a": 1} | tojson(ensure_ascii=true, sort_keys=true, separators=(",", ":")) }}',
            '{"a":1,"b":"\\u00e9"}',
        ),
        ("{% set ns = namespace(a=1) %}{% for i in [2] %}{% set ns.a = i %}{% endfor %}{{ ns.a }}", "2"),
        ("{% set ns = namespace({'a': 1}, self=2) %}{{ ns.a }}{{ ns.self }}", "12"),
        ("{{ dict(a=1, **{'b': 2}) }}", "{'a': 1, 'b': 2}"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{{ missing is defined }}{{ missing }}", "False"),
    ],
)
def test_templates_speak_the_language_of_transformers(
    pairs: dict[str, Pair], template: str, text: str
) -> None:
    ours, theirs = pairs["llama"]
    assert theirs.apply_chat_template([USER], chat_template=template, tokenize=False) == text
    assert ours.apply_chat_template([USER], chat_template=template, tokenize=False) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages | attr('__class__') | string }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__.co_filename }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.update(messages[0], role='system') }}",
        "{{ dict.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{% set ns = namespace() %}{% set ns.__call__ = f %}{{ ns(1) }}",
        "{{ namespace(__call__='{0.__class__}'.format)(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages.clear() }}",
        "{{ range(10 ** 9) | list }}",
        "{% include 'x' %}",
        "{{ self.__init__.__globals__ }}",
        "{% generation %}{{ caller.__class__ }}{{ self._TemplateReference__context.__class__ }}{% endgeneration %}",
    ],
)
def test_a_template_reaches_nothing_outside_its_sandbox(template: str) -> None:
    variables = {"tools": [TOOL]}
    messages = [dict(USER)]
    try:
        text = render(template, messages, variables)
    except BadRequestError:
        pass
    else:  # what is out of reach may also show as nothing at all
        assert text == ""
    assert messages == [USER]


def test_a_template_sees_copies_of_plain_values_only() -> None:
    class Shout(str):
        def shout(self) -> str:
            return self.upper()

    class Colour(enum.StrEnum):
        RED = "red"

    @dataclasses.dataclass
    class Point:
        x: float
        names: list[str]

    class Model:
        def model_dump(self) -> dict[str, Any]:
            return {"a": np.float32(0.5)}

    inner = [1, True, None, "é"]
    value = {"list": inner, "tuple": (1, 2), "shout": Shout("a"), "enum": Colour.RED, "bool": np.bool_(False)}
    value |= {"point": Point(1.5, ["n"]), "model": Model()}
    plain = to_plain(value)
    assert plain == {
        "list": [1, True, None, "é"],
        "tuple": (1, 2),
        "shout": "a",
        "enum": "red",
        "bool": False,
        "point": {"x": 1.5, "names": ["n"]},
        "model": {"a": 0.5},
    }
    assert plain["list"] is not inner
    assert {type(plain[key]) for key in ("shout", "enum")} == {str}
    for bad in (datetime.date(2024, 1, 1), print, object(), np.zeros(2), b"x", {1, 2}):
        with pytest.raises(BadRequestError, match=type(bad).__name__):
            to_plain([{"x": bad}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ messages[0].content + none }}", "TypeError"),
        ("a\n{% if %}", "line 2"),
        ("{% endgeneration %}", "line 1"),
        ("{% unknown %}", "unknown"),
    ],
)
def test_a_template_that_fails_says_why(template: str, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        render(template, [USER], {})


@pytest.mark.parametrize("conversation", [[], [[]], ["Hello"], [USER, 3], "Hello"])
def test_what_is_no_conversation_is_refused(pairs: dict[str, Pair], conversation: Any) -> None:
    with pytest.raises(BadRequestError, match="message"):
        pairs["llama"][0].apply_chat_template(conversation)


def test_a_tool_must_be_a_schema_and_sanitizing_is_not_supported(pairs: dict[str, Pair]) -> None:
    ours, _ = pairs["qwen"]
    with pytest.raises(BadRequestError, match="JSON schema"):
        ours.apply_chat_template([USER], tools=[print])
    with pytest.raises(BadRequestError, match="sanitize_control_tokens"):
        ours.apply_chat_template([USER], sanitize_control_tokens=True)
    with pytest.raises(BadRequestError, match="unknown role"):
        ours.apply_chat_template(
            [{"role": "judge", "content": ""}], chat_template=LLAMA_TEMPLATE, bos_token=""
        )


def test_what_the_user_passes_stays_as_it_was(pair: Pair) -> None:
    ours, _ = pair
    conversation = [dict(message) for message in CONVERSATIONS["thoughts"]]
    ours.apply_chat_template(conversation, continue_final_message=True)
    assert conversation == CONVERSATIONS["thoughts"]
