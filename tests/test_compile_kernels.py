"""What is asserted of compile_kernels.py itself: that nothing wrong passes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).with_name("compile_kernels.py")
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"

pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="this Triton has no compiler for NVIDIA's GPUs")

DOT = "tl.dot(x, x + x, input_precision='ieee').to(x.dtype)"
OP_OF_ONE_KERNEL = """
import sys
import compile_kernels  # before triton, out of whose interpreter it takes this process
import triton
import triton.language as tl
from minitinker import kernels

@triton.jit
def _dot_kernel(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    place = x_ptr + i[:, None] * SIZE + i[None, :]
    x = tl.load(place)
    tl.store(place, {expression})

def embedding(tokens, w):
    {launch}

kernels.embedding = embedding
sys.modules["minitinker.kernels.embedding"]._forward_kernel = _dot_kernel
sys.exit(compile_kernels.main(["--only", "embedding", "--dtypes", "{dtypes}"]))
"""


def run(*command):
    """(exit status, what was printed) of Python with this command line, outside the interpreter's mode."""
    folders = [str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(folders))
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900
    )
    return done.returncode, done.stdout + done.stderr


def run_with(folder, expression, grid="(1,)", size=64, dtypes="float32,bfloat16", launched=True):
    launch = f"_dot_kernel[{grid}](w, SIZE={size})" if launched else "pass"
    file = folder / "op_of_one_kernel.py"  # Triton reads a kernel's source from its file
    file.write_text(OP_OF_ONE_KERNEL.format(expression=expression, launch=launch, dtypes=dtypes))
    return run(str(file))


def test_every_kernel_compiles_for_an_h100():
    status, printed = run(str(SCRIPT), "--quick", "--dtypes", "float32,bfloat16")
    assert status == 0, printed
    assert printed.endswith("passed\n")


def test_a_dot_is_told_by_its_instructions(tmp_path):
    status, printed = run_with(tmp_path, DOT)
    assert status == 0, printed
    lines = {line.split()[1]: line for line in printed.splitlines() if "dot_kernel" in line}
    assert " wgmma " in lines["bfloat16"]
    assert " fma " in lines["float32"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        pytest.param({"expression": "tl.no_such_function(x)"}, "no_such_function", id="a name"),
        pytest.param({"expression": "x.to(tl.int32).to(tl.bfloat17)"}, "bfloat17", id="a dtype"),
        pytest.param(
            {"expression": DOT, "size": 256, "dtypes": "bfloat16"},
            "bytes of shared memory",
            id="too much memory",
        ),
        pytest.param({"expression": "x", "grid": "(1, 65_536)"}, "a grid of (1, 65536)", id="the grid"),
        pytest.param({"expression": "x", "launched": False}, "no case launches", id="unseen"),
    ],
)
def test_what_is_wrong_fails(tmp_path, wrong, told):
    status, printed = run_with(tmp_path, **wrong)
    assert told in printed
    assert printed.endswith("FAILED\n")
    assert status == 1
