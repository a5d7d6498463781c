"""What storage_stress.py does, for as long as a test may take.

MINITINKER_KILLS and MINITINKER_SECONDS ask for more; the script itself prints what it counts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that it kills")


def counts(mode: str, amount: str) -> dict[str, int]:
    script = Path(__file__).with_name("storage_stress.py")
    done = subprocess.run([sys.executable, str(script), mode, amount], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {what: int(float(count)) for count, what in lines}


def test_a_process_that_is_killed_at_any_moment_leaves_the_old_checkpoint_or_the_new_one():
    kills = os.environ.get("MINITINKER_KILLS", "100")
    found = counts("kill", kills)
    assert found["kills"] == int(kills)
    assert found["in the middle of a save, that left the old one"] > 0
    assert found["that left something to sweep"] > 0


def test_processes_that_share_a_storage_folder_do_not_harm_each_other():
    found = counts("together", os.environ.get("MINITINKER_SECONDS", "4"))
    for what in ("saved", "overwritten", "loaded", "listed", "deleted", "changed", "copied", "swept"):
        assert found[what] > 0
