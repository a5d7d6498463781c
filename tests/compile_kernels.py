"""Compiles every kernel for an H100, on a machine that need not have one: the only check of bfloat16 without a GPU.

    python tests/compile_kernels.py [--only OP[,OP...]] [--dtypes float32,bfloat16,float64] [--quick]

The ops' own host code runs, on CPU tensors that hold zeros, so each kernel gets the arguments, tiles and warps
that it gets in use; but a launch only compiles, down to machine code for sm_90, and nothing runs. Printed is a
line per kernel, dtype and set of constants: registers a thread, bytes of stack (what was spilled to memory, if
it isn't an array that the kernel needs), shared memory, and what its dots became: wgmma as they should in bfloat16, mma
(the instruction of older chips), or fma (no tensor core, right for float32 and float64).

The exit status is 1 if something doesn't compile, needs more shared memory than `kernels.place` asks of a device or
has a grid that CUDA refuses, if a kernel that may begin before the one in front has ended does not wait for it, or if
there is a kernel that no case here launches in float32 and bfloat16. float64 is for gradient checks: what fails there
is told, but is no error. --only: names in `CASES` below. --quick leaves out most shapes.

To run with another Triton, use the Python of another environment:
    pip install torch numpy && pip install --no-deps "triton==3.6.*" && pip install -e .
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: nothing is interpreted here
os.environ.setdefault(
    "TRITON_DEFAULT_FP_FUSION", "1"
)  # what it is by default; Triton 3.9 warns where it's unset

import numpy as np
import torch
import triton
from minitinker.kernels.array import SHARED_MEMORY
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from minitinker import kernels

MOST_PROGRAMS = (
    2**31 - 1,
    65_535,
    65_535,
)  # along x, y, z; a product over the first is never launched, either
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = ("float32", "bfloat16", "float64")
NEEDED = DTYPES[:2]

rng = np.random.default_rng(0)


class H100:
    """What the compiler asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass
class Line:
    """What became of one kernel with one set of constants, at worst among its specialisations to integers."""

    compiled: int = 0
    registers: int = 0
    stack: int = 0
    shared: int = 0
    dots: set[str] = field(default_factory=set)


lines: dict[tuple[str, str, str], Line] = {}  # kernel, dtype, constants
current_dtype = ""
seen: set[tuple[str, str]] = set()  # (dtype, a compiled kernel's hash)


def compile_instead_of_launching(jit: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """Takes the place of JITFunction.run."""
    compiled = run(jit, *args, grid=grid, warmup=True, **kwargs)
    parameters = {name: value for name, value in kwargs.items() if name in jit.signature.parameters}
    arguments = jit.signature.bind(*args, **parameters)
    arguments.apply_defaults()
    programs = grid(arguments.arguments) if callable(grid) else grid
    limits = [*MOST_PROGRAMS[: len(programs)], MOST_PROGRAMS[0]]
    if any(not 0 <= n <= most for n, most in zip([*programs, math.prod(programs)], limits, strict=True)):
        raise ValueError(f"{name_of(jit)} has a grid of {programs}; at most {MOST_PROGRAMS} can be")
    if (current_dtype, compiled.hash) not in seen:
        seen.add((current_dtype, compiled.hash))
        note(jit, compiled, arguments.arguments)
    if compiled.metadata.shared > SHARED_MEMORY:
        raise MemoryError(f"{name_of(jit)} needs {compiled.metadata.shared} bytes of shared memory")
    return compiled


run = JITFunction.run


def note(jit: JITFunction, compiled: Any, arguments: dict[str, Any]) -> None:
    metadata = compiled.metadata
    constants = {p.name: arguments[p.name] for p in jit.params if p.is_constexpr}
    constants |= {"warps": metadata.num_warps, "stages": metadata.num_stages}
    waits = compiled.asm["ptx"].count("griddepcontrol.wait")
    if waits != metadata.launch_pdl:
        raise ValueError(
            f"{name_of(jit)} waits {waits} times for the one before, launch_pdl={metadata.launch_pdl}"
        )
    label = " ".join(f"{name}={value}" for name, value in constants.items())
    line = lines.setdefault((name_of(jit), current_dtype, label), Line())
    registers, stack = resources(compiled.asm["cubin"])
    line.compiled += 1
    line.registers = max(line.registers, registers)
    line.stack = max(line.stack, stack)
    line.shared = max(line.shared, metadata.shared)
    line.dots |= dots(compiled.asm)


def name_of(jit: JITFunction) -> str:
    return f"{jit.module.rpartition('.')[-1]}.{jit.__name__.strip('_')}"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+)\s+STACK:(\d+)", told).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def dots(asm: dict[str, Any]) -> set[str]:
    """The instructions that tl.dot became."""
    if not re.search(r"\btt\.dot|warp_group_dot", asm["ttgir"]):
        return set()
    found = {name for name in ("wgmma", "mma") if re.search(rf"(?<!g){name}(\.mma_async)?\.sync", asm["ptx"])}
    return found or {"fma"}


# The cases: each calls its op as it is called in use, forward and backward.


def zeros(*shape: int) -> torch.Tensor:
    return kernels.zeros(shape, current_dtype)


def floats(*shape: int, dtype: str = "float64") -> torch.Tensor:
    return kernels.array(rng.random(shape), dtype)


def ints(*shape: int, below: int) -> torch.Tensor:
    return kernels.array(rng.integers(0, below, shape))


def wide() -> str:
    """The dtype of masters, gradients and logprobs."""
    return "float64" if current_dtype == "float64" else "float32"


def case_embedding(quick: bool) -> None:
    for rows, d in pick(quick, [(2048, 4096), (1, 1024), (7, 1000)]):
        kernels.embedding(ints(rows, below=1000), zeros(1000, d))


def case_rms_norm(quick: bool) -> None:
    shapes = [(2048, 4096), (1, 1024), (7, 1000), (512, 32, 128), (3, 8, 64), (16, 8192), (16, 16_384)]
    for shape in pick(quick, shapes):
        y, saved = kernels.rms_norm_forward(zeros(*shape), zeros(shape[-1]), 1e-6)
        kernels.rms_norm_backward(y, saved)
        if len(shape) == 3:  # q and k of rows that hold v, too
            wide_rows, heads = zeros(shape[0], shape[1] + 8, shape[2]), shape[1]
            kernels.rms_norm_forward(wide_rows[:, :heads], zeros(*shape[1:]), 1e-6)


def case_rope(quick: bool) -> None:
    for tokens, heads, head_dim in pick(quick, [(2048, 32, 128), (1, 8, 64), (7, 14, 64), (5, 3, 20)]):
        cos, sin = kernels.rope_table(ints(tokens, below=9), floats(head_dim // 2))
        if current_dtype == "float64":
            cos, sin = (kernels.array(table, "float64") for table in (cos, sin))
        y, saved = kernels.rope_forward(zeros(tokens, heads, head_dim), cos, sin)
        kernels.rope_backward(y, saved)


def case_swiglu(quick: bool) -> None:
    for shape in pick(quick, [(2048, 14_336), (1, 3072), (7, 1001)]):
        y, saved = kernels.swiglu_forward(zeros(*shape), zeros(*shape))
        kernels.swiglu_backward(y, saved)


def case_lora_linear(quick: bool) -> None:
    layers = [  # rows, d_in, d_out, adapters, rank, an adapter per row, bias
        (4096, 4096, 4096, 1, 32, False, False),
        (64, 1024, 3072, 3, 16, True, True),
        (1, 4096, 1024, 0, 0, False, True),
        (4096, 4096, 14_336, 1, 128, False, False),
        (4096, 4096, 1024, 0, 0, False, False),
        (4096, 1024, 1024, 1, 16, False, True),
        (1000, 1000, 1003, 2, 8, True, False),
        (8, 4096, 4096, 4, 32, True, False),
        (130, 64, 128, 1, 64, False, False),
        (4096, 1024, 3072, 1, 256, False, False),
    ]
    joined = [  # rows, d_in, d_out each, adapters, rank, an adapter per row
        (1, 1024, (2048, 1024, 1024), 1, 32, False),
        (4096, 1024, (3072, 3072), 1, 32, False),
        (64, 1024, (2048, 1024, 1024), 32, 32, True),
        (256, 1024, (3072, 3072), 32, 32, True),
        (256, 3072, (1024,), 1, 32, False),
        (4096, 896, (4864, 4864), 2, 16, True),
    ]
    for rows, d_in, d_out, adapters, rank, each, has_bias in pick(quick, layers, 3):
        a = b = scale = adapter = None
        if adapters:
            a, b = zeros(adapters, rank, d_in), zeros(adapters, d_out, rank)
            scale = kernels.zeros((adapters,), wide())
            adapter = ints(rows, below=adapters) if each else None
        bias = zeros(d_out) if has_bias else None
        y, saved = kernels.lora_linear_forward(
            zeros(rows, d_in), zeros(d_out, d_in), bias, a, b, scale, adapter
        )
        kernels.lora_linear_backward(y, saved)
    for rows, d_in, parts, adapters, rank, each in pick(quick, joined, 3):
        a, b = zeros(adapters, len(parts) * rank, d_in), zeros(adapters, sum(parts), rank)
        adapter = ints(rows, below=adapters) if each else None
        scale = kernels.zeros((adapters,), wide())
        w = zeros(sum(parts), d_in)
        kernels.lora_linear_forward(zeros(rows, d_in), w, None, a, b, scale, adapter, True, parts)


def case_attention(quick: bool) -> None:
    shapes = [(32, 8, 128), (14, 2, 64), (16, 16, 128), (8, 1, 80), (4, 4, 20), (8, 2, 256)]
    lengths = np.array([700, 64, 1, 333])
    starts = np.cumsum(lengths) - lengths
    ones = np.ones_like(lengths)
    for heads, kv_heads, head_dim in pick(quick, shapes, 2):
        plan = kernels.attention_plan(starts, lengths, starts, lengths)
        tokens = int(lengths.sum())
        q, k, v = (zeros(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads))
        o, saved = kernels.attention_forward(q, k, v, plan, head_dim**-0.5)
        kernels.attention_backward(o, saved)
        plan = kernels.attention_plan(np.arange(len(lengths)), ones, starts, lengths)  # decoding
        kernels.attention_forward(q[: len(lengths)], k, v, plan, head_dim**-0.5)


def case_logprob(quick: bool) -> None:
    for rows, vocab, k in pick(quick, [(256, 151_936, 1), (1, 128_256, 5), (7, 1003, 20)]):
        y, saved = kernels.logprob_forward(zeros(rows, vocab), ints(rows, k, below=vocab))
        kernels.logprob_backward(y, saved)


def case_sample(quick: bool) -> None:
    for rows, vocab in pick(quick, [(64, 151_936), (1, 128_256), (7, 1003)]):
        kernels.sample(zeros(rows, vocab), floats(rows), floats(rows), ints(rows, below=9), floats(rows))


def case_adamw(quick: bool) -> None:
    """The buffers are float32 also where the activations are bfloat16: what is bfloat16 is the copy."""
    for n in pick(quick, [1 << 20, 1003]):
        param, grad, m, v = (kernels.zeros((n,), wide()) for _ in range(4))
        copy = zeros(n) if current_dtype == "bfloat16" else None
        norm = kernels.global_norm(grad)
        for step in (1, 2):
            kernels.adamw_(param, grad, m, v, copy, norm, step, 1e-4, 0.9, 0.95, 1e-12, 0.01, 1.0)


def pick(quick: bool, shapes: list[Any], few: int = 1) -> list[Any]:
    """All shapes, or the first few."""
    return shapes[:few] if quick else shapes


CASES: dict[str, Callable[[bool], None]] = {
    name.removeprefix("case_"): function
    for name, function in list(globals().items())
    if name.startswith("case_")
}


def compiled_without_error(op: str, dtype: str, quick: bool) -> bool:
    global current_dtype
    current_dtype = dtype
    try:
        CASES[op](quick)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        print(f"{op} in {dtype}: does not compile: {type(error).__name__}")
        return dtype not in NEEDED
    return True


def never_compiled(ops: list[str], dtypes: list[str]) -> Iterator[str]:
    """Kernels of these ops that no case has launched: what isn't seen here isn't known to compile."""
    for op in ops:
        for value in vars(sys.modules[f"{kernels.__name__}.{op}"]).values():
            if isinstance(value, JITFunction) and value.__name__.endswith("_kernel"):
                for dtype in dtypes:
                    if dtype in NEEDED and not any(key[:2] == (name_of(value), dtype) for key in lines):
                        yield f"{name_of(value)} in {dtype}"


def print_table() -> None:
    width = max((len(kernel) for kernel, _, _ in lines), default=0)
    print(f"\nTriton {triton.__version__}, for {H100().get_current_target()}")
    print(f"{'kernel':{width}}  {'dtype':8}  {'regs':>4} {'stack':>5} {'shared':>7}  {'dots':5}  constants")
    for (kernel, dtype, constants), line in lines.items():
        told = ",".join(sorted(line.dots)) or "-"
        numbers = f"{line.registers:4} {line.stack:5} {line.shared:7}"
        print(f"{kernel:{width}}  {dtype:8}  {numbers}  {told:5}  {constants}")


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(CASES), help="ops, with commas between them")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--quick", action="store_true", help="few shapes")
    return parser.parse_args(given)


def act_as_on_an_h100() -> None:
    """From here on a launch compiles, and new tensors are zeros on the CPU: nothing ever fills them."""
    driver.set_active(H100())
    JITFunction.run = compile_instead_of_launching
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    for name, module in list(sys.modules.items()):
        if (
            name.startswith(f"{kernels.__name__}.")
            and isinstance(module, ModuleType)
            and hasattr(module, "DEVICE")
        ):
            module.DEVICE = "cpu"


def main(given: list[str]) -> int:
    args = arguments(given)
    ops, dtypes = args.only.split(","), args.dtypes.split(",")
    act_as_on_an_h100()
    passed = True
    for op in ops:
        for dtype in dtypes:
            passed &= compiled_without_error(op, dtype, args.quick)
    print_table()
    for kernel in never_compiled(ops, dtypes):
        print(f"no case launches {kernel}")
        passed = False
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
