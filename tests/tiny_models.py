"""Tiny random models in Hugging Face folders, data for them, and the same adapter in PEFT.

Other test files import this one by name: `from tiny_models import make_model, make_batch`.
"""

import atexit
import copy
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

import minitinker
from minitinker import reference
from minitinker.engine.trainer import Trainer
from minitinker.model.adapter import AdapterSpec, adapter_spec, views
from minitinker.model.weights import BaseModel, load_base_model
from minitinker.types import Datum, ModelInput

torch.set_num_threads(1)  # a model this small is slower on two, by far where another process wants them too

TINY = Path(minitinker.__file__).parent / "tiny"
VOCAB = 264  # of the tokenizer in minitinker/tiny
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 259,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama-biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "llama3-tied": (LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
}


def make_model(
    family: str = "qwen3-tied", folder: Path | None = None, *, seed: int = 0, **overrides: object
) -> tuple[Path, PreTrainedModel]:
    """A random model, the same for the same seed, as a folder and as what transformers makes of it.

    family: a key of FAMILIES. folder: where to write it; None for one that lasts as long as the process.
    overrides: fields of the config, beside or instead of SIZES. The folder has no tokenizer; see `with_tokenizer`.
    """
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="tiny-model-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_config, fields = FAMILIES[family]
    config = make_config(**copy.deepcopy(SIZES | fields | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, x in model.named_parameters():  # norms and biases too, which transformers starts constant
            if "norm" in name:
                torch.nn.init.normal_(x, 1, 0.2)
            elif x.ndim == 1 or "embed_tokens" in name:
                torch.nn.init.normal_(x, 0, 0.5)
            else:
                torch.nn.init.normal_(x, 0, x.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder, model


def with_tokenizer(folder: Path) -> Path:
    """The same folder with the tokenizer of minitinker/tiny beside the weights, so that nothing is missing."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def make_trainer(
    base: BaseModel | Path, rank: int = 8, *, seed: int = 0, spread: float | None = 0.1, **flags: bool
) -> Trainer:
    """A trainer on the reference backend. spread: of the normal that A and B are drawn from; None leaves
    them as a new adapter has them, with B zero. flags: train_attn, train_mlp, train_unembed, all True.
    """
    base = load_base_model(str(base)) if isinstance(base, Path) else base
    whole = {"train_attn": True, "train_mlp": True, "train_unembed": True} | flags
    trainer = Trainer(reference, base, adapter_spec(base.config, rank, **whole), seed)
    if spread is not None:
        trainer.flat[...] = spread * np.random.default_rng(seed).standard_normal(trainer.spec.size)
    return trainer


def make_batch(
    lengths: Sequence[int] = (7, 1, 20, 12),
    loss_fn: str = "cross_entropy",
    *,
    k: int | None = None,
    vocab: int = VOCAB,
    seed: int = 0,
) -> list[Datum]:
    """Random data for a loss: one datum per length, targets of shape (N,), or (N, k) where k is given."""
    rng = np.random.default_rng(seed)
    data = []
    for n in lengths:
        shape = (n,) if k is None else (n, k)
        inputs = {"target_tokens": rng.integers(0, vocab, shape)}
        if loss_fn == "cross_entropy":
            inputs["weights"] = rng.standard_normal(shape, np.float32)  # negative ones too
        else:
            inputs["logprobs"] = rng.normal(-5, 1, shape).astype(np.float32)
            inputs["advantages"] = rng.standard_normal(shape, np.float32)
        if loss_fn == "gspo":
            inputs["sequence_ratio_mask"] = (np.arange(n) % 3 < 2).astype(
                np.float32
            )  # the first, and not all
        data.append(Datum(ModelInput.from_ints(rng.integers(0, vocab, n).tolist()), inputs))
    return data


def torch_logprobs(model: torch.nn.Module, datum: Datum) -> torch.Tensor:
    """What a model of transformers or PEFT says of a datum's targets, with its graph: like target_tokens."""
    tokens = torch.tensor([datum.model_input.to_ints()])
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    everything = torch.log_softmax(model(input_ids=tokens).logits[0].float(), -1)
    return everything.gather(-1, targets.reshape(len(targets), -1)).reshape(targets.shape)


def to_peft(model: PreTrainedModel, spec: AdapterSpec, flat: np.ndarray) -> PeftModel:
    """A PEFT model with this adapter on a copy of `model`. flat: (spec.size,) float32."""
    config = LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), target_modules=list(spec.shapes))
    model = copy.deepcopy(model)
    untied = model.config.tie_word_embeddings and "lm_head" in spec.shapes
    if untied:  # PEFT warns that it cannot merge an adapter into a head that shares its weight
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what it has renamed
        peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, ab in views(spec, flat).items():
            for parameter, x in zip(_lora_parameters(peft, name), ab, strict=True):
                parameter.copy_(torch.from_numpy(x[0]))
    return peft


def from_peft(peft: PeftModel, spec: AdapterSpec, gradients: bool = False) -> np.ndarray:
    """The adapter of a PEFT model, or its gradients, in our layout: (spec.size,) float32."""
    flat = np.zeros(spec.size, np.float32)
    for name, ab in views(spec, flat).items():
        for parameter, x in zip(_lora_parameters(peft, name), ab, strict=True):
            x[0] = (parameter.grad if gradients else parameter.detach()).numpy()
    return flat


def _lora_parameters(peft: PeftModel, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    module = peft.get_submodule(f"base_model.model.{name}")
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def relative_errors(actual: np.ndarray, expected: np.ndarray, spec: AdapterSpec) -> dict[str, float]:
    """|actual - expected| / |expected| of each A and B in two flat arrays, where |x| is the Euclidean norm."""
    found = {}
    pairs = zip(views(spec, actual).items(), views(spec, expected).values(), strict=True)
    for (name, ours), theirs in pairs:
        for letter, x, y in zip("AB", ours, theirs, strict=True):
            error, size = np.linalg.norm((x - y).ravel()), np.linalg.norm(y.ravel())
            found[f"{name}.{letter}"] = float(error / size) if size else float(error)
    return found
