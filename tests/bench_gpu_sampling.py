"""Sampling through the kernels beside transformers' `generate`: `bench_sampling.py --backend kernels`.

A random Qwen3 of 0.6B's shape in bfloat16, prompts of PROMPT tokens and NEW drawn ones each, at temperature 1 with
nothing cut off, all asked at once. The bound is the time in which a GPU could read, at the speed of a copy, what each
step has to read: the weights and adapters once, and every row's keys and values.
"""

from typing import Any

import numpy as np
from bench_contenders import MODELS

BATCHES = (1, 64, 256)
PROMPT, NEW, RANK = 128, 64, 32
SMALL = {"0.6B": ("XS", 4, 3), "batches": (2,), "rows": 4}  # through the interpreter: model, prompt, new
ADAPTERS = 32
FLOORS = {"adapters": 0.9, "group": 1 / 1.15}


def read_bytes(model: str, adapters: int, rows: int, prompt: int, new: int) -> float:
    """Of all steps but the prompts'."""
    layers, d, ffn, heads, kv_heads, head_dim, vocab = MODELS[model]
    q, kv = heads * head_dim, kv_heads * head_dim
    linears = [(d, q), (d, kv), (d, kv), (q, d), (d, ffn), (d, ffn), (ffn, d)]
    weights = layers * sum(a * b for a, b in linears) + d * vocab
    adapter = layers * RANK * sum(a + b for a, b in linears)
    keys_and_values = rows * 2 * layers * kv * sum(range(prompt, prompt + new))
    return 2.0 * (new * (weights + adapters * adapter) + keys_and_values)


def compare_on_gpu(
    three: tuple[Any, Any, Any], works: list[str], turns: int, median: Any
) -> list[dict[str, Any]]:
    """three and median: from bench_sampling's `contenders` and `median`."""
    small = "small" in works
    model, length, new = SMALL["0.6B"] if small else ("0.6B", PROMPT, NEW)
    rng, vocabulary = np.random.default_rng(0), MODELS[model][-1]

    def prompts(rows: int, tokens: int = length) -> list[list[int]]:
        return rng.integers(0, vocabulary, (rows, tokens)).tolist()

    ours, beside, merged = three
    bandwidth = beside.bandwidth()
    print(f"a copy: {bandwidth / 1e9:,.0f} GB/s", flush=True)
    rows: list[dict[str, Any]] = []
    for n in SMALL["batches"] if small else BATCHES if "batches" in works else ():
        asked = prompts(n), [new] * n
        seconds = median(turns, *(lambda c=c, x=asked: c.drawn(*x) for c in (ours, beside, merged)))
        bound = read_bytes(model, 1, n, length, new) / bandwidth
        for name, own in zip(("minitinker", "generate", "generate, merged"), seconds, strict=True):
            rows.append(row(f"{n} x {new}, {name}", own, seconds[0], tokens=n * new, bound=bound))
            tell(rows[-1:])
    n = SMALL["rows"] if small else ADAPTERS
    if small or "adapters" in works:
        asked = prompts(n), [new] * n
        all_, one = median(turns, lambda: ours.drawn(*asked, 1, n), lambda: ours.drawn(*asked))
        rows.append(row(f"{n} rows, {n} adapters", all_, all_, tokens=n * new, floor=FLOORS["adapters"]))
        rows.append(row(f"{n} rows, 1 adapter", one, all_, tokens=n * new))
        rows[-2]["ratio"] = one / all_
        tell(rows[-2:])
    if small or "group" in works:

        def fresh(samples: int) -> float:
            return float(ours.drawn(prompts(1, 9 if small else 512), [1], samples))

        group, single = median(turns, lambda: fresh(4 if small else 16), lambda: fresh(1))
        rows.append(row("16 samples of 512 tokens", group, group, floor=FLOORS["group"]))
        rows.append(row("1 sample of 512 tokens", single, group))
        rows[-2]["ratio"] = single / group
        tell(rows[-2:])
    return rows


def tell(rows: list[dict[str, Any]]) -> None:
    """Of a long run at once, what is there already."""
    for one in rows:
        print(f"{one['what']}: {one['seconds']:.3f} s", flush=True)


def row(
    what: str, seconds: float, ours: float, tokens: int = 0, bound: float = 0.0, floor: float = 0.0
) -> Any:
    """ratio: this one's time over minitinker's; bound and floor 0: there is none."""
    return {
        "what": what,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "share_of_bound": bound / seconds,
        "ratio": seconds / ours,
        "floor": floor,
    }


def print_gpu_table(rows: list[dict[str, Any]]) -> bool:
    """Whether every floor was met."""
    print(f"\n{'':32}{'time':>9}{'tokens/s':>11}{'of the bound':>14}{'over ours':>11}")
    for one in rows:
        share = f"{one['share_of_bound']:.0%}" if one["share_of_bound"] else ""
        told = "pass" if one["ratio"] >= one["floor"] else "FAIL"
        verdict = f"  at least {one['floor']:.2f} {told}" if one["floor"] else ""
        numbers = f"{one['seconds']:8.3f}s{one['tokens_per_second']:11,.0f}{share:>14}{one['ratio']:10.2f}x"
        print(f"{one['what']:32}{numbers}{verdict}")
    return all(one["ratio"] >= one["floor"] for one in rows)
