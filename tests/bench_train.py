"""How fast minitinker's reference backend is beside transformers + PEFT + torch.optim.AdamW, on a CPU, in float32.

    python tests/bench_train.py [--only S,ragged,M,L,sample,start] [--repeats N] [--json FILE]

Both contenders run in this process on the same random Qwen3 models (tied head, rank 32 on all seven linears)
and the same data. They take turns, each with as many threads as it takes by default, and what counts is the
median. They begin from the same A and B, B not zero, and must first agree on what they compute. The exit
status is 1 where a floor is missed.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from minitinker import AdamParams, Datum, ModelInput, SampledSequence, SamplingParams, ServiceClient

MODELS = {  # layers, d, ffn, heads, kv heads, head_dim, vocabulary
    "S": (4, 128, 384, 4, 2, 32, 512),
    "M": (6, 256, 768, 8, 4, 32, 4096),
    "L": (4, 1024, 3072, 16, 8, 64, 32000),
}
BATCHES = {  # work -> model, lengths of the sequences
    "S": ("S", [64] * 16),
    "ragged": ("S", np.random.default_rng(0).integers(16, 129, 16).tolist()),
    "M": ("M", [128] * 16),
    "L": ("L", [256] * 4),
    "sample": ("S", [16] * 16),
}
FLOORS = {"S": 1.2, "ragged": 2.0, "M": 1.2, "L": 1.1, "sample": 2.5}  # minitinker's tokens/s over PEFT's
TURNS = {"S": 40, "ragged": 40, "M": 15, "L": 5, "sample": 10, "start": 5}
NEW_TOKENS = 64
MOST_SECONDS, MOST_MEGABYTES = 1.0, 150.0  # from starting Python to the end of the first training step
PAUSE = 0.1  # seconds before a turn, so that the other's idle threads have stopped spinning
ADAM = AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0)

# The start-up as a user would write it; sys.argv[1] is the model's folder. Memory is read from VmHWM, since
# ru_maxrss of a new process begins with what the process had that started it, here this one with torch.
DATA = """
import random, sys
batch = [[random.randrange(512) for _ in range(65)] for _ in range(16)]
"""
PRINT_PEAK = """
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6, flush=True)
"""
OUR_START = """
import minitinker
from minitinker import types
client = minitinker.ServiceClient().create_lora_training_client(sys.argv[1], rank=32, train_unembed=False)
data = [types.Datum(types.ModelInput.from_ints(x[:-1]), {"target_tokens": x[1:]}) for x in batch]
loss = client.forward_backward(data, "cross_entropy")
step = client.optim_step(types.AdamParams())
loss.result(), step.result()
"""
PEFT_START = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules=linears))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
x = torch.tensor(batch)
logits = model(input_ids=x[:, :-1], use_cache=False).logits
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum")
loss.backward()
optimizer.step()
"""


@dataclass(frozen=True)
class Row:
    """A line of the table. ratio: how many times better than PEFT minitinker is."""

    work: str
    unit: str
    minitinker: float
    peft: float
    ratio: float
    floor: str
    passed: bool


class Pair:
    """Both contenders on one random model with the same A and B, and a random batch for them."""

    def __init__(self, model: str, lengths: list[int], folder: Path) -> None:
        """folder: an empty one, for the model and minitinker's checkpoints."""
        os.environ["MINITINKER_HOME"] = str(folder / "home")
        base = write_model(model, folder / "model")
        random, vocab = np.random.default_rng(1), MODELS[model][-1]
        self.tokens = [random.integers(0, vocab, n) for n in lengths]
        self.targets = [random.integers(0, vocab, n) for n in lengths]
        self.data = [
            Datum(ModelInput.from_ints(x.tolist()), {"target_tokens": y})
            for x, y in zip(self.tokens, self.targets, strict=True)
        ]
        service = ServiceClient(backend="reference")
        first = service.create_lora_training_client(base, rank=32, seed=0, train_unembed=False)
        first.forward_backward(self.data, "cross_entropy")
        first.optim_step(AdamParams(learning_rate=1e-2))  # now B is not zero
        path = first.save_state("start").result().path
        self.ours = service.create_training_client_from_state(path).result()

        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
        adapter = folder / "home" / path.removeprefix("tinker://")
        self.peft: Any = PeftModel.from_pretrained(loaded, adapter, is_trainable=True).train()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.peft.parameters() if p.requires_grad],
            lr=ADAM.learning_rate,
            betas=(ADAM.beta1, ADAM.beta2),
            eps=ADAM.eps,
            weight_decay=ADAM.weight_decay,
        )
        self.batch = {"input_ids": pad(self.tokens, 0)}
        if len(set(lengths)) > 1:
            self.batch["attention_mask"] = pad([np.ones_like(x) for x in self.tokens], 0)
        self.labels = pad(self.targets, -100)

    def our_step(self) -> float:
        """One training step; returns the summed loss."""
        loss = self.ours.forward_backward(self.data, "cross_entropy")
        step = self.ours.optim_step(ADAM)
        step.result()
        return loss.result().loss

    def peft_step(self) -> float:
        """One training step; returns the summed loss."""
        logits = self.peft(**self.batch, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=-100, reduction="sum")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def write_model(name: str, folder: Path) -> str:
    """A random model of MODELS in a Hugging Face folder, whose path is returned. It has no end token."""
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
    return str(folder)


def pad(rows: list[np.ndarray], filler: int) -> torch.Tensor:
    """Rows of different lengths -> (rows, longest) int64, filled up on the right."""
    return pad_sequence([torch.from_numpy(x) for x in rows], batch_first=True, padding_value=filler)


def agree(what: str, ours: float, peft: float) -> None:
    """End the program if two numbers that should be one differ by more than 1e-5."""
    print(f"{what}: minitinker {ours:.4f}, PEFT {peft:.4f}", flush=True)
    if not abs(ours - peft) <= 1e-5 * abs(peft):
        raise SystemExit("they differ by more than 1e-5, so their speeds cannot be compared")


def take_turns(ours: Callable[[], Any], peft: Callable[[], Any], turns: int) -> tuple[float, float]:
    """The median seconds of each, after one turn that is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + turns):
        for contender, taken in zip((ours, peft), seconds, strict=True):
            time.sleep(PAUSE)
            begin = time.perf_counter()
            contender()
            taken.append(time.perf_counter() - begin)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def bench_training(work: str, turns: int, folder: Path) -> list[Row]:
    """Forward, backward and optimizer step."""
    model, lengths = BATCHES[work]
    pair = Pair(model, lengths, folder)
    for step in (1, 2):  # the second sees what the first did to A and B
        agree(f"{work}, summed loss of step {step}", pair.our_step(), pair.peft_step())
    ours, peft = take_turns(pair.our_step, pair.peft_step, turns)
    sizes = f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"{len(lengths)} of 16..128"
    return [tokens_per_second(f"{model}, step of {sizes}", sum(lengths), ours, peft, FLOORS[work])]


def bench_sampling(work: str, turns: int, folder: Path) -> list[Row]:
    """Completions of all prompts at once, at temperature 1 and with nothing cut off."""
    model, lengths = BATCHES[work]
    pair = Pair(model, lengths, folder)
    client, network = pair.ours.save_weights_and_get_sampling_client(), pair.peft.eval()
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])
    prompts, prompt_ids = [datum.model_input for datum in pair.data], pair.batch["input_ids"]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW_TOKENS}

    def our_samples() -> list[SampledSequence]:
        answers = [client.sample(prompt, 1, params) for prompt in prompts]
        return [answer.result().sequences[0] for answer in answers]

    def peft_samples() -> torch.Tensor:
        mask = torch.ones_like(prompt_ids)
        return network.generate(input_ids=prompt_ids, attention_mask=mask, **options)

    drawn = our_samples()
    tokens = torch.tensor([sequence.tokens for sequence in drawn])  # (prompts, NEW_TOKENS)
    assert peft_samples().shape == (len(prompts), lengths[0] + tokens.shape[1])
    with torch.no_grad():
        logits = network(torch.cat([prompt_ids, tokens], 1)).logits[:, lengths[0] - 1 : -1]
    peft_says = logits.log_softmax(-1).gather(-1, tokens[..., None]).sum().item()
    we_say = sum(sum(sequence.logprobs) for sequence in drawn)
    agree("sample, summed logprobs of what minitinker drew", we_say, peft_says)
    ours, peft = take_turns(our_samples, peft_samples, turns)
    label = f"{model}, {NEW_TOKENS} new tokens for {len(lengths)} x {lengths[0]}"
    return [tokens_per_second(label, tokens.numel(), ours, peft, FLOORS[work])]


def tokens_per_second(label: str, tokens: int, ours: float, peft: float, floor: float) -> Row:
    ratio = peft / ours
    return Row(label, "tokens/s", tokens / ours, tokens / peft, ratio, f"{floor} x", ratio >= floor)


def bench_start(work: str, turns: int, folder: Path) -> list[Row]:
    """A new Python up to the end of its first training step, with a model that is on disk."""
    model = write_model("S", folder / "model")
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    environment = os.environ | quiet | {"MINITINKER_HOME": str(folder), "MINITINKER_BACKEND": "reference"}
    measured: dict[str, list[tuple[float, float]]] = {OUR_START: [], PEFT_START: []}
    for _ in range(1 + turns):
        for program, results in measured.items():
            command = [sys.executable, "-c", DATA + program + PRINT_PEAK, model]
            begin = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
                peak = float(process.stdout.readline())
                results.append((time.perf_counter() - begin, peak))
    ours, peft = (np.median(results[1:], axis=0).tolist() for results in measured.values())
    limits = (
        ("start to end of first step", "s", MOST_SECONDS),
        ("peak memory of that process", "MB", MOST_MEGABYTES),
    )
    return [
        Row(label, unit, mine, theirs, theirs / mine, f"< {most:g} {unit}", mine < most)
        for (label, unit, most), mine, theirs in zip(limits, ours, peft, strict=True)
    ]


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    packages = ("minitinker", "numpy", "torch", "transformers", "peft")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # of the last minute: what else was running
        "torch_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def print_table(rows: list[Row]) -> None:
    print(f"\n{'':36}{'minitinker':>12}{'PEFT':>12}  {'':10}{'ratio':>7}  {'floor':10}")
    for row in rows:
        digits = 0 if row.minitinker >= 10 else 2
        numbers = f"{row.minitinker:12,.{digits}f}{row.peft:12,.{digits}f}  {row.unit:10}{row.ratio:6.2f}x"
        print(f"{row.work:36}{numbers}  {row.floor:10}{'pass' if row.passed else 'FAIL'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default=",".join(TURNS), help="works, with commas between; all: %(default)s"
    )
    parser.add_argument("--repeats", type=int, help=f"turns of each contender, instead of {TURNS}")
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    arguments = parser.parse_args()
    works = arguments.only.split(",")
    if not set(works) <= set(TURNS):
        parser.error(f"--only {arguments.only}: the works are {', '.join(TURNS)}")
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT calls
    about, rows = machine(), []
    print(json.dumps(about))
    if about["load"] > 0.5:
        print("other programs are running: these numbers will be off, torch's the most")
    for work in works:
        bench = {"sample": bench_sampling, "start": bench_start}.get(work, bench_training)
        with tempfile.TemporaryDirectory() as folder:
            rows += bench(work, arguments.repeats or TURNS[work], Path(folder))
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )
    sys.exit(0 if all(row.passed for row in rows) else 1)


if __name__ == "__main__":
    main()
