"""Training through the kernels beside transformers + PEFT, eager and compiled: `bench_train.py --backend kernels`.

Each contender has a process of its own. Where a GPU holds them all they take turns, so that a clock that changes
changes all of them: in a turn one step is made before the one that counts, and the memory given back after it.
Models too large for that are trained by one contender after the other. Each process first measures the rate of a
large matrix product, which MFU is relative to. All begin from the same A and B, and must agree on the loss of the
first step within bfloat16's error before their speeds count.
"""

import math
import os
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from bench_contenders import MODELS, Minitinker, Peft

WORKS = {"0.6B": ("0.6B", [1024] * 16), "8B": ("8B", [1024] * 16), "small": ("XS", [9, 6])}
TAKE_TURNS = {"0.6B", "small"}
TURNS = {"0.6B": 10, "8B": 5, "small": 2}
TARGETS = {"8B": 1.5}  # minitinker's tokens/s over those of PEFT eager
CONTENDERS = ("minitinker", "PEFT eager", "PEFT compiled")
RANK = 32


@dataclass(frozen=True)
class GpuRow:
    """A line of the table. mfu: of the matrix products' rate; 0 where the contender ran out of memory."""

    work: str
    contender: str
    tokens_per_second: float
    mfu: float
    peak_gigabytes: float
    ratio: float | None = None  # minitinker's tokens/s over this one's
    note: str = ""


def flops_per_token(model: str, length: int) -> float:
    """Of a LoRA step with causal attention on sequences of `length`: 4 P + 6 r sum(in + out) + 6 L s h hd."""
    layers, d, ffn, heads, kv_heads, head_dim, vocab = MODELS[model]
    q, kv = heads * head_dim, kv_heads * head_dim
    linears = [(d, q), (d, kv), (d, kv), (q, d), (d, ffn), (d, ffn), (ffn, d)]
    weights = layers * sum(a * b for a, b in linears) + d * vocab
    adapters = layers * sum(a + b for a, b in linears)
    return 4 * weights + 6 * RANK * adapters + 6 * layers * length * q


def matmul_rate(size: int) -> float:
    """FLOP/s of a product of two random square matrices, in bfloat16 on a GPU."""
    import torch

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        _synchronize()
        begin = time.perf_counter()
        a @ b
        _synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / float(np.median(seconds[3:]))


def contend(
    link: Connection, kind: str, folder: str, tokens: list[Any], targets: list[Any], small: bool
) -> None:
    """Runs in a process of its own. Tells the loss of the first step and the matrix rate; then, for each True that
    it hears, the seconds of a step; for False, peak memory and a note, and ends. An error is told instead."""
    import torch

    if small:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        rate = matmul_rate(256 if small else 8192)
        home = os.path.join(folder, "home")
        if kind == "minitinker":
            contender: Any = Minitinker(folder, home, tokens, targets, backend="kernels")
        else:
            with open(os.path.join(home, "adapter"), encoding="utf-8") as file:
                adapter = file.read()
            contender = Peft(folder, adapter, tokens, targets, compiled=kind == "PEFT compiled")
        loss = contender.step()
        contender.step()
        if kind == "minitinker":
            with open(os.path.join(home, "adapter"), "w", encoding="utf-8") as file:
                file.write(contender.adapter())
        _give_back()
        link.send({"loss": loss, "rate": rate})
        while link.recv():
            contender.step()
            _synchronize()
            begin = time.perf_counter()
            contender.step()
            _synchronize()
            seconds = time.perf_counter() - begin
            _give_back()
            link.send(seconds)
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        link.send({"peak": peak, "note": getattr(contender, "note", "")})
    except RuntimeError as error:  # out of memory is one; anything else is shown in the table, too
        link.send(error)


class Contestant:
    """A contender in its process. error: what went wrong there, after which it answers nothing more."""

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.kind, self.seconds, self.error = kind, list[float](), ""
        self.told: dict[str, Any] = {}
        self.link, theirs = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(
            target=contend, args=(theirs, kind, *arguments), daemon=True
        )
        self.process.start()
        theirs.close()
        self._hear()

    def take_turn(self) -> None:
        if not self.error:
            self.link.send(True)
            self._hear()

    def end(self) -> None:
        if not self.error:
            self.link.send(False)
            self._hear()
        self.process.join()

    def _hear(self) -> None:
        try:
            answer = self.link.recv()
        except EOFError:
            answer = RuntimeError("its process ended")
        if isinstance(answer, RuntimeError):
            if self.kind == "minitinker":
                raise answer
            self.error = str(answer).partition("\n")[0][:60]
        elif isinstance(answer, float):
            self.seconds.append(answer)
        else:
            self.told |= answer


def bench_training(work: str, turns: int | None, folder: str) -> list[GpuRow]:
    """A row for each contender; `folder` has the model."""
    model, lengths = WORKS[work]
    random, vocab = np.random.default_rng(1), MODELS[model][-1]
    tokens, targets = ([random.integers(0, vocab, n) for n in lengths] for _ in range(2))
    turns = turns or TURNS[work]
    kinds = [
        kind for kind in CONTENDERS if work != "small" or kind != "PEFT compiled"
    ]  # it compiles for minutes
    contestants: list[Contestant] = []
    for kind in kinds:  # minitinker first: it writes the adapter that all begin with
        contestants.append(Contestant(kind, folder, tokens, targets, work == "small"))
        if work not in TAKE_TURNS:
            for _ in range(turns):
                contestants[-1].take_turn()
            contestants[-1].end()
    if work in TAKE_TURNS:
        for _ in range(turns):
            for contestant in contestants:
                contestant.take_turn()
        for contestant in contestants:
            contestant.end()
    return [_row(work, contestant, contestants[0]) for contestant in contestants]


def _row(work: str, contestant: Contestant, ours: Contestant) -> GpuRow:
    model, lengths = WORKS[work]
    if contestant.error:
        return GpuRow(work, contestant.kind, 0, 0, 0, None, contestant.error)
    if not math.isclose(contestant.told["loss"], ours.told["loss"], rel_tol=1e-2):
        raise SystemExit(
            f"{work}: {contestant.kind} has the loss {contestant.told['loss']}, minitinker {ours.told['loss']}"
        )
    seconds, our_seconds = (float(np.median(one.seconds)) for one in (contestant, ours))
    flops = sum(n * flops_per_token(model, n) for n in lengths)
    told = contestant.told
    return GpuRow(
        work,
        contestant.kind,
        sum(lengths) / seconds,
        flops / seconds / told["rate"],
        told["peak"],
        seconds / our_seconds,
        told["note"],
    )


def print_gpu_table(rows: list[GpuRow]) -> bool:
    """Whether every target was met."""
    met = True
    print(f"\n{'':6}{'':16}{'tokens/s':>12}{'MFU':>8}{'peak GB':>10}{'ours over it':>14}")
    for row in rows:
        target, verdict = TARGETS.get(row.work), ""
        if target and row.contender == "PEFT eager" and row.ratio is not None:
            passed = row.ratio >= target
            met, verdict = met and passed, f"target {target} x {'pass' if passed else 'FAIL'}"
        ratio = "" if row.ratio is None else f"{row.ratio:13.2f}x"
        numbers = f"{row.tokens_per_second:12,.0f}{row.mfu:8.1%}{row.peak_gigabytes:10.1f}{ratio:>14}"
        print(f"{row.work:6}{row.contender:16}{numbers}  {verdict} {row.note}")
    return met


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _give_back() -> None:
    """Memory that torch keeps beyond what arrays hold, for the other contenders' turns."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
