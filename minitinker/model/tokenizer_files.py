"""The files of a tokenizer in a Hugging Face folder, as the versions of transformers have written them.

tokenizer.json is needed. tokenizer_config.json gives tokens their roles; transformers 5 writes the chat
template beside it as chat_template.jinja. special_tokens_map.json and added_tokens.json are read only where
tokenizer_config.json does not list the added tokens itself.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.config import read_json_object


def read_tokenizer_files(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], list[AddedToken]]:
    """The tokenizer, the fields of its configuration, and the added tokens in the order of their ids.

    The field "chat_template" is a template, or a dict of several by name.
    Raises NotFoundError where the folder has no tokenizer.json, and BadRequestError, naming the file, for
    one that is malformed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(
            f"{folder} has no tokenizer.json, and a tokenizer is read from that file alone; transformers can"
            " write it: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing more precise
        raise BadRequestError(f"{path} is not a tokenizer: {error}") from error
    config = _read_if_there(folder / "tokenizer_config.json")
    templates = _read_templates(folder)
    if templates:
        config["chat_template"] = templates["default"] if [*templates] == ["default"] else templates
    elif isinstance(config.get("chat_template"), list):
        config["chat_template"] = {each["name"]: each["template"] for each in config["chat_template"]}
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        config |= _read_if_there(folder / "special_tokens_map.json")
        tokens = _read_if_there(folder / "added_tokens.json")
        decoder = {i: {"content": text, "normalized": True} for text, i in tokens.items()}
    try:
        added = {int(i): _added_token(fields) for i, fields in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadRequestError(f"{folder}: its tokenizer's added tokens are malformed: {error!r}") from error
    return backend, config, [added[i] for i in sorted(added)]


def _added_token(fields: dict[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(fields["content"], **{flag: fields[flag] for flag in flags if flag in fields})


def _read_templates(folder: Path) -> dict[str, str]:
    """The chat templates in files of their own, by name; the usual one is "default"."""
    files = {file.stem: file for file in folder.glob("additional_chat_templates/*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return {name: file.read_text("utf-8") for name, file in files.items()}


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
