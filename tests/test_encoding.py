"""Texts in, BatchEncoding out: the rules that have no tokenizer in them."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models

from minitinker.errors import BadRequestError
from minitinker.model.encoding import BatchEncoding, clean_up_spaces, rows_of, strategies, to_array

NO_LIMIT = int(1e30)


@pytest.fixture
def encoding() -> BatchEncoding:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    rows = backend.encode_batch(["ab", "b"])
    return BatchEncoding({"input_ids": [row.ids for row in rows]}, rows)


def test_values_are_items_and_attributes(encoding: BatchEncoding) -> None:
    assert encoding.input_ids is encoding["input_ids"]
    assert dict(**encoding) == {"input_ids": [[0, 1], [1]]}
    assert "input_ids" in encoding
    with pytest.raises(AttributeError, match="labels"):
        _ = encoding.labels
    assert not hasattr(encoding, "attention_mask")


def test_rows_are_the_encodings_behind_them(encoding: BatchEncoding) -> None:
    assert encoding[0].ids == [0, 1]
    assert encoding[1].offsets == [(0, 1)]
    assert encoding.tokens() == ["a", "b"]
    assert encoding.tokens(1) == ["b"]


def test_copies_and_pickles_are_equal(encoding: BatchEncoding) -> None:
    for other in (copy.copy(encoding), copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert other == encoding
        assert other.tokens(1) == ["b"]


def test_to_moves_tensors_and_leaves_lists() -> None:
    encoding = BatchEncoding({"input_ids": torch.zeros(1, 2), "labels": [1]})
    assert encoding.to("meta") is encoding
    assert encoding.input_ids.device.type == "meta"
    assert encoding.labels == [1]


@pytest.mark.parametrize(
    ("text", "text_pair", "rows"),
    [
        ("a", None, ["a"]),
        ("a", "", ["a"]),
        ("a", "b", [("a", "b")]),
        (["a", "b"], None, ["a", "b"]),
        (("a", "b"), None, ["a", "b"]),
        (["a", "b"], ["c", "d"], [("a", "c"), ("b", "d")]),
        ([["a", "b"], ("c", "d")], None, [("a", "b"), ("c", "d")]),
        ([], None, []),
    ],
)
def test_texts_and_pairs_become_rows(text: Any, text_pair: Any, rows: list[Any]) -> None:
    assert rows_of(text, text_pair) == rows


@pytest.mark.parametrize(
    ("text", "text_pair", "message"),
    [
        (None, None, "NoneType"),
        (3, None, "int"),
        (["a", 3], None, "text 1 is 3"),
        ([["a", "b", "c"]], None, "text 0"),
        (["a"], "b", "list of 1"),
        (["a"], ["b", "c"], "list of 1"),
        ("a", 3, "3"),
    ],
)
def test_other_things_are_no_text(text: Any, text_pair: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        rows_of(text, text_pair)


def test_without_a_length_the_model_gives_it() -> None:
    assert strategies("max_length", True, None, 512) == ("max_length", "longest_first", 512)
    assert strategies("max_length", True, None, NO_LIMIT) == ("do_not_pad", "do_not_truncate", None)
    assert strategies(True, True, None, NO_LIMIT) == ("longest", "do_not_truncate", None)


def test_a_length_alone_asks_for_truncation() -> None:
    assert strategies(False, None, 4, NO_LIMIT) == ("do_not_pad", "longest_first", 4)
    assert strategies(False, False, 4, NO_LIMIT)[1] == "do_not_truncate"
    assert strategies("max_length", None, 4, NO_LIMIT)[1] == "do_not_truncate"


def test_a_length_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="max_length"):
        strategies(True, None, 4, NO_LIMIT)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "left"},
        {"padding": None},
        {"truncation": "yes"},
        {"max_length": 0},
        {"max_length": -1},
        {"padding": True, "truncation": True, "max_length": 10, "pad_to_multiple_of": 4},
    ],
)
def test_options_without_meaning_are_refused_by_name(options: dict[str, Any]) -> None:
    arguments = {"padding": False, "truncation": None, "max_length": None, "model_max_length": 8} | options
    with pytest.raises(BadRequestError, match=[*options][-1] if len(options) == 1 else "multiple of"):
        strategies(**arguments)


def test_rows_of_equal_length_make_an_int64_array() -> None:
    array = to_array([[1, 2], [3, 4]], "np")
    assert array.dtype == np.int64
    assert array.tolist() == [[1, 2], [3, 4]]
    tensor = to_array([[]], "pt")
    assert tensor.dtype == torch.int64
    assert tensor.shape == (1, 0)
    for rows, kind in (([[1], [2, 3]], "np"), ([[1]], "tf")):
        with pytest.raises(BadRequestError):
            to_array(rows, kind)


def test_spaces_before_punctuation_and_contractions_go() -> None:
    assert clean_up_spaces("hello , it 's n't one ! 'no ' x") == "hello, it'sn't one! 'no'x"
