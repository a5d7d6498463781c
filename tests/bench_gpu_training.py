"""Training through the kernels beside transformers + PEFT, eager and compiled: `bench_train.py --backend kernels`.

Each contender has a process of its own, one after the other, since a GPU does not hold them all; before each one
the rate of a large matrix product is measured there, which MFU is relative to. All begin from the same A and B,
and must agree on the loss of the first step within bfloat16's error before their speeds count.
"""

import math
import os
import time
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from bench_contenders import MODELS, Minitinker, Peft

WORKS = {"0.6B": ("0.6B", [1024] * 16), "8B": ("8B", [1024] * 16), "small": ("XS", [9, 6])}
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


def measure(
    kind: str, folder: str, tokens: list[Any], targets: list[Any], turns: int, small: bool
) -> dict[str, Any]:
    """Loss of the first step, median seconds of a later one, peak memory and the matrix rate. In a new process."""
    import torch

    if small:
        os.environ["TRITON_INTERPRET"] = "1"
    rate = matmul_rate(256 if small else 8192)
    home = os.path.join(folder, "home")
    if kind == "minitinker":
        contender: Any = Minitinker(folder, home, tokens, targets, backend="kernels")
    else:
        with open(os.path.join(home, "adapter"), encoding="utf-8") as file:
            adapter = file.read()
        contender = Peft(folder, adapter, tokens, targets, compiled=kind == "PEFT compiled")
    loss, seconds = contender.step(), []
    contender.step()
    if kind == "minitinker":
        with open(os.path.join(home, "adapter"), "w", encoding="utf-8") as file:
            file.write(contender.adapter())
    for _ in range(turns):
        begin = time.perf_counter()
        contender.step()
        _synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    note = getattr(contender, "note", "")
    return {"loss": loss, "seconds": float(np.median(seconds)), "peak": peak, "rate": rate, "note": note}


def bench_training(work: str, turns: int | None, folder: str) -> list[GpuRow]:
    """A row for each contender; `folder` has the model."""
    model, lengths = WORKS[work]
    random, vocab = np.random.default_rng(1), MODELS[model][-1]
    tokens, targets = ([random.integers(0, vocab, n) for n in lengths] for _ in range(2))
    count, rows, first = sum(lengths), [], None
    flops = sum(n * flops_per_token(model, n) for n in lengths) / count
    for kind in CONTENDERS:
        if work == "small" and kind == "PEFT compiled":
            continue  # its compiler takes longer than all else
        arguments = (kind, folder, tokens, targets, turns or TURNS[work], work == "small")
        with get_context("spawn").Pool(1) as pool:
            try:
                found = pool.apply(measure, arguments)
            except RuntimeError as error:  # out of memory is one; anything else is shown in the table, too
                if kind == "minitinker":
                    raise
                rows.append(GpuRow(work, kind, 0, 0, 0, None, str(error).partition("\n")[0][:60]))
                continue
        first = first or found
        if not math.isclose(found["loss"], first["loss"], rel_tol=1e-2):
            raise SystemExit(f"{work}: {kind} has the loss {found['loss']}, minitinker {first['loss']}")
        speed = count / found["seconds"]
        mfu = speed * flops / found["rate"]
        ratio = found["seconds"] / first["seconds"]
        rows.append(GpuRow(work, kind, speed, mfu, found["peak"], ratio, found["note"]))
    return rows


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
