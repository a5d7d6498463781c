"""reference/memory.py: arrays that come and go get the same memory again."""

import subprocess
import sys

import pytest

SCRIPT = """if True:
    import resource
    import numpy as np
    from minitinker import reference

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            np.ones(1 << 20, np.float32)  # 4 MB: a thousand pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if {keep}:
        reference.prepare()
    faults()
    print(faults())
"""


def page_faults(keep):
    script = SCRIPT.format(keep=keep)
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(out.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the setting")
def test_an_array_after_another_costs_no_new_pages():
    assert page_faults(keep=True) < 100
