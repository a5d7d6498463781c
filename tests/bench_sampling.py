"""How fast the sampler is on a CPU beside transformers' `generate`, with the adapter and with it merged.

    python tests/bench_sampling.py [--only S,M,one,ragged,adapters,group] [--turns N] [--json FILE]
    python tests/bench_sampling.py --backend kernels [--only batches,adapters,group] ...

The second is for the kernels on a GPU, see bench_gpu_sampling.py; with `--only small` it runs in Triton's
interpreter: its figures mean nothing then.

Models, adapters and contenders are those of bench_train.py; both draw at temperature 1 with nothing cut off, and take
turns, each in a process of its own. What counts is the median. The exit status is 1 where a floor is missed.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import numpy as np
from bench_contenders import MODELS, Minitinker, Peft, write_model
from bench_gpu_sampling import compare_on_gpu, print_gpu_table
from bench_train import gpu_name

from minitinker import AdamParams, ModelInput, SamplingParams

NEW = 64
SPAN = 1.0  # seconds in which the ragged requests arrive
PAUSE = 0.1  # seconds before a turn, in which the other's idle threads stop spinning


class Ours(Minitinker):
    """minitinker, with several snapshots of the adapter."""

    def drawn(
        self,
        prompts: list[list[int]],
        lengths: list[int],
        samples: int = 1,
        adapters: int = 1,
        arrivals: list[float] | None = None,
    ) -> float:
        """Seconds for all, asked at once, or each when so many seconds have gone by; row i of adapter i modulo
        `adapters`."""
        if not hasattr(self, "snapshots"):
            self.snapshots = [self.sampler]
        while len(self.snapshots) < adapters:
            self.client.forward_backward(self.data, "cross_entropy")
            self.client.optim_step(AdamParams(learning_rate=1e-4))
            self.snapshots.append(self.client.save_weights_and_get_sampling_client())
            self.snapshots[-1].result()
        begin, answers = time.perf_counter(), []
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            if arrivals is not None:
                time.sleep(max(0.0, begin + arrivals[i] - time.perf_counter()))
            params = SamplingParams(max_tokens=length, temperature=1.0, stop=[])
            answers.append(self.snapshots[i % adapters].sample(ModelInput.from_ints(prompt), samples, params))
        for answer in answers:
            answer.result()
        return time.perf_counter() - begin

    def one_by_one(self, prompts: list[list[int]], lengths: list[int]) -> float:
        """Seconds for all, each asked when the one before is answered."""
        return sum(self.drawn([p], [n]) for p, n in zip(prompts, lengths, strict=True))


class Theirs(Peft):
    """transformers' generate, with the adapter beside the base or merged into it."""

    def merge(self) -> None:
        self.model = self.model.merge_and_unload()

    def drawn(self, prompts: list[list[int]], lengths: list[int]) -> float:
        """Seconds for all as one batch, padded on the left, as long as the longest."""
        import torch

        self.model.eval()
        longest, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        begin = time.perf_counter()
        with torch.no_grad():
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(lengths),
                pad_token_id=0,
            ).cpu()
        return time.perf_counter() - begin

    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        import torch

        source = torch.randn((1 << 28) if torch.cuda.is_available() else 1 << 16, device=self.model.device)
        target, seconds = torch.empty_like(source), []
        for _ in range(10):
            begin = time.perf_counter()
            target.copy_(source)
            target[-1].item()  # waits
            seconds.append(time.perf_counter() - begin)
        return 2 * source.nbytes / float(np.median(seconds[3:]))


class Processes(BaseManager):
    pass


Processes.register("Ours", Ours)
Processes.register("Theirs", Theirs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("reference", "kernels"), default="reference")
    parser.add_argument("--only")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_gpu = options.backend == "kernels"
    all_works = "batches,adapters,group" if on_gpu else "S,M,one,ragged,adapters,group"
    works = (options.only or all_works).split(",")
    if "small" in works:
        os.environ["TRITON_INTERPRET"] = "1"
    packages = ("numpy", "torch", "triton", "transformers", "peft")
    head = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu_name(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
    }
    print(json.dumps(head))
    rows: list[dict[str, Any]] = []
    if on_gpu:
        with contenders("XS" if "small" in works else "0.6B", "kernels") as three:
            rows = compare_on_gpu(three, works, options.turns, median)
        passed = print_gpu_table(rows)
    else:
        for model in ("S", "M"):
            own = [work for work in works if (work == "S") == (model == "S")]
            if own:
                with contenders(model, "reference") as three:
                    rows += compare(three, model, own, options.turns)
        passed = print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(head | {"rows": rows}, indent=1))
    sys.exit(not passed)


def print_table(rows: list[dict[str, Any]]) -> bool:
    """Whether every floor was met."""
    print(f"\n{'':44}{'ours':>9}{'other':>9}{'ratio':>8}{'floor':>8}")
    for row in rows:
        told = "pass" if row["ratio"] >= row["floor"] else "FAIL"
        print(
            f"{row['what']:44}{row['ours']:8.3f}s{row['other']:8.3f}s{row['ratio']:7.2f}x{row['floor']:7.2f}x {told}"
        )
    return all(row["ratio"] >= row["floor"] for row in rows)


@contextmanager
def contenders(model: str, backend: str) -> Iterator[tuple[Any, Any, Any]]:
    """minitinker, generate with the adapter beside the base, and merged into it, each in a process of its own."""
    tokens = [np.random.default_rng(0).integers(0, MODELS[model][-1], 16) for _ in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        base = f"{folder}/base"
        with context.Pool(1) as pool:  # torch stays out of this process
            pool.apply(write_model, (model, base))
        managers = [Processes(ctx=context) for _ in range(3)]
        for manager in managers:
            manager.start()
        ours = managers[0].Ours(base, f"{folder}/home", tokens, tokens, backend)
        theirs, merged = (manager.Theirs(base, ours.adapter(), tokens, tokens) for manager in managers[1:])
        merged.merge()
        yield ours, theirs, merged
        for manager in managers:
            manager.shutdown()


def median(turns: int, *calls: Any) -> list[float]:
    """Of each call, after one that is not counted; they take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):
        for call, own in zip(calls, seconds, strict=True):
            time.sleep(PAUSE)
            own += [call()] if turn else [call()][:0]
    return [float(np.median(own)) for own in seconds]


def compare(three: tuple[Any, Any, Any], model: str, works: list[str], turns: int) -> list[dict[str, Any]]:
    rng, vocabulary = np.random.default_rng(0), MODELS[model][-1]

    def prompt(n: int) -> list[int]:
        return rng.integers(0, vocabulary, n).tolist()

    many = [prompt(16) for _ in range(16)]
    arrivals = np.sort(rng.uniform(0, SPAN, 64)).tolist()
    ragged = [prompt(int(n)) for n in rng.integers(8, 129, 64)], rng.integers(8, 129, 64).tolist()
    rows: list[dict[str, Any]] = []

    def row(what: str, ours: float, other: float, floor: float) -> None:
        rows.append({"what": what, "ours": ours, "other": other, "ratio": other / ours, "floor": floor})

    ours, theirs, merged = three
    if "S" in works or "M" in works:
        mine, beside, within = median(
            turns, *(lambda c=c: c.drawn(many, [NEW] * 16) for c in (ours, theirs, merged))
        )
        row(f"{model}, 16 x {NEW}: generate", mine, beside, 3.5 if model == "S" else 2.5)
        row(f"{model}, 16 x {NEW}: generate, merged", mine, within, 2)
    if "one" in works:
        mine, beside, within = median(
            turns, *(lambda c=c: c.drawn(many[:1], [NEW]) for c in (ours, theirs, merged))
        )
        row(f"{model}, 1 x {NEW}: generate", mine, beside, 3.5)
        row(f"{model}, 1 x {NEW}: generate, merged", mine, within, 2)
    if "ragged" in works:
        mine, alone, padded = median(
            turns,
            lambda: ours.drawn(*ragged, 1, 1, arrivals),
            lambda: ours.one_by_one(*ragged),
            lambda: arrivals[-1] + theirs.drawn(*ragged),  # which waits for the last one
        )
        row(f"{model}, 64 ragged: one after another", mine, alone, 4)
        row(f"{model}, 64 ragged: generate, one padded batch", mine, padded, 1.5)
    if "adapters" in works:
        rows32 = [prompt(16) for _ in range(32)]
        one, all32 = median(
            turns, lambda: ours.drawn(rows32, [NEW] * 32), lambda: ours.drawn(rows32, [NEW] * 32, 1, 32)
        )
        row(f"{model}, 32 rows: 32 adapters, other: 1", all32, one, 0.6)
    if "group" in works:

        def fresh(samples: int) -> float:
            return float(ours.drawn([prompt(512)], [1], samples))

        group, single = median(turns, lambda: fresh(16), lambda: fresh(1))
        row(f"{model}, 16 samples of 512 tokens, other: 1", group, single, 1 / 1.15)
    return rows


if __name__ == "__main__":
    main()
