"""How fast the kernels are on a GPU beside torch, torch.compile, cuBLAS, PEFT's arithmetic, Liger-Kernel and
cut_cross_entropy, in bfloat16 on the sizes of an 8B model.

    python tests/bench_ops.py [--only OP[,OP...]] [--repeats N] [--json FILE] [--small]

Those of the contenders take part that are installed. Before their speeds count they must agree on the result.
They take turns; before each one the cache of the GPU is emptied; what counts is the median. Bandwidth and products are
also told as a share of what a copy and a large product reach in the same run. The exit status is 1 where a target
is missed. --small: tiny sizes through Triton's interpreter on a CPU, to see that this program works; its figures
mean nothing.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if "--small" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch

SHARES = {  # work -> minitinker's least share of a copy's bandwidth
    "rms_norm forward": 0.8,
    "rms_norm backward": 0.7,
    "rope forward": 0.8,
    "rope backward": 0.7,
    "swiglu forward": 0.8,
    "swiglu backward": 0.7,
    "adamw": 0.8,
}
RATIOS = {  # (work, contender) -> how many times minitinker's time it has to take at least
    ("lora_linear forward", "cuBLAS, W alone"): 1 / 1.25,
    ("lora_linear forward + backward", "cuBLAS, W alone"): 1 / 1.25,
    ("lora_linear forward + backward", "PEFT eager"): 1.3,
    ("logprob with the head, forward + backward", "Liger"): 1.2,
    ("adamw", "torch fused, a tensor each"): 1.5,
}
MOST_EXTRA_GB = {"logprob with the head, forward + backward": 2.0}
CACHE_BYTES = 256 << 20  # more than any GPU's second-level cache
REPEATS = 30


@dataclass(frozen=True)
class Row:
    """A line of the table. rate: in `unit`; share: of the ceiling; ratio: its time over minitinker's."""

    work: str
    contender: str
    milliseconds: float
    rate: float
    unit: str
    share: float
    ratio: float
    extra_gb: float  # memory that the contender took at the most, beside the inputs
    targets: str
    passed: bool


def bench(work: Any, repeats: int, ceilings: dict[str, float]) -> list[Row]:
    contenders, extra, notes = check(work)
    times = take_turns(contenders, repeats)
    ours, rows = times[0], []
    for contender, seconds in zip(contenders, times, strict=True):
        rate = work.amount / seconds / {"GB/s": 1e9, "TFLOP/s": 1e12}[work.unit]
        share, ratio, gigabytes = rate / ceilings[work.unit], seconds / ours, extra[contender.name] / 1e9
        told, passed = targets(work.name, contender.name, seconds is ours, share, ratio, gigabytes)
        numbers = (seconds * 1e3, rate, work.unit, share, ratio, gigabytes)
        rows.append(Row(work.name, contender.name, *numbers, told, passed))
    for name, note in notes.items():
        rows.append(Row(work.name, name, 0, 0, work.unit, 0, 0, 0, note, True))
    return rows


def targets(
    work: str, contender: str, is_ours: bool, share: float, ratio: float, extra_gb: float
) -> tuple[str, bool]:
    """What was asked for in this line, and whether it was met."""
    if not on_gpu():
        return "", True
    found = []
    if is_ours and work in SHARES:
        found.append((f">= {SHARES[work]:.0%} of a copy", share >= SHARES[work]))
    if is_ours and work in MOST_EXTRA_GB:
        found.append((f"< {MOST_EXTRA_GB[work]:g} GB", extra_gb < MOST_EXTRA_GB[work]))
    if (work, contender) in RATIOS:
        least = RATIOS[work, contender]
        found.append((f">= {least:.2f} x ours", ratio >= least))
    told = ", ".join(f"{what} {'pass' if passed else 'FAIL'}" for what, passed in found)
    return told, all(passed for _, passed in found)


def check(work: Any) -> tuple[list[Any], dict[str, float], dict[str, str]]:
    """The contenders that can do the work, after a first turn in which all have to agree with minitinker; the bytes
    each took beside its inputs; and why the others cannot."""
    able, extra, notes, expected = [], {}, {}, None
    for contender in work.contenders:
        try:
            given = contender.prepare()
            before = start_of_peak()
            answer = contender.run(given)
            extra[contender.name] = peak() - before
        except Exception as error:
            if not able:  # ours
                raise
            notes[contender.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:60]}"
            continue
        if not able:
            expected = [x.clone() for x in answer]
        elif not work.agree(expected, answer):
            raise SystemExit(f"{work.name}: {contender.name} has another result than minitinker")
        able.append(contender)
    return able, extra, notes


def take_turns(contenders: list[Any], repeats: int) -> list[float]:
    """The median seconds of each, after three turns that do not count."""
    cache = torch.empty(CACHE_BYTES if on_gpu() else 1, dtype=torch.int8, device=device())
    measured: list[list[Callable[[], float]]] = [[] for _ in contenders]
    for _ in range(3 + repeats):
        for contender, found in zip(contenders, measured, strict=True):
            given = contender.prepare()
            cache.random_(0, 2)  # also a while in which the launches of what is timed queue up
            stop = stopwatch()
            contender.run(given)
            found.append(stop())
    synchronize()
    return [statistics.median(read() for read in found[3:]) for found in measured]


def stopwatch() -> Callable[[], Callable[[], float]]:
    """Starts now; what it returns stops it, and returns what reads the seconds, once the GPU is done."""
    if not on_gpu():
        begin = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - begin
            return lambda: seconds

        return stop
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def stop_event() -> Callable[[], float]:
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    return stop_event


def ceilings(repeats: int) -> dict[str, float]:
    """GB/s of a copy and TFLOP/s of a product, of random numbers."""
    works = importlib.import_module("bench_op_works")
    numbers, n = (1 << 29, 8192) if on_gpu() else (1 << 16, 128)
    source = torch.randn(numbers, device=device(), dtype=dtype())
    a, b = (torch.randn(n, n, device=device(), dtype=dtype()) for _ in range(2))
    target = torch.empty_like(source)
    contenders = [
        works.Contender("copy", lambda _: target.copy_(source)),
        works.Contender("product", lambda _: a @ b),
    ]
    copy, product = take_turns(contenders, repeats)
    return {"GB/s": 2 * works.size(source) / copy / 1e9, "TFLOP/s": 2 * n**3 / product / 1e12}


def start_of_peak() -> float:
    synchronize()
    gc.collect()
    if not on_gpu():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak() -> float:
    synchronize()
    return torch.cuda.max_memory_allocated() if on_gpu() else 0.0


def on_gpu() -> bool:
    return device().startswith("cuda")


def device() -> str:
    return importlib.import_module("minitinker.kernels").DEVICE


def dtype() -> torch.dtype:
    return torch.bfloat16 if on_gpu() else torch.float32


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for name in ("minitinker", "torch", "triton", "liger_kernel", "cut_cross_entropy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if on_gpu() else None,
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        numbers = f"{row.milliseconds:9.3f} ms{row.rate:9,.0f} {row.unit:8}{row.share:5.0%}{row.ratio:8.2f}x"
        print(f"{row.work:42}{row.contender:28}{numbers}{row.extra_gb:7.2f} GB  {row.targets}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="ops, with commas between")
    parser.add_argument("--repeats", type=int, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    parser.add_argument("--small", action="store_true", help="tiny sizes, interpreted on a CPU")
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --small shows that this program works")
    if arguments.small:
        torch.set_num_threads(1)
    works = importlib.import_module("bench_op_works")
    sizes = works.SMALL if arguments.small else works.Sizes()
    about, repeats = machine(), arguments.repeats or (2 if arguments.small else REPEATS)
    print(json.dumps(about))
    reached = ceilings(repeats)
    print(f"a copy: {reached['GB/s']:,.0f} GB/s; a product: {reached['TFLOP/s']:,.0f} TFLOP/s\n")
    header = f"{'time':>12}{'rate':>9}{'':9}{'share':>5}{'over ours':>9}{'extra':>10}"
    print(f"{'work':42}{'contender':28}{header}")
    rows: list[Row] = []
    for op, make in works.works(sizes, dtype(), compiled=not arguments.small):
        if not arguments.only or op in arguments.only.split(","):
            for work in make():
                found = bench(work, repeats, reached)
                print_rows(found)
                rows += found
    if arguments.json:
        numbers = {**about, "ceilings": reached, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(numbers, indent=1))
    return 0 if arguments.small or all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
