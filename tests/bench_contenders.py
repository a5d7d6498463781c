"""The two that bench_train.py compares: minitinker, and transformers + PEFT + torch.optim.AdamW.

Each is made in a process of its own. torch is imported in functions, so that minitinker's has none of it.
"""

import os
import time
from typing import Any

import numpy as np

from minitinker import AdamParams, Datum, ModelInput, SampledSequence, SamplingParams, ServiceClient

MODELS = {  # layers, d, ffn, heads, kv heads, head_dim, vocabulary
    "XS": (2, 32, 48, 4, 2, 8, 264),
    "S": (4, 128, 384, 4, 2, 32, 512),
    "M": (6, 256, 768, 8, 4, 32, 4096),
    "L": (4, 1024, 3072, 16, 8, 64, 32000),
    "0.6B": (28, 1024, 3072, 16, 8, 128, 151_936),
    "8B": (36, 4096, 12288, 32, 8, 128, 151_936),
}
NEW_TOKENS = 64
ADAM = AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0)


def write_model(name: str, folder: str) -> None:
    """A random model of MODELS as a Hugging Face folder, the large ones in bfloat16. It has no end token."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers, d, ffn, heads, kv_heads, head_dim, vocab = MODELS[name]
    config = Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=d,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=name != "8B",
        eos_token_id=None,
    )
    torch.manual_seed(0)
    large = name in ("0.6B", "8B")
    with torch.device("cuda" if large and torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16 if large else torch.float32).save_pretrained(folder)


class Contender:
    """What both have: `step()`, a training step that returns the summed loss, and `sample()`."""

    def seconds(self, what: str) -> float:
        """How long "step" or "sample" takes, right after one that is not timed: caches and threads are warm."""
        getattr(self, what)()
        begin = time.perf_counter()
        getattr(self, what)()
        return time.perf_counter() - begin


class Minitinker(Contender):
    def __init__(
        self,
        base: str,
        home: str,
        tokens: list[np.ndarray],
        targets: list[np.ndarray],
        backend: str = "reference",
    ) -> None:
        """base: the model's folder, home: one for checkpoints. tokens, targets: (n,) int64 of each sequence."""
        os.environ["MINITINKER_HOME"] = home
        inputs = [ModelInput.from_ints(x.tolist()) for x in tokens]
        self.data = [Datum(x, {"target_tokens": y}) for x, y in zip(inputs, targets, strict=True)]
        service = ServiceClient(backend=backend)
        first = service.create_lora_training_client(base, rank=32, seed=0, train_unembed=False)
        first.forward_backward(self.data, "cross_entropy")
        first.optim_step(AdamParams(learning_rate=1e-2))  # now B is not zero
        path = first.save_state("start").result().path
        self.start = os.path.join(home, path.removeprefix("tinker://"))
        self.client = service.create_training_client_from_state(path)
        self.sampler = self.client.save_weights_and_get_sampling_client()

    def adapter(self) -> str:
        """The folder of the A and B that training begins from."""
        return self.start

    def step(self) -> float:
        loss = self.client.forward_backward(self.data, "cross_entropy")
        step = self.client.optim_step(ADAM)
        step.result()
        return loss.result().loss

    def sample(self) -> list[SampledSequence]:
        """NEW_TOKENS after each sequence, at temperature 1, with nothing cut off."""
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])
        answers = [self.sampler.sample(datum.model_input, 1, params) for datum in self.data]
        return [answer.result().sequences[0] for answer in answers]


class Peft(Contender):
    """torch is imported in its methods, so that it is in this contender's process alone."""

    def __init__(
        self,
        base: str,
        adapter: str,
        tokens: list[np.ndarray],
        targets: list[np.ndarray],
        compiled: bool = False,
    ) -> None:
        """base and adapter: folders. tokens, targets: (n,) int64 of each sequence. On a GPU where there is one,
        with the base in the dtype of its files."""
        import torch
        from peft import PeftModel
        from torch.nn.utils.rnn import pad_sequence
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"

        def pad(rows: list[np.ndarray], filler: int) -> torch.Tensor:
            padded = pad_sequence([torch.from_numpy(x) for x in rows], batch_first=True, padding_value=filler)
            return padded.to(device)

        self.batch, self.labels = {"input_ids": pad(tokens, 0)}, pad(targets, -100)
        if len({len(x) for x in tokens}) > 1:
            self.batch["attention_mask"] = pad([np.ones_like(x) for x in tokens], 0)
        dtype = "auto" if device == "cuda" else torch.float32
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
        self.model: Any = PeftModel.from_pretrained(loaded.to(device), adapter, is_trainable=True)
        self.note = ""
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=ADAM.learning_rate,
            betas=(ADAM.beta1, ADAM.beta2),
            eps=ADAM.eps,
            weight_decay=ADAM.weight_decay,
        )

    def step(self) -> float:
        """Where the GPU's memory does not suffice, with activations checkpointed from then on."""
        import torch

        self.model.train()
        try:
            loss = self.loss_backward()
        except torch.OutOfMemoryError:
            if self.note:
                raise
            loss = None
        if loss is None:  # here, where the failed pass's tensors are gone
            self.note = "with checkpointing, for lack of memory"
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def loss_backward(self) -> float:
        from torch.nn.functional import cross_entropy

        logits = self.forward(**self.batch, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=-100, reduction="sum")
        loss.backward()
        return loss.item()

    def sample(self) -> int:
        """NEW_TOKENS after each sequence, at temperature 1, with nothing cut off; returns how many it made."""
        import torch

        self.model.eval()
        prompts = self.batch["input_ids"]
        options = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": NEW_TOKENS,
        }
        made = self.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)
        return made.numel() - prompts.numel()

    def logprob(self, samples: list[list[int]]) -> float:
        """The summed logprobs of tokens that follow the sequences."""
        import torch

        prompts, drawn = self.batch["input_ids"], torch.tensor(samples)
        with torch.no_grad():
            logits = self.model.eval()(torch.cat([prompts, drawn], 1)).logits[:, prompts.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(-1, drawn[..., None]).sum().item()
