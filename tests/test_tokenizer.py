"""Every answer of a Tokenizer is that of transformers for the same folder."""

import copy
import itertools
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import TEXTS, WRITERS
from transformers import AutoTokenizer

from minitinker.errors import BadRequestError
from minitinker.model.tokenizer import Tokenizer

BYTE_LEVEL = ("llama", "qwen", "old_qwen")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in WRITERS}
    for family, folder in made.items():
        WRITERS[family](folder)
    return made


def ours_and_theirs(folders: dict[str, Path], family: str) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_folder(folders[family]), AutoTokenizer.from_pretrained(folders[family])


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, tuple[Tokenizer, Any]]:
    """Both tokenizers of each family, for tests that change neither."""
    return {family: ours_and_theirs(folders, family) for family in WRITERS}


@pytest.fixture(params=WRITERS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, tuple[Tokenizer, Any]]) -> tuple[Tokenizer, Any]:
    return pairs[request.param]


@pytest.fixture(params=WRITERS)
def padding_pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Tokenizer, Any]:
    """Two of one's own, which have a padding token."""
    ours, theirs = ours_and_theirs(folders, request.param)
    for tokenizer in (ours, theirs):
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return ours, theirs


def same(ours: Any, theirs: Any) -> bool:
    """Equal, of the same keys in the same order, types, shapes and dtypes."""
    if hasattr(theirs, "keys"):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, np.ndarray | torch.Tensor):
        arrays = type(ours) is type(theirs) and ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return arrays and bool((ours == theirs).all())
    return type(ours) is type(theirs) and bool(ours == theirs)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_tokens_and_offsets_that_transformers_gives(
    pair: tuple[Tokenizer, Any], text: str
) -> None:
    ours, theirs = pair
    for special in (True, False):
        assert ours.encode(text, add_special_tokens=special) == theirs.encode(
            text, add_special_tokens=special
        )
        assert ours.tokenize(text, None, special) == theirs.tokenize(text, None, special)
        asked = {
            "add_special_tokens": special,
            "return_offsets_mapping": True,
            "return_special_tokens_mask": True,
            "return_token_type_ids": True,
        }
        assert same(ours(text, **asked), theirs(text, **asked))
    split = {"split_special_tokens": True}
    assert ours.encode(text, **split) == theirs.encode(text, **split)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_have_the_text_that_transformers_gives(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    ids = theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.convert_ids_to_tokens(ids, skip) == theirs.convert_ids_to_tokens(ids, skip)
    tokens = theirs.convert_ids_to_tokens(ids)
    assert ours.convert_tokens_to_ids(tokens) == ids
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)


@given(text=st.text(), family=st.sampled_from([*WRITERS]))
def test_any_text_is_encoded_and_decoded_as_transformers_does(
    pairs: dict[str, tuple[Tokenizer, Any]], text: str, family: str
) -> None:
    ours, theirs = pairs[family]
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)


@given(
    pieces=st.lists(
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|eot_id|>", "</think>", "<|", " ", "\n", "é", "a"])
    ),
    family=st.sampled_from(BYTE_LEVEL),
)
def test_special_tokens_anywhere_in_a_text_are_found_as_transformers_does(
    pairs: dict[str, tuple[Tokenizer, Any]], pieces: list[str], family: str
) -> None:
    ours, theirs = pairs[family]
    text = "".join(pieces)
    assert ours.encode(text) == theirs.encode(text)


@given(ids=st.lists(st.integers(0, 500)), skip=st.booleans(), family=st.sampled_from(BYTE_LEVEL))
def test_any_ids_are_decoded_as_transformers_does(
    pairs: dict[str, tuple[Tokenizer, Any]], ids: list[int], skip: bool, family: str
) -> None:
    ours, theirs = pairs[family]
    assert ours.decode(ids, skip) == theirs.decode(ids, skip)


@pytest.mark.parametrize("clean_up", [None, True, False])
def test_spaces_are_cleaned_up_for_words_and_never_for_bytes(
    pair: tuple[Tokenizer, Any], clean_up: bool | None
) -> None:
    ours, theirs = pair
    ids = theirs.encode("hello , world ! it 's is n't ' one")
    asked = {"clean_up_tokenization_spaces": clean_up}
    assert ours.decode(ids, **asked) == theirs.decode(ids, **asked)
    assert ours.batch_decode([ids, ids], **asked) == theirs.batch_decode([ids, ids], **asked)


def test_decode_takes_ints_lists_and_arrays(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    rows = [[2, 3, 4], [5, 6, 7]]
    for ids in (
        3,
        rows[0],
        tuple(rows[0]),
        np.array(rows[0]),
        torch.tensor(rows[0]),
        np.int64(3),
        [np.int64(3)],
        [],
    ):
        assert same(ours.decode(ids), theirs.decode(ids))
        if np.ndim(ids) > 0:  # later releases refuse a batch that is one number
            assert same(ours.batch_decode(ids), theirs.batch_decode(ids))
    for batch in (rows, np.array(rows), torch.tensor(rows), [np.array(rows[0]), torch.tensor(rows[1])]):
        assert same(ours.decode(batch), theirs.decode(batch))
        assert same(ours.batch_decode(batch), theirs.batch_decode(batch))
    assert ours.decode(ours("hello")) == theirs.decode(theirs("hello"))


@pytest.mark.parametrize("wrong", [-100, 2**32])
def test_an_id_that_cannot_be_is_refused_with_its_value(pair: tuple[Tokenizer, Any], wrong: int) -> None:
    ours, theirs = pair
    for name in ("decode", "batch_decode", "convert_ids_to_tokens"):
        with pytest.raises(OverflowError):
            getattr(theirs, name)([1, wrong])
        with pytest.raises(BadRequestError, match=str(wrong)):
            getattr(ours, name)([1, wrong])


LENGTHS = [
    {"padding": padding, "truncation": truncation, "max_length": max_length}
    for padding, truncation, max_length in itertools.product(
        (False, True, "longest", "max_length", "do_not_pad"),
        (None, False, True, "longest_first"),
        (None, 1, 6, 40),
    )
    if padding in (False, "max_length", "do_not_pad") or truncation or max_length is None  # else both warn
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_truncation_are_those_of_transformers(
    padding_pair: tuple[Tokenizer, Any], side: str
) -> None:
    ours, theirs = padding_pair
    ours.truncation_side = theirs.truncation_side = side
    for lengths in LENGTHS:
        assert same(
            ours([*TEXTS], **lengths, padding_side=side), theirs([*TEXTS], **lengths, padding_side=side)
        )
        assert same(ours(TEXTS[2], **lengths), theirs(TEXTS[2], **lengths))
        assert ours.encode(TEXTS[2], **lengths) == theirs.encode(TEXTS[2], **lengths)
    multiple = {"padding": True, "pad_to_multiple_of": 8}
    assert same(ours([*TEXTS], **multiple), theirs([*TEXTS], **multiple))


LONG, SHORT = "hello world it is one , " * 3, "is"


@pytest.mark.parametrize(
    ("text", "text_pair", "truncation"),
    [
        (LONG, SHORT, False),
        (LONG, SHORT, True),
        (SHORT, LONG, True),
        (LONG, LONG, True),
        (LONG, SHORT, "only_first"),
        (SHORT, LONG, "only_second"),
        (LONG, "", True),
        ([LONG, SHORT, ""], [SHORT, LONG, ""], True),
        ([[LONG, SHORT], (SHORT, LONG)], None, True),
    ],
)
def test_pairs_of_texts_are_those_of_transformers(
    pair: tuple[Tokenizer, Any], text: Any, text_pair: Any, truncation: bool | str
) -> None:
    ours, theirs = pair
    asked = {"truncation": truncation, "max_length": 14, "return_token_type_ids": True}
    assert same(ours(text, text_pair, **asked), theirs(text, text_pair, **asked))


def test_a_text_too_short_to_be_cut_is_refused(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, theirs = pairs["qwen"]
    with pytest.raises(Exception, match="too short"):
        theirs(LONG, SHORT, truncation="only_second", max_length=14)
    with pytest.raises(BadRequestError, match="too short"):
        ours(LONG, SHORT, truncation="only_second", max_length=14)


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_arrays_are_those_of_transformers(padding_pair: tuple[Tokenizer, Any], kind: str) -> None:
    ours, theirs = padding_pair
    asked = {"return_tensors": kind, "return_offsets_mapping": True}
    assert same(ours([*TEXTS], padding=True, **asked), theirs([*TEXTS], padding=True, **asked))
    assert same(ours("hello world", **asked), theirs("hello world", **asked))
    assert same(ours("", return_tensors=kind), theirs("", return_tensors=kind))
    assert same(ours.encode("hello", return_tensors=kind), theirs.encode("hello", return_tensors=kind))


def test_ragged_rows_make_no_array(pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(BadRequestError, match="padding=True"):
        pair[0](["hello", "hello world it is"], return_tensors="np")


def test_an_empty_batch_has_no_rows(pair: tuple[Tokenizer, Any]) -> None:
    assert pair[0]([])["input_ids"] == []


def test_padding_without_a_padding_token_says_how_to_set_one(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, theirs = pairs["llama"]
    with pytest.raises(ValueError, match="pad_token"):
        theirs(["a", "b"], padding=True)
    with pytest.raises(BadRequestError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        ours(["a", "b"], padding=True)


@pytest.mark.parametrize("option", ["stride", "is_split_into_words", "return_overflowing_tokens", "paddding"])
def test_what_is_not_supported_is_an_error_and_not_ignored(
    pairs: dict[str, tuple[Tokenizer, Any]], option: str
) -> None:
    ours, _ = pairs["qwen"]
    for call in (ours, ours.encode, ours.decode):
        with pytest.raises(TypeError, match=option):
            call("text", **{option: 1})
    with pytest.raises(AttributeError):
        setattr(ours, option, 1)


def test_a_lone_surrogate_is_refused(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    with pytest.raises(BadRequestError, match="surrogate"):
        pairs["qwen"][0].encode("a\ud800")


def test_attributes_are_those_of_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for name in (
        "name_or_path",
        "model_max_length",
        "model_input_names",
        "padding_side",
        "truncation_side",
        "clean_up_tokenization_spaces",
        "split_special_tokens",
        "chat_template",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_copies_and_pickles_encode_as_the_tokenizer_does(padding_pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = padding_pair
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert same(other([*TEXTS], padding=True), ours([*TEXTS], padding=True))
        assert other.special_tokens_map == ours.special_tokens_map
        assert repr(other) == repr(ours)
        other.add_special_tokens({"pad_token": "<new>"})
        assert len(ours) == len(other) - 1


def test_threads_that_pad_and_threads_that_do_not_do_not_disturb_each_other(
    pairs: dict[str, tuple[Tokenizer, Any]],
) -> None:
    ours, _ = pairs["qwen"]
    options: list[dict[str, Any]] = [{}, {"padding": "max_length", "max_length": 90}, {"max_length": 3}]
    expected = [ours([*TEXTS], **each)["input_ids"] for each in options]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(40):
            if ours([*TEXTS], **options[i])["input_ids"] != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_importing_and_encoding_loads_neither_torch_nor_jinja_nor_transformers(
    folders: dict[str, Path],
) -> None:
    code = (
        "import sys; from minitinker.model.tokenizer import Tokenizer\n"
        f"t = Tokenizer.from_folder({str(folders['llama'])!r}); t.decode(t('hello', return_tensors='np').input_ids)\n"
        "assert not {'torch', 'jinja2', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
