"""All of the embedded model's folder that is not trained: tokenizer, chat template and configuration.

The tokenizer knows no words: the tokens of a text are its UTF-8 bytes, ids 0 to 255 in byte order, and eight
special tokens follow. It is written as a byte-level BPE without merges, which `tokenizers` and `transformers`
both read.

Documents, answers and turns of a chat end alike, with `<|im_end|>`, so that sampling stops there by default
whichever way the model was asked.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

END = "<|im_end|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    END,
    PAD,
    "<|reserved_0|>",
    "<|reserved_1|>",
    "<|reserved_2|>",
    "<|reserved_3|>",
)
END_ID = 256 + SPECIAL_TOKENS.index(END)
PAD_ID = 256 + SPECIAL_TOKENS.index(PAD)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CONTEXT = 512  # tokens

# A chat is written as the corpus is, so that the base model answers it as it stands: one line for each
# message, the assistant's closed by the end token. One question with its answer is exactly a document of
# the corpus.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if not loop.first and loop.previtem['role'] != 'assistant' -%} {{- '\\n' -}} {%- endif -%}
    {{- message['content'] -}}
    {%- if message['role'] == 'assistant' -%} {{- 'END' -}} {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '\\n' -}} {%- endif -%}
""".replace("END", END)

# 0.92 million parameters: 1.8 MB in bfloat16.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": END_ID,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": CONTEXT,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "pad_token_id": PAD_ID,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing folder."""
    tokenizer = Tokenizer(BPE({symbol: byte for byte, symbol in enumerate(_byte_symbols())}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "model_max_length": CONTEXT,
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")


def write_config(folder: Path) -> None:
    """Writes config.json and generation_config.json into an existing folder."""
    _write_json(folder / "config.json", CONFIG)
    _write_json(
        folder / "generation_config.json",
        {"do_sample": True, "eos_token_id": END_ID, "pad_token_id": PAD_ID, "temperature": 1.0},
    )


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in tokenizer.json, in byte order.

    Byte-level BPE writes a byte as the Latin-1 character of the same number where that can be printed; the
    other bytes get the characters from U+0100 on, in byte order.
    """
    alphabet = sorted(ByteLevel.alphabet())
    printable = {ord(symbol): symbol for symbol in alphabet if ord(symbol) < 256}
    others = iter(alphabet[len(printable) :])
    return [printable[byte] if byte in printable else next(others) for byte in range(256)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
