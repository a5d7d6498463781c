"""What calling a tokenizer takes and gives: texts, padding and truncation in; a `BatchEncoding` out."""

import warnings
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from minitinker.errors import BadRequestError

_PADDING = {True: "longest", False: "do_not_pad"}
_TRUNCATION = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}
_NO_LIMIT = int(1e20)  # transformers writes 1e30 for a model without a longest length; so is all above this


class BatchEncoding(UserDict[str, Any]):
    """What calling a tokenizer returns: a dict whose values are attributes too (`out.input_ids`).

    `encodings[i]`, or `out[i]`, is row i as `tokenizers` made it, with its tokens and offsets.
    """

    def __init__(
        self, data: Mapping[str, Any] | None = None, encodings: Sequence[tokenizers.Encoding] = ()
    ) -> None:
        super().__init__(data)
        self.encodings = list(encodings)

    def __getitem__(self, key: str | int) -> Any:
        return self.encodings[key] if isinstance(key, int) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # not there yet while an object is being copied
        if name not in data:
            raise AttributeError(f"this BatchEncoding has no {name!r}; it has {', '.join(data)}")
        return data[name]

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of one row, as strings."""
        return self.encodings[batch_index].tokens

    def to(self, device: Any) -> "BatchEncoding":
        """Move torch tensors to a device, in place; returns itself."""
        self.data = {key: v.to(device) if hasattr(v, "to") else v for key, v in self.data.items()}
        return self


def rows_of(text: Any, text_pair: Any) -> list[str | tuple[str, str]]:
    """The texts of a call as rows for `tokenizers`: a str, or a pair of them. BadRequestError for others."""
    if isinstance(text, str):
        rows = [text if not text_pair else (text, text_pair)]
    elif not isinstance(text, list | tuple):
        raise BadRequestError(f"text is a {type(text).__name__}; it must be a str or a list of them")
    elif text_pair is None:
        rows = [tuple(row) if isinstance(row, list) else row for row in text]
    elif isinstance(text_pair, list | tuple) and len(text_pair) == len(text):
        rows = list(zip(text, text_pair, strict=True))
    else:
        raise BadRequestError(f"text_pair must be a list of {len(text)} texts, as many as there are in text")
    for index, row in enumerate(rows):
        parts = row if isinstance(row, tuple) and len(row) == 2 else (row,)
        if not all(isinstance(part, str) for part in parts):
            raise BadRequestError(f"text {index} is {row!r}; it must be a str, or a pair of them")
    return rows


def strategies(
    padding: bool | str,
    truncation: bool | str | None,
    max_length: int | None,
    model_max_length: int,
    pad_to_multiple_of: int | None = None,
) -> tuple[str, str, int | None]:
    """(padding, truncation, length) by name, from what transformers allows for them.

    A max_length alone asks for truncation. Without one, the length is the model's; where that has no limit,
    nothing is cut, nor padded to it. Raises BadRequestError for what has no meaning.
    """
    if truncation is None and max_length is not None and padding is False:
        truncation = True
    padding = _option("padding", padding, _PADDING, ("max_length",))
    truncation = _option("truncation", truncation, _TRUNCATION, ("only_first", "only_second"))
    if max_length is not None and max_length < 1:
        raise BadRequestError(f"max_length is {max_length}; it must be at least 1")
    if padding == "longest" and max_length is not None and truncation == "do_not_truncate":
        warnings.warn(
            "max_length does nothing with padding=True and no truncation; padding='max_length' pads to it",
            stacklevel=3,
        )
    if max_length is None and model_max_length <= _NO_LIMIT:
        max_length = model_max_length
    if max_length is None:
        return "do_not_pad" if padding == "max_length" else padding, "do_not_truncate", None
    if (
        pad_to_multiple_of is not None
        and max_length % pad_to_multiple_of
        and padding != "do_not_pad"
        and truncation != "do_not_truncate"
    ):
        raise BadRequestError(
            f"max_length is {max_length}; with padding and truncation it must be a multiple of"
            f" pad_to_multiple_of ({pad_to_multiple_of})"
        )
    return padding, truncation, max_length


def _option(name: str, value: Any, short: Mapping[Any, str], others: tuple[str, ...]) -> str:
    """The full name of an option that may be given as True, False, None or by name."""
    allowed = (*dict.fromkeys(short.values()), *others)
    if value is None or isinstance(value, bool):
        value = short.get(value)
    if value not in allowed:
        raise BadRequestError(f"{name} is {value!r}; it must be True, False or one of {', '.join(allowed)}")
    return allowed[allowed.index(value)]  # value may be an enum of transformers


def to_array(rows: Sequence[Sequence[Any]], kind: str) -> Any:
    """Rows of equal length as an int64 array: NumPy's for "np", torch's for "pt".

    rows: (batch, tokens), or (batch, tokens, 2) for offsets. BadRequestError for rows of other lengths.
    """
    if kind not in ("np", "pt"):
        raise BadRequestError(f"return_tensors is {kind!r}; it must be None, 'np' or 'pt'")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise BadRequestError(
            f"rows of {lengths[0]} to {lengths[-1]} tokens make no array; padding=True makes them equal, and"
            " truncation=True cuts them"
        )
    array = np.asarray(rows, dtype=np.int64)
    if kind == "np":
        return array
    import torch

    return torch.from_numpy(array)


def clean_up_spaces(text: str) -> str:
    """Take out the spaces that word tokenizers put before punctuation and in English contractions."""
    for end in (".", "?", "!", ","):
        text = text.replace(f" {end}", end)
    text = text.replace(" ' ", "'")
    for end in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {end}", end)
    return text
