"""Folders with small tokenizers of the families that people use, written by transformers, for tests."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "She said: “naïve café, déjà vu”, and paid 12,345.67 € in 2024.",
    "def f(x):\n    return x + 1\n\nprint(f(41))\n",
    "日本語のテキスト and русский текст 🙂👩‍🚀 together.",
    "You are a helpful assistant. What is the capital of France? Paris.",
) * 3
TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces ,and   a\ttab\n\n  \n\r\n trailing   ",
    "don't I'LL we've n't 's 'm it ' s",
    "e\u0301 \u00e9 \ufb01 \u212b \u1112\u1161\u11ab",  # NFC changes these
    "naïve 日本語 🙂👩‍🚀🇫🇷 ẞß",
    "\x00\x1f\x7f\u00a0\u00ad\u200b\uffff\U0010ffff",
    "<|im_start|>user\nspecial <|im_end|><|im_end|> tokens <|eot_id|>inside<|begin_of_text|>",
    "half <|im_ a special |> one, <think>and</think> <tool_call>{}</tool_call>",
    "1234567890 3.14159 1e-5",
    "a" * 70,
)
# Both splits are the published ones of the families; what matters here is that they differ.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA_TEMPLATE = """
{{- bos_token }}
{%- if tools %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\nTools:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + "\\n\\n" }}
    {%- endfor %}
    {{- "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" + message["content"] | trim }}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""

QWEN_TEMPLATE = """
{%- if tools %}
<|im_start|>system
{% if messages[0].role == "system" %}{{ messages[0].content + "\\n\\n" }}{% endif %}
# Tools
    {%- for tool in tools %}
        {{- "\\n" + tool | tojson }}
    {%- endfor %}
<|im_end|>
{% elif messages[0].role == "system" %}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = (messages | length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" and loop.first %}{%- continue %}{%- endif %}
    {%- set content = message.content if message.content is string else "" %}
    {%- if message.content is not string and message.content is iterable %}
        {%- set parts = namespace(text="") %}
        {%- for part in message.content %}{%- set parts.text = parts.text + part.text %}{%- endfor %}
        {%- set content = parts.text %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.role == "assistant" %}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
            {{- "<think>\\n" + message.reasoning_content + "\\n</think>\\n\\n" }}
        {%- endif %}
        {%- generation %}
            {{- content.split("</think>")[-1].lstrip("\\n") }}
            {%- for call in message.tool_calls or [] %}
                {{- "\\n<tool_call>\\n" + call.function | tojson + "\\n</tool_call>" }}
            {%- endfor %}
            {{- "<|im_end|>" }}
        {%- endgeneration %}
        {{- "\\n" }}
    {%- else %}
        {{- content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
"""


def write_llama(folder: Path) -> None:
    """Like Llama 3: digits in groups of three, and a post-processor that puts the first token in front."""
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    backend = _byte_level(r"{1,3}", special)
    bos = special[0]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, backend.token_to_id(bos))],
            ),
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=True,
        model_max_length=24,
        chat_template=LLAMA_TEMPLATE,
    ).save_pretrained(folder)


def write_qwen(folder: Path) -> None:
    """Like Qwen: NFC, single digits, padding, no first token, and added tokens that are not special."""
    backend = _byte_level("", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=QWEN_TEMPLATE,
    )
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.save_pretrained(folder)


def write_old_qwen(folder: Path) -> None:
    """The same, in the files of transformers 4: template and added tokens within tokenizer_config.json."""
    write_qwen(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["chat_template"] = (folder / "chat_template.jinja").read_text("utf-8")
    config |= {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 64,
    }
    path.write_text(json.dumps(config), "utf-8")
    (folder / "chat_template.jinja").unlink()
    roles = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles), "utf-8")


def write_words(folder: Path) -> None:
    """Whole words, with an unknown token, no special handling of bytes, and settings left in the file."""
    words = ["[UNK]", "[PAD]", "hello", "world", ",", "!", "it", "'", "s", "n't", "is", "one"]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.enable_padding(direction="left", pad_id=1, pad_token="[PAD]")
    backend.enable_truncation(5, direction="left")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        clean_up_tokenization_spaces=True,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


WRITERS = {"llama": write_llama, "qwen": write_qwen, "old_qwen": write_old_qwen, "words": write_words}


def _byte_level(digits: str, special: list[str]) -> Any:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens(special)
    return backend
