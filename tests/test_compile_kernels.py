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

BATCHES = """
import compile_kernels as c
import numpy as np
from minitinker import kernels

c.act_as_on_an_h100()
for c.current_dtype in ("float32", "bfloat16"):
    for rows in (1, 3, 16, 35):
        x = c.zeros(rows, 2, 64)
        kernels.rms_norm_backward(*kernels.rms_norm_forward(x, c.zeros(64), 1e-6))
        kernels.rope_forward(x, *(kernels.zeros((rows, 32)) for _ in range(2)))
        a, b, scale = c.zeros(1, 16, 64), c.zeros(1, 48, 16), kernels.zeros((1,))
        kernels.lora_linear_forward(x[:, 0], c.zeros(48, 64), c.zeros(48), a, b, scale, None)
        place = [np.arange(rows), np.ones(rows, np.int64)]
        kernels.attention_forward(x, x, x, kernels.attention_plan(*place, *place), 0.125)
        z, tokens, options = c.zeros(rows, 1003), c.ints(rows, 2, below=1003), [c.floats(rows) for _ in range(4)]
        kernels.logprob_forward(z, tokens)
        kernels.sample(z, *options[:2], c.ints(rows, below=9), options[3])
        kernels.tempered_logprob(z, tokens, options[1])
print({line.compiled for line in c.lines.values()}, [key for key, line in c.lines.items() if line.compiled > 1])
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


def test_rows_go_through_the_same_code_however_many_they_are():
    """Triton compiles anew for a number that is 1 or a multiple of 16: sums might be formed in another order."""
    status, printed = run("-c", BATCHES)
    assert (status, printed) == (0, "{1} []\n"), printed


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
