"""What a folder may hold: all forms that transformers reads, and clear errors for the rest."""

import json
from pathlib import Path

import pytest
from tokenizer_folders import TEXTS, write_llama, write_qwen
from transformers import PreTrainedTokenizerFast

from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.tokenizer import Tokenizer


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")


def assert_same(folder: Path) -> None:
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    assert ours.chat_template == theirs.chat_template
    assert ours.model_max_length == theirs.model_max_length
    for text in (*TEXTS, "x<one> <two> <image>y"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), True) == theirs.decode(theirs.encode(text), True)


def test_tokenizer_json_is_enough(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    assert_same(tmp_path)


def test_roles_may_stand_in_special_tokens_map(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>", "max_len": 9}', "utf-8")
    one = {"content": "<one>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    roles = {
        "bos_token": one,
        "eos_token": "<|eot_id|>",
        "additional_special_tokens": ["<two>", "<|end_of_text|>"],
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles), "utf-8")
    assert_same(tmp_path)


def test_added_tokens_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    write_qwen(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<two>": 428, "<one>": 427, "<think>": 423}', "utf-8")
    assert_same(tmp_path)


def test_added_tokens_of_the_configuration_go_before_the_older_files(tmp_path: Path) -> None:
    write_qwen(tmp_path)
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    edit(
        tmp_path / "tokenizer_config.json",
        added_tokens_decoder={
            "428": {"content": "<two>", "special": False, **plain},
            "427": {"content": "<one>", "special": True, **plain},
            "423": {"content": "<think>", "special": True, **plain},
        },
        pad_token={"__type": "AddedToken", "content": "<two>", "special": True, **plain},
    )
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}', "utf-8")
    (tmp_path / "added_tokens.json").write_text('{"<other>": 427}', "utf-8")
    assert_same(tmp_path)


def test_tokens_with_roles_of_their_own_are_special_too(tmp_path: Path) -> None:
    write_qwen(tmp_path)
    edit(
        tmp_path / "tokenizer_config.json",
        image_token="<image>",
        extra_special_tokens={"first_token": "<one>"},
    )
    assert_same(tmp_path)
    assert Tokenizer.from_folder(tmp_path).special_tokens_map["image_token"] == "<image>"


@pytest.mark.parametrize("extra", [(), ("tool_use",), ("tool_use", "rag")])
@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(
    "within", ["a template", [{"name": "default", "template": "one"}, {"name": "b", "template": "two"}]]
)
def test_chat_templates_are_found_where_transformers_finds_them(
    tmp_path: Path, extra: tuple[str, ...], default: bool, within: object
) -> None:
    write_qwen(tmp_path)
    edit(tmp_path / "tokenizer_config.json", chat_template=within)
    if not default:
        (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates").mkdir()
    for name in extra:
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(f"{name}: é\n", "utf-8")
    assert_same(tmp_path)


def test_a_folder_without_tokenizer_json_is_named_with_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(NotFoundError, match="save_pretrained") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_malformed_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    write_qwen(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BadRequestError, match=file):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "added", [["<one>"], {"x": {"content": "<one>"}}, {"1": "<one>"}, {"1": {"text": "<one>"}}]
)
def test_malformed_added_tokens_are_refused(tmp_path: Path, added: object) -> None:
    write_qwen(tmp_path)
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=added)
    with pytest.raises(BadRequestError, match="added tokens"):
        Tokenizer.from_folder(tmp_path)


def test_a_token_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_qwen(tmp_path)
    edit(tmp_path / "tokenizer_config.json", pad_token=3)
    with pytest.raises(BadRequestError, match="pad_token is 3"):
        Tokenizer.from_folder(tmp_path)
