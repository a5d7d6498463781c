"""memory.py: arrays that come and go get the same memory again; what a GPU has room for."""

import subprocess
import sys

import pytest
import torch

from minitinker import kernels

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


@pytest.mark.parametrize(("asked", "device"), [((), kernels.DEVICE), (("cuda:1",), "cuda:1")])
def test_a_gpu_is_asked_for_what_it_has_free_and_for_what_torch_keeps_of_it_without_use(
    monkeypatch, asked, device
):
    monkeypatch.setattr(sys.modules[kernels.free_memory.__module__], "INTERPRETED", False)
    told = {"mem_get_info": (5, 100), "memory_reserved": 70, "memory_allocated": 40}
    asked_of = []
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda of, answer=answer: asked_of.append(of) or answer)
    monkeypatch.setattr(torch.cuda, "set_device", asked_of.append)
    assert kernels.free_memory(*asked) == 5 + 70 - 40
    kernels.prepare(*asked)
    assert set(asked_of) == {device}
    assert len(asked_of) == 4
