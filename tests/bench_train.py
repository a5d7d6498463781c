"""How fast the reference backend is beside transformers + PEFT + torch.optim.AdamW, on a CPU, in float32.

    python tests/bench_train.py [--only S,ragged,M,L,sample,start] [--repeats N] [--json FILE]
    python tests/bench_train.py --backend kernels [--only 0.6B,8B] ...

The second is for the kernels on a GPU, see bench_gpu_training.py; with `--only small` it runs in Triton's
interpreter: its figures mean nothing then.

Both contenders train the same random Qwen3 model (tied head, rank 32 on all seven linears) on the same data,
beginning from the same A and B, B not zero; before their speeds are compared they must agree on the loss. They
take turns, each in a process of its own, since minitinker's settings of the C library would make torch faster
too, and with as many threads as it takes by default. What counts is the median. The exit status is 1 where a
floor is missed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import numpy as np
from bench_contenders import MODELS, NEW_TOKENS, Minitinker, Peft, write_model
from bench_gpu_training import WORKS, bench_training, print_gpu_table

BATCHES = {  # work -> model, lengths of the sequences
    "S": ("S", [64] * 16),
    "ragged": ("S", np.random.default_rng(0).integers(16, 129, 16).tolist()),
    "M": ("M", [128] * 16),
    "L": ("L", [256] * 4),
    "sample": ("S", [16] * 16),
}
FLOORS = {"S": 1.2, "ragged": 2.0, "M": 1.2, "L": 1.1, "sample": 2.5}  # minitinker's tokens/s over PEFT's
TURNS = {"S": 40, "ragged": 40, "M": 15, "L": 5, "sample": 10, "start": 5}
MOST_SECONDS, MOST_MEGABYTES = 1.0, 150.0  # from starting Python to the end of the first training step
PAUSE = 0.1  # seconds before a turn, in which the other's idle threads stop spinning

# The start-up as a user would write it, in three pieces; sys.argv[1] is the model's folder.
MAKE_DATA = """
import random, resource, sys
batch = [[random.randrange(512) for _ in range(65)] for _ in range(16)]
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
TELL_PEAK = (
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, flush=True)"  # MB, on Linux
)


class Process(BaseManager):
    """A process to make a contender in; its methods run there."""


for made_there in (Minitinker, Peft):
    Process.register(made_there.__name__, made_there)


def new_process() -> Any:
    return Process(ctx=get_context("spawn"))


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


def bench_speed(work: str, turns: int, folder: str) -> list[Row]:
    """Training steps, or, for "sample", sampling; `folder` has the model."""
    model, lengths = BATCHES[work]
    random, vocab = np.random.default_rng(1), MODELS[model][-1]
    tokens, targets = ([random.integers(0, vocab, n) for n in lengths] for _ in range(2))
    with new_process() as one, new_process() as other:
        ours = one.Minitinker(folder, os.path.join(folder, "home"), tokens, targets)
        peft = other.Peft(folder, ours.adapter(), tokens, targets)
        if work == "sample":
            what, count = "sample", peft.sample()
            drawn = ours.sample()
            assert count == sum(len(sequence.tokens) for sequence in drawn) == NEW_TOKENS * len(lengths)
            logprob = sum(sum(sequence.logprobs) for sequence in drawn)
            agree("what minitinker drew, logprob", logprob, peft.logprob([list(s.tokens) for s in drawn]))
        else:
            what, count = "step", sum(lengths)
            for step in (1, 2):  # the second sees what the first did to A and B
                agree(f"{work}, loss of step {step}", ours.step(), peft.step())
        mine, theirs = take_turns(lambda: ours.seconds(what), lambda: peft.seconds(what), turns)
    sizes = f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"{len(lengths)} of 16..128"
    label = f"{model}, {what} {sizes}" + (f" + {NEW_TOKENS}" if what == "sample" else "")
    ratio, floor = theirs / mine, FLOORS[work]
    return [Row(label, "tokens/s", count / mine, count / theirs, ratio, f"{floor} x", ratio >= floor)]


def bench_start(work: str, turns: int, folder: str) -> list[Row]:
    """A new Python up to the end of its first training step, with a model that is on disk."""
    environment = os.environ | {"MINITINKER_HOME": folder, "MINITINKER_BACKEND": "reference"}

    def start(program: str) -> tuple[float, float]:
        # The peak of a new process begins with that of its parent: this one must never import torch.
        command = [sys.executable, "-c", MAKE_DATA + program + TELL_PEAK, folder]
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            peak = float(process.stdout.readline())
            seconds = time.perf_counter() - begin
        return seconds, peak

    ours, peft = take_turns(lambda: start(OUR_START), lambda: start(PEFT_START), turns)
    limits = (
        ("start to end of first step", "s", MOST_SECONDS),
        ("peak memory of that process", "MB", MOST_MEGABYTES),
    )
    return [
        Row(label, unit, mine, theirs, theirs / mine, f"< {most:g} {unit}", mine < most)
        for (label, unit, most), mine, theirs in zip(limits, ours, peft, strict=True)
    ]


def agree(what: str, ours: float, peft: float) -> None:
    """End the program if two numbers that should be one differ by more than 1e-5."""
    print(f"{what}: minitinker {ours:.4f}, PEFT {peft:.4f}", flush=True)
    if not abs(ours - peft) <= 1e-5 * abs(peft):
        raise SystemExit("they differ by more than 1e-5, so their speeds cannot be compared")


def take_turns(ours: Callable[[], Any], peft: Callable[[], Any], turns: int) -> Any:
    """The median, number by number, of what each returns, after one turn that does not count."""
    measured: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(1 + turns):
        for contender, results in zip((ours, peft), measured, strict=True):
            time.sleep(PAUSE)
            results.append(contender())
    return [np.median(results[1:], axis=0).tolist() for results in measured]


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    packages = ("minitinker", "numpy", "torch", "triton", "transformers", "peft")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": gpu_name(),
        "load": round(os.getloadavg()[0], 2),  # of the minute before: what else was running
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def gpu_name() -> str | None:
    """As nvidia-smi has it; None without one. This process must never import torch."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def print_table(rows: list[Row]) -> None:
    print(f"\n{'':30}{'minitinker':>12}{'PEFT':>12}  {'':10}{'ratio':>7}   floor")
    for row in rows:
        digits = 0 if row.minitinker >= 10 else 2
        numbers = f"{row.minitinker:12,.{digits}f}{row.peft:12,.{digits}f}  {row.unit:10}{row.ratio:6.2f}x"
        print(f"{row.work:30}{numbers}   {row.floor:9}{'pass' if row.passed else 'FAIL'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=("reference", "kernels"), default="reference")
    parser.add_argument("--only", help="works, with commas between; all but `small`")
    parser.add_argument("--repeats", type=int, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    arguments = parser.parse_args()
    on_gpu = arguments.backend == "kernels"
    known = list(WORKS if on_gpu else TURNS)
    works = arguments.only.split(",") if arguments.only else [work for work in known if work != "small"]
    if not set(works) <= set(known):
        parser.error(f"--only {arguments.only}: the works are {', '.join(known)}")
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # in all processes
    about, rows = machine(), []
    print(json.dumps(about))
    if about["load"] > 0.5:
        print("other programs are running: these numbers will be off, torch's the most")
    for work in works:
        with tempfile.TemporaryDirectory() as folder:
            with get_context("spawn").Pool(1) as pool:
                pool.apply(write_model, ((WORKS if on_gpu else BATCHES).get(work, "S")[0], folder))
            if on_gpu:
                rows += bench_training(work, arguments.repeats, folder)
                continue
            bench = bench_start if work == "start" else bench_speed
            rows += bench(work, arguments.repeats or TURNS[work], folder)
    if on_gpu:
        passed = print_gpu_table(rows)
    else:
        print_table(rows)
        passed = all(row.passed for row in rows)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
