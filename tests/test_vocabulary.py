"""Ids, special tokens and added tokens are those of transformers, before and after every change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizer_folders import TEXTS, WRITERS
from tokenizers import AddedToken
from transformers import AutoTokenizer

from minitinker.errors import BadRequestError
from minitinker.model.tokenizer import Tokenizer
from minitinker.model.vocabulary import ROLES

Pair = tuple[Tokenizer, Any]


@pytest.fixture(params=WRITERS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    WRITERS[request.param](tmp_path)
    return Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)


def assert_same_vocabulary(pair: Pair) -> None:
    ours, theirs = pair
    for role in ROLES:
        assert getattr(ours, role) == getattr(theirs, role), role
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_id"), role
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.extra_special_tokens == theirs.extra_special_tokens
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert list(ours.get_added_vocab()) == list(theirs.get_added_vocab())
    assert ours.get_vocab() == theirs.get_vocab() == ours.vocab
    assert ours.vocab_size == theirs.vocab_size
    assert len(ours) == len(theirs)
    for text in (*TEXTS, " ".join(theirs.all_special_tokens), " <new> <other>, x<|im_start|> "):
        assert ours.encode(text) == theirs.encode(text)
        ids = theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.convert_ids_to_tokens(ids, True) == theirs.convert_ids_to_tokens(ids, True)


def test_a_tokenizer_that_was_read_has_the_vocabulary_of_transformers(pair: Pair) -> None:
    assert_same_vocabulary(pair)
    assert all(pair)


def test_a_role_can_be_given_to_a_token_by_text_or_id_and_taken_away(pair: Pair) -> None:
    for tokenizer in pair:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.bos_token_id = 3
        tokenizer.sep_token = AddedToken("hello")
        tokenizer.mask_token = "not in the vocabulary"
        tokenizer.unk_token = None
    assert_same_vocabulary(pair)
    for tokenizer in pair:
        tokenizer.bos_token_id = None
        tokenizer.extra_special_tokens = ["hello", AddedToken("world")]
    assert_same_vocabulary(pair)


def test_a_role_takes_only_tokens(pair: Pair) -> None:
    ours, theirs = pair
    for tokenizer in (ours, theirs):
        with pytest.raises(ValueError, match="pad_token"):
            tokenizer.pad_token = 3
    with pytest.raises(BadRequestError, match=f"pad_token_id is 100000; ids go from 0 to {len(ours) - 1}"):
        ours.pad_token_id = 100_000


@pytest.mark.parametrize(
    "roles",
    [
        {},
        {"pad_token": "<new>"},
        {"pad_token": "hello"},
        {"bos_token": AddedToken("<new>", lstrip=True, rstrip=True, special=True), "sep_token": "<other>"},
        {"extra_special_tokens": ["<new>", AddedToken("<other>", lstrip=True), "<|im_end|>"]},
        {"additional_special_tokens": ["<new>"], "eos_token": "<other>"},
    ],
)
@pytest.mark.parametrize("replace", [True, False])
def test_special_tokens_are_added_as_transformers_does(
    pair: Pair, roles: dict[str, Any], replace: bool
) -> None:
    ours, theirs = pair
    for _ in range(2):  # the second time they exist
        new = ours.add_special_tokens(roles, replace_extra_special_tokens=replace)
        assert new == theirs.add_special_tokens(roles, replace_extra_special_tokens=replace)
        assert_same_vocabulary(pair)


@pytest.mark.parametrize(
    "tokens", ["<new>", ["<new>", "hello"], [AddedToken("<new>", rstrip=True)], [], ["a", "a"]]
)
@pytest.mark.parametrize("special", [True, False])
def test_tokens_are_added_as_transformers_does(pair: Pair, tokens: Any, special: bool) -> None:
    ours, theirs = pair
    assert ours.add_tokens(tokens, special) == theirs.add_tokens(tokens, special)
    assert_same_vocabulary(pair)


@pytest.mark.parametrize("roles", [{"padding": "<new>"}, {"extra_special_tokens": "<new>"}, {"pad_token": 3}])
def test_what_is_no_role_or_no_token_is_refused(pair: Pair, roles: dict[str, Any]) -> None:
    ours, theirs = pair
    with pytest.raises(ValueError, match=next(iter(roles))):
        theirs.add_special_tokens(roles)
    with pytest.raises(BadRequestError, match=next(iter(roles))):
        ours.add_special_tokens(roles)


def test_ids_and_tokens_are_converted_as_transformers_does(pair: Pair) -> None:
    ours, theirs = pair
    token = theirs.convert_ids_to_tokens(5)
    for tokens in (token, "not in the vocabulary", [token, "not in the vocabulary"], []):
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    for ids in (5, 100_000, [5, 6, 100_000], np.array([5, 6]), torch.tensor([5, 6]), []):
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
