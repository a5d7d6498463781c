"""That the benchmark of the ops runs, with every contender that a CPU has agreeing on every result."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("bench_ops.py")


def test_it_runs_in_small_and_writes_its_numbers(tmp_path):
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, SCRIPT, "--small", "--repeats", "1", "--json", numbers]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(numbers.read_text())
    assert found["versions"]["torch"]
    works = {row["work"] for row in found["rows"]}
    assert {"rms_norm forward", "lora_linear forward + backward", "attention, decoding", "adamw"} <= works
    for work in works:
        contenders = [row for row in found["rows"] if row["work"] == work]
        assert contenders[0]["contender"] == "minitinker"
        assert len(contenders) > 1
        assert all(row["milliseconds"] > 0 for row in contenders)
