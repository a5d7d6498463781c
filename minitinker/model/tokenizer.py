"""Text to tokens and back: `tokenizer.json`, with the face of a Hugging Face `PreTrainedTokenizer`.

The work is done by the `tokenizers` package. This file adds what scripts expect around it (batches, padding,
decoding of arrays, chat templates), with the names, defaults and answers of transformers 5. Token ids are
ints in lists; int64 arrays of shape (batch, tokens) only where `return_tensors` asks for them. An argument
of transformers that is missing here raises TypeError, as any unknown argument does.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minitinker.errors import BadRequestError
from minitinker.model.encoding import BatchEncoding, clean_up_spaces, rows_of, strategies, to_array
from minitinker.model.tokenizer_files import read_tokenizer_files
from minitinker.model.vocabulary import Vocabulary, to_list

Text = str | Sequence[str] | Sequence[tuple[str, str]]
Conversation = Sequence[Mapping[str, Any]]

_OUTPUTS = {  # what a call can return -> where an Encoding of `tokenizers` keeps it
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
    "special_tokens_mask": "special_tokens_mask",
    "offset_mapping": "offsets",
}
_UNLIMITED = int(1e30)  # the model_max_length of a tokenizer that knows no limit, as transformers has it


class Tokenizer(Vocabulary):
    """Encodes, decodes and renders chats. Threads may share one that they do not change."""

    __slots__ = (
        "_lock",
        "chat_template",
        "clean_up_tokenization_spaces",
        "model_input_names",
        "model_max_length",
        "name_or_path",
        "padding_side",
        "split_special_tokens",
        "truncation_side",
    )

    def __init__(
        self,
        backend_tokenizer: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        added: Sequence[AddedToken] = (),
        name_or_path: str = "",
    ) -> None:
        """A tokenizer of what `tokenizers` does and of the fields of a tokenizer_config.json."""
        # Padding and truncation in tokenizer.json say how it was used, not how it will be: only their sides
        # and the padding token stay.
        padding, truncation = backend_tokenizer.padding or {}, backend_tokenizer.truncation or {}
        config = {
            "pad_token": padding.get("pad_token"),
            "padding_side": padding.get("direction", "right"),
            "truncation_side": truncation.get("direction", "right"),
            **config,
        }
        super().__init__(backend_tokenizer, config, added)
        self._lock = threading.Lock()
        self.name_or_path = name_or_path
        self.model_max_length: int = config.get("model_max_length") or config.get("max_len") or _UNLIMITED
        self.padding_side: str = config["padding_side"]
        self.truncation_side: str = config["truncation_side"]
        self.model_input_names: list[str] = config.get("model_input_names") or ["input_ids", "attention_mask"]
        self.clean_up_tokenization_spaces: bool = config.get("clean_up_tokenization_spaces") or False
        self.split_special_tokens: bool = config.get("split_special_tokens") or False
        self.chat_template: str | dict[str, str] | None = config.get("chat_template")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a tokenizer from a Hugging Face folder, which needs tokenizer.json.

        Raises NotFoundError where it has none, and BadRequestError, naming the file, for a malformed one.
        """
        return cls(*read_tokenizer_files(Path(folder)), str(folder))

    def __repr__(self) -> str:
        return (
            f"Tokenizer(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, len={len(self)},"
            f" special_tokens={self.special_tokens_map})"
        )

    def __getstate__(self) -> dict[str, Any]:
        slots = (*Vocabulary.__slots__, *Tokenizer.__slots__)
        return {slot: getattr(self, slot) for slot in slots if slot not in ("_lock", "__weakref__")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for slot, value in state.items():
            setattr(self, slot, value)
        self._lock = threading.Lock()

    def __call__(
        self,
        text: Text,
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Encode a text, or a list of texts or of pairs.

        padding: False, True or "longest", "max_length". truncation: False, True or "longest_first",
        "only_first", "only_second"; a max_length alone asks for it. Lengths without max_length are
        model_max_length, and a tokenizer that has none neither pads nor cuts. return_tensors: None for
        lists (no list of lists for a single text), "np" or "pt" for arrays of shape (batch, tokens).
        Raises BadRequestError for an option that makes no sense, such as padding without a pad_token.
        """
        pads, cuts, length = strategies(
            padding, truncation, max_length, self.model_max_length, pad_to_multiple_of
        )
        if pads != "do_not_pad" and self.pad_token_id is None:
            raise BadRequestError(
                "padding needs a pad_token that is in the vocabulary, and this tokenizer has none; set one, as"
                " in tokenizer.pad_token = tokenizer.eos_token"
            )
        padding_options = {
            "direction": _unless_none(padding_side, self.padding_side),
            "pad_id": self.pad_token_id,
            "pad_token": self.pad_token,
            "length": length if pads == "max_length" else None,
            "pad_to_multiple_of": pad_to_multiple_of,
        }
        cutting_options = {"max_length": length, "strategy": cuts, "direction": self.truncation_side}
        encodings = self._encode_batch(
            rows_of(text, text_pair),
            add_special_tokens,
            _unless_none(split_special_tokens, self.split_special_tokens),
            padding_options if pads != "do_not_pad" else None,
            cutting_options if cuts != "do_not_truncate" else None,
        )
        names = self.model_input_names
        asked = {
            "input_ids": True,
            "token_type_ids": _unless_none(return_token_type_ids, "token_type_ids" in names),
            "attention_mask": _unless_none(return_attention_mask, "attention_mask" in names),
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        data: dict[str, Any] = {
            name: [getattr(encoding, field) for encoding in encodings]
            for name, field in _OUTPUTS.items()
            if asked[name]
        }
        if return_tensors is not None:
            data = {name: to_array(rows, return_tensors) for name, rows in data.items()}
        elif isinstance(text, str):
            data = {name: rows[0] for name, rows in data.items()}
        return BatchEncoding(data, encodings)

    def _encode_batch(
        self,
        rows: list[Any],
        add_special_tokens: bool,
        split_special_tokens: bool,
        padding: dict[str, Any] | None,
        cutting: dict[str, Any] | None,
    ) -> list[tokenizers.Encoding]:
        backend = self.backend_tokenizer
        with self._lock:  # the options are state of the one object that all threads use
            if padding is None:
                backend.no_padding()
            else:
                backend.enable_padding(**padding)
            if cutting is None:
                backend.no_truncation()
            else:
                backend.enable_truncation(**cutting)
            backend.encode_special_tokens = split_special_tokens
            try:
                return backend.encode_batch(rows, add_special_tokens=add_special_tokens)
            except TypeError as error:
                raise BadRequestError("a text has a lone surrogate, which is not a character") from error
            except Exception as error:  # `tokenizers` raises nothing more precise
                raise BadRequestError(f"cannot encode with {padding=}, {cutting=}: {error}") from error

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The ids of a text: a list, or an array of shape (1, tokens). The options are those of a call."""
        options = {"padding": padding, "truncation": truncation, "max_length": max_length, **kwargs}
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text as the vocabulary spells them."""
        return self(text, pair, add_special_tokens=add_special_tokens).tokens()

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of ids: an int, a list, NumPy or torch; a list of texts for a list of lists.

        clean_up_tokenization_spaces does nothing to a BPE tokenizer, whose spaces are the text's own.
        """
        ids = to_list(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        try:
            text = self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < 2**32)
            raise BadRequestError(f"token id {wrong} is none; ids go from 0 to {len(self) - 1}") from error
        return clean_up_spaces(text) if self._cleans_up(clean_up_tokenization_spaces) else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The text of each row of ids. A flat list of ids is one row; an empty one is no row."""
        if to_list(sequences) == []:
            return []
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text that tokens, spelled as in the vocabulary, stand for."""
        decoder = self.backend_tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def get_chat_template(
        self, chat_template: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The template that apply_chat_template would use, given the same arguments."""
        from minitinker.model.chat_template import choose_template

        return choose_template(self.chat_template, chat_template, tools is not None)

    def apply_chat_template(
        self,
        conversation: Conversation | Sequence[Conversation],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, or a list of them, with the chat template, and encode it.

        conversation: messages such as {"role": "user", "content": "Hello"}. tools: JSON schemas. Other
        keyword arguments are variables of the template, as in `enable_thinking=False`.
        Returns a BatchEncoding; its input_ids alone with return_dict=False; text with tokenize=False.
        return_assistant_tokens_mask adds "assistant_masks", 1 for a token of what the assistant wrote.
        Raises BadRequestError where template and arguments do not fit.
        """
        from minitinker.model import chat_template as chat  # Jinja takes a while to load

        if sanitize_control_tokens:
            raise BadRequestError("sanitize_control_tokens is not supported; it must be False")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise BadRequestError(
                "continue_final_message leaves the last message open, so it goes neither with"
                " add_generation_prompt nor with return_assistant_tokens_mask"
            )
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise BadRequestError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        if any(not isinstance(tool, Mapping) for tool in tools or ()):
            raise BadRequestError(
                "tools must be dicts, each a JSON schema; functions are not converted to one"
            )
        template = self.get_chat_template(chat_template, tools)
        variables = {
            **self.special_tokens_map,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        is_batch = len(conversation) > 0 and isinstance(conversation[0], list | tuple)
        conversations: Any = conversation if is_batch else [conversation]
        spans = []
        if return_assistant_tokens_mask:
            rendered = [chat.render_with_spans(template, each, variables) for each in conversations]
            texts, spans = [text for text, _ in rendered], [written for _, written in rendered]
        else:
            texts = [chat.render(template, each, variables, continue_final_message) for each in conversations]
        if not tokenize:
            return texts if is_batch else texts[0]
        options: dict[str, Any] = {"padding": padding, "truncation": truncation, "max_length": max_length}
        options |= {"add_special_tokens": False, "return_tensors": return_tensors, **(tokenizer_kwargs or {})}
        out = self(texts if is_batch else texts[0], **options)
        if return_assistant_tokens_mask:
            masks: Any = [
                chat.assistant_mask(row.offsets, written)
                for row, written in zip(out.encodings, spans, strict=True)
            ]
            if return_tensors is not None:
                masks = to_array(masks, return_tensors)
            out["assistant_masks"] = masks if is_batch or return_tensors is not None else masks[0]
        return out if return_dict else out["input_ids"]

    def _cleans_up(self, asked: bool | None) -> bool:
        """Whether spaces before punctuation go: never for BPE, where they are the text's own."""
        wanted = _unless_none(asked, self.clean_up_tokenization_spaces)
        return wanted and not isinstance(self.backend_tokenizer.model, tokenizers.models.BPE)


def _unless_none(value: Any, default: Any) -> Any:
    return default if value is None else value
