"""The embedded model's tokenizer, chat template and configuration, as other libraries read them."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import minitinker.tiny
from minitinker.tiny import corpus, scaffold

TINY = Path(minitinker.tiny.__file__).parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEXTS = (
    "",
    " two  spaces ,and . n't 's\n\n\ttab ",
    "e\u0301 \u00e9 \ufb01 \u212b",  # nothing is normalised
    "naïve 日本語 🙂👩‍🚀",
    "\x00\x1f\x7f\u00a0\u00ad\uffff\U0010ffff",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    scaffold.write_tokenizer(path)
    scaffold.write_config(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def transformers_tokenizer(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def test_the_tokenizer_in_the_package_is_the_one_the_code_writes(folder: Path) -> None:
    for name in TOKENIZER_FILES:
        assert (TINY / name).read_text("utf-8") == (folder / name).read_text("utf-8"), name


@given(text=st.text())
def test_tokens_are_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(264))
    text = (
        "".join(map(chr, range(0x800)))
        + "\u0800\uffff"
        + "".join(chr(16**4 * plane) for plane in range(1, 17))
    )
    assert tokenizer.encode(text).ids == list(text.encode())


def test_special_tokens_follow_the_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("".join(scaffold.SPECIAL_TOKENS)).ids == list(range(256, 264))
    assert tokenizer.encode(f"a{scaffold.END}b").ids == [97, scaffold.END_ID, 98]
    assert tokenizer.decode([97, scaffold.END_ID, 98]) == "ab"


def test_a_document_of_the_corpus_is_its_text_tokenized(tokenizer: Tokenizer) -> None:
    for task in corpus.TASKS:
        prompt, answer = corpus.example(task, Random(0))
        assert corpus.encode(prompt, answer)[0] == tokenizer.encode(prompt + answer + scaffold.END).ids


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_tokenizes_alike(tokenizer: Tokenizer, transformers_tokenizer: Any, text: str) -> None:
    assert transformers_tokenizer.encode(text) == tokenizer.encode(text).ids
    assert transformers_tokenizer.decode(transformers_tokenizer.encode(text)) == text


def test_transformers_reads_the_special_tokens(transformers_tokenizer: Any) -> None:
    assert len(transformers_tokenizer) == 264
    assert transformers_tokenizer.bos_token is None
    assert transformers_tokenizer.eos_token_id == scaffold.END_ID
    assert transformers_tokenizer.pad_token_id == scaffold.PAD_ID
    assert transformers_tokenizer.encode(scaffold.END) == [scaffold.END_ID]
    assert transformers_tokenizer.decode([97, scaffold.END_ID], skip_special_tokens=True) == "a"


def render(tokenizer: Any, turns: list[tuple[str, str]], ask: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))


def test_a_chat_of_one_question_is_a_document_of_the_corpus(transformers_tokenizer: Any) -> None:
    prompt, answer = corpus.example("reverse", Random(0))
    question, reply = ("user", prompt.removesuffix("\n")), ("assistant", answer)
    assert render(transformers_tokenizer, [question], ask=True) == prompt
    assert render(transformers_tokenizer, [question, reply], ask=False) == prompt + answer + scaffold.END


def test_a_chat_has_a_line_for_each_message(transformers_tokenizer: Any) -> None:
    turns = [("system", "be brief"), ("user", "add 3 4"), ("assistant", "7"), ("user", " next 7 ")]
    assert render(transformers_tokenizer, turns, ask=True) == f"be brief\nadd 3 4\n7{scaffold.END} next 7 \n"
    assert render(transformers_tokenizer, turns[:2], ask=False) == "be brief\nadd 3 4"


def test_a_conversation_so_far_is_a_prefix_of_the_conversation(transformers_tokenizer: Any) -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    whole = render(transformers_tokenizer, turns, ask=False)
    for count in range(1, len(turns)):
        ask = turns[count][0] == "assistant"
        assert whole.startswith(render(transformers_tokenizer, turns[:count], ask))


def test_transformers_builds_a_qwen3_of_under_a_million_weights(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == 920_960
    assert config.eos_token_id == scaffold.END_ID
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == scaffold.END_ID


def test_the_configuration_is_plain_sorted_json(folder: Path) -> None:
    text = (folder / "config.json").read_text("utf-8")
    assert json.loads(text) == scaffold.CONFIG
    assert list(json.loads(text)) == sorted(scaffold.CONFIG)
