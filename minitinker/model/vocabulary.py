"""The tokens of a tokenizer: their ids, which of them are special, and how more are added.

`Vocabulary` is the lower half of `minitinker.model.tokenizer.Tokenizer`; names and answers are those of a
`PreTrainedTokenizer` of transformers 5. A special token has a role (`eos_token`), or is one of
`extra_special_tokens`; either way it is never split, and `skip_special_tokens` leaves it out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import tokenizers
from tokenizers import AddedToken

from minitinker.errors import BadRequestError

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Role:
    """The special token in one role: `tokenizer.pad_token`, a str, or None where there is none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name

    def __get__(self, vocabulary: "Vocabulary", owner: type) -> str | None:
        return vocabulary._special.get(self._role)

    def __set__(self, vocabulary: "Vocabulary", token: str | AddedToken | None) -> None:
        vocabulary._special[self._role] = None if token is None else _text(self._role, token)


class _RoleId:
    """The id of the special token in one role: `tokenizer.pad_token_id`, an int or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name.removesuffix("_id")

    def __get__(self, vocabulary: "Vocabulary", owner: type) -> int | None:
        token = vocabulary._special.get(self._role)
        return None if token is None else vocabulary.convert_tokens_to_ids(token)

    def __set__(self, vocabulary: "Vocabulary", token_id: int | None) -> None:
        token = None if token_id is None else vocabulary.convert_ids_to_tokens(token_id)
        if token_id is not None and token is None:
            raise BadRequestError(f"{self._role}_id is {token_id}; ids go from 0 to {len(vocabulary) - 1}")
        vocabulary._special[self._role] = token


class Vocabulary:
    """The tokens of a `tokenizers.Tokenizer` and the roles that a tokenizer_config.json gives to some.

    Attributes are fixed: setting one that does not exist raises AttributeError.
    """

    __slots__ = ("__weakref__", "_extra", "_special", "backend_tokenizer")

    bos_token, bos_token_id = _Role(), _RoleId()
    eos_token, eos_token_id = _Role(), _RoleId()
    unk_token, unk_token_id = _Role(), _RoleId()
    sep_token, sep_token_id = _Role(), _RoleId()
    pad_token, pad_token_id = _Role(), _RoleId()
    cls_token, cls_token_id = _Role(), _RoleId()
    mask_token, mask_token_id = _Role(), _RoleId()

    def __init__(
        self,
        backend_tokenizer: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        added: Sequence[AddedToken] = (),
    ) -> None:
        """Special tokens come from `config`; they and `added` join the vocabulary where it lacks them."""
        self.backend_tokenizer = backend_tokenizer
        named, extra = _special_tokens(config)
        self._special: dict[str, str | None] = dict.fromkeys(ROLES)
        self._special |= {role: token.content for role, token in named.items()}
        self._extra = [token.content for token in extra]

        tokens = [*backend_tokenizer.get_added_tokens_decoder().values(), *added]
        known = {token.content for token in tokens}
        for token in (*named.values(), *extra):
            if token.content not in known:
                tokens.append(token)
                known.add(token.content)
        for token in tokens:
            token.special = token.special or token.content in self._special.values()
        backend_tokenizer.add_tokens(tokens)

    @property
    def vocab_size(self) -> int:
        """The number of tokens without the added ones; `len(tokenizer)` counts them too."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id, added ones too."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """The same as `get_vocab()`."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens and their ids, in the order of the ids."""
        return {token.content: token_id for token_id, token in sorted(self.added_tokens_decoder.items())}

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int | None]: ...
    def convert_tokens_to_ids(
        self, tokens: str | list[str] | tuple[str, ...]
    ) -> int | list[int | None] | None:
        """The id of a token, or of each; for a token that does not exist that of `unk_token`, or None."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self.backend_tokenizer.token_to_id(tokens)
        if token_id is None and self.unk_token is not None:
            return self.backend_tokenizer.token_to_id(self.unk_token)
        return token_id

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str | None: ...
    @overload
    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[str | None]: ...
    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """The token of an id, or of each (a list, NumPy or torch); None for an id that does not exist.

        Tokens are as the vocabulary spells them: in a byte-level one a space is "Ġ".
        """
        ids = to_list(ids)
        if isinstance(ids, int):
            return self._id_to_token(ids)
        skip = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._id_to_token(token_id) for token_id in ids if token_id not in skip]

    def _id_to_token(self, token_id: int) -> str | None:
        if not 0 <= token_id < 2**32:
            raise BadRequestError(f"token id {token_id} is none; ids go from 0 to {len(self) - 1}")
        return self.backend_tokenizer.id_to_token(token_id)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a role, by role."""
        return {role: token for role, token in self._special.items() if token is not None}

    @property
    def extra_special_tokens(self) -> list[str]:
        """The special tokens without a role (`additional_special_tokens` of transformers 4)."""
        return list(self._extra)

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[str | AddedToken] | None) -> None:
        self._extra = [_text("extra_special_tokens", token) for token in tokens or ()]

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once, those with a role first."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int | None]:
        """The ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens behind the vocabulary; returns how many were new."""
        if isinstance(new_tokens, str | AddedToken):
            new_tokens = [new_tokens]
        add = (
            self.backend_tokenizer.add_special_tokens if special_tokens else self.backend_tokenizer.add_tokens
        )
        return add(list(new_tokens)) if new_tokens else 0

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Give tokens roles, adding those that the vocabulary lacks; returns how many were new.

        Keys are roles such as "pad_token", whose value is one token, and "extra_special_tokens" (or its name
        of old, "additional_special_tokens"), whose value is a list. BadRequestError for other keys.
        """
        roles = dict(special_tokens_dict)
        if "additional_special_tokens" in roles and not roles.get("extra_special_tokens"):
            roles["extra_special_tokens"] = roles.pop("additional_special_tokens")
        tokens = []
        for key, value in roles.items():
            if key == "extra_special_tokens":
                if not isinstance(value, list | tuple):
                    raise BadRequestError(f"{key} is {value!r}; it must be a list of tokens")
                new = [_added_token(key, token) for token in value]
                if replace_extra_special_tokens and new:
                    self._extra = [token.content for token in new]
                else:
                    new = [token for token in new if token.content not in self._extra]
                    self._extra += [token.content for token in new]
                tokens += new
            elif key in ROLES or key in self._special:
                token = _added_token(key, value)
                self._special[key] = token.content
                tokens.append(token)
            else:
                raise BadRequestError(
                    f"{key!r} is not a role of a special token; the roles are {', '.join(ROLES)} and"
                    " extra_special_tokens"
                )
        return self.add_tokens(tokens, special_tokens=True)


def to_list(values: Any) -> Any:
    """Lists and ints of what may be NumPy arrays, torch tensors, lists of those, or a BatchEncoding."""
    if isinstance(values, Mapping):
        values = values["input_ids"]
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, list | tuple):
        return [v if isinstance(v, int) else to_list(v) for v in values]
    return values


def _special_tokens(config: Mapping[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens of a tokenizer_config.json: those with a role, by role, and the others.

    Roles beyond the usual ones (`image_token`) are those that the file names.
    """
    own = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    own |= config.get("model_specific_special_tokens") or {}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        own, extra = own | extra, []
    roles = {role: config.get(role) for role in ROLES} | own
    named = {role: _added_token(role, value) for role, value in roles.items() if value is not None}
    return named, [_added_token("extra_special_tokens", value) for value in extra]


def _added_token(key: str, value: object) -> AddedToken:
    """A special token as files and scripts give it: its text, an AddedToken, or a dict of its fields."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        return AddedToken(
            value["content"], special=True, **{flag: value[flag] for flag in flags if flag in value}
        )
    return AddedToken(_text(key, value), normalized=False, special=True)


def _text(key: str, token: object) -> str:
    if isinstance(token, AddedToken):
        return token.content
    if not isinstance(token, str):
        raise BadRequestError(f"{key} is {token!r}; it must be a token's text")
    return token
