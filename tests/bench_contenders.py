"""The two that bench_train.py compares: minitinker, and transformers + PEFT + torch.optim.AdamW.

Each is made in a process of its own. torch is imported in functions, so that minitinker's has none of it.
"""

import os
import time
from typing import Any

import numpy as np

from minitinker import AdamParams, Datum, ModelInput, SampledSequence, SamplingParams, ServiceClient

MODELS = {  # layers, d, ffn, heads, kv heads, head_dim, vocabulary
    "S": (4, 128, 384, 4, 2, 32, 512),
    "M": (6, 256, 768, 8, 4, 32, 4096),
    "L": (4, 1024, 3072, 16, 8, 64, 32000),
}
NEW_TOKENS = 64
ADAM = AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0)


def write_model(name: str, folder: str) -> None:
    """A random model of MODELS as a Hugging Face folder. It has no end token."""
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
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


class Contender:
    """What both have: `step()`, a training step that returns the summed loss, and `sample()`."""

    def seconds(self, what: str) -> float:
        """How long "step" or "sample" takes, right after one that is not timed: caches and threads are warm."""
        getattr(self, what)()
        begin = time.perf_counter()
        getattr(self, what)()
        return time.perf_counter() - begin


class Minitinker(Contender):
    def __init__(self, base: str, home: str, tokens: list[np.ndarray], targets: list[np.ndarray]) -> None:
        """base: the model's folder, home: one for checkpoints. tokens, targets: (n,) int64 of each sequence."""
        os.environ["MINITINKER_HOME"] = home
        inputs = [ModelInput.from_ints(x.tolist()) for x in tokens]
        self.data = [Datum(x, {"target_tokens": y}) for x, y in zip(inputs, targets, strict=True)]
        service = ServiceClient(backend="reference")
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

    def __init__(self, base: str, adapter: str, tokens: list[np.ndarray], targets: list[np.ndarray]) -> None:
        """base and adapter: folders. tokens, targets: (n,) int64 of each sequence."""
        import torch
        from peft import PeftModel
        from torch.nn.utils.rnn import pad_sequence
        from transformers import AutoModelForCausalLM

        def pad(rows: list[np.ndarray], filler: int) -> torch.Tensor:
            return pad_sequence([torch.from_numpy(x) for x in rows], batch_first=True, padding_value=filler)

        self.batch, self.labels = {"input_ids": pad(tokens, 0)}, pad(targets, -100)
        if len({len(x) for x in tokens}) > 1:
            self.batch["attention_mask"] = pad([np.ones_like(x) for x in tokens], 0)
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
        self.model: Any = PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=ADAM.learning_rate,
            betas=(ADAM.beta1, ADAM.beta2),
            eps=ADAM.eps,
            weight_decay=ADAM.weight_decay,
        )

    def step(self) -> float:
        from torch.nn.functional import cross_entropy

        self.model.train()
        logits = self.model(**self.batch, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=-100, reduction="sum")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
