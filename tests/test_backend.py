"""backend.py: which ops are chosen, and where checkpoints live."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitinker import ServiceClient, backend, kernels, reference
from minitinker.backend import BACKENDS, load_backend, storage_folder
from minitinker.errors import BadRequestError

OPS = ["embedding", "rms_norm", "rope", "swiglu", "lora_linear", "attention", "logprob"]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_kernels_are_the_default_where_torch_sees_a_gpu_and_the_reference_elsewhere(monkeypatch, gpu):
    monkeypatch.delenv("MINITINKER_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_gpu", lambda: gpu)
    assert load_backend() is (kernels if gpu else reference)


def test_a_machine_without_a_driver_is_known_without_importing_torch():
    script = """if True:
        import sys
        from minitinker import backend
        backend._DRIVERS = ("/nowhere",)
        backend.load_backend()
        assert "torch" not in sys.modules
    """
    environment = {name: x for name, x in os.environ.items() if name != "MINITINKER_BACKEND"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "said"),
    [
        ("reference", "cuda:0", None, "'cuda:0'; the reference computes on the CPU"),
        ("reference", None, "bfloat16", "'bfloat16'; the reference computes in 'float32'"),
        ("kernels", "cuda:0", None, "'cuda:0', but TRITON_INTERPRET is set"),
        ("kernels", None, "bfloat16", "'bfloat16', which Triton's interpreter computes wrongly"),
        ("kernels", None, "float16", "'float16'; the kernels compute in"),
    ],
)
def test_a_device_or_dtype_that_a_backend_does_not_have_is_refused(backend, device, dtype, said):
    with pytest.raises(BadRequestError, match=said):
        load_backend(backend, device, dtype)


@without_gpu
def test_kernels_without_a_gpu_or_the_interpreter_are_refused_with_what_would_help():
    script = "from minitinker.backend import load_backend; load_backend('kernels')"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "BadRequestError: torch sees no NVIDIA GPU" in out.stderr
    assert "TRITON_INTERPRET=1" in out.stderr


@pytest.fixture
def chips(monkeypatch):
    """A machine with two GPUs: their shared memory, in KB."""
    kilobytes = [227, 99]
    module = sys.modules[kernels.place.__module__]
    utils = SimpleNamespace(get_device_properties=lambda i: {"max_shared_mem": kilobytes[i] << 10})
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(module, "INTERPRETED", False)
    for folder in (module, kernels):
        monkeypatch.setattr(folder, "DEVICE", "cuda:0")
        monkeypatch.setattr(folder, "DTYPE", "bfloat16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"chip {index}")
    monkeypatch.setattr(backend, "_gpu", lambda: True)
    monkeypatch.delenv("MINITINKER_BACKEND", raising=False)
    return kilobytes


def test_a_gpu_whose_shared_memory_the_tiles_do_not_fit_is_refused_by_name(chips):
    assert kernels.place("cuda", "bfloat16") == ("cuda:0", "bfloat16")
    said = r"cuda:1, chip 1, has 99 KB of shared memory .* need 200 KB.* backend='reference'"
    with pytest.raises(BadRequestError, match=said):
        load_backend("kernels", "cuda:1")


def test_where_nothing_is_asked_for_the_reference_stands_in_on_a_gpu_that_is_too_small(chips):
    assert load_backend() is kernels
    chips[0] = 163
    with pytest.warns(UserWarning, match=r"on the CPU.* cuda:0, chip 0, has 163 KB") as told:
        service = ServiceClient()
    assert service._session.ops is reference
    assert [warning.filename for warning in told] == [__file__]
    service.close("errored")


@pytest.mark.parametrize(
    "asked", [{"name": "kernels"}, {"device": "cuda:0"}, {"dtype": "bfloat16"}, {"dtype": "float32"}], ids=str
)
def test_what_is_asked_for_is_never_replaced(chips, asked):
    chips[0] = 163
    with pytest.raises(BadRequestError, match="has 163 KB"):
        load_backend(**asked)


def test_kernels_that_the_environment_names_are_never_replaced(chips, monkeypatch):
    chips[0] = 163
    monkeypatch.setenv("MINITINKER_BACKEND", "kernels")
    with pytest.raises(BadRequestError, match="has 163 KB"):
        load_backend()


def test_on_the_cpu_it_is_the_reference_also_where_there_is_a_gpu(chips):
    assert load_backend(device="cpu") is reference


def test_a_backend_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(backend, "import_module", missing)
    with pytest.raises(
        BadRequestError, match=r"needs triton, which is not installed: pip install 'minitinker\[gpu\]'"
    ):
        load_backend("kernels")


def test_a_backend_on_another_device_makes_its_arrays_there(monkeypatch):
    monkeypatch.setattr(kernels, "place", lambda device, dtype: (device, dtype))
    ops = load_backend("kernels", "meta", "bfloat16")
    assert (ops.DEVICE, ops.DTYPE) == ("meta", "bfloat16")
    assert str(ops.zeros((2,)).device) == str(ops.array([1.0]).device) == "meta"
    assert kernels.zeros((2,)).device.type != "meta"
    assert ops.swiglu_forward is kernels.swiglu_forward


def test_the_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("MINITINKER_BACKEND", "reference")
    assert load_backend() is reference
    monkeypatch.setenv("MINITINKER_BACKEND", "abacus")
    with pytest.raises(BadRequestError, match="'abacus'"):
        load_backend()


def test_an_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("MINITINKER_BACKEND", "abacus")
    assert load_backend("reference") is reference


@pytest.mark.parametrize("name", ["abacus", "numpy", "os", "model", "../reference"])
def test_an_unknown_backend_is_refused_and_the_known_ones_named(name):
    with pytest.raises(BadRequestError) as caught:
        load_backend(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_has_every_op_forward_and_backward(backend):
    ops = load_backend(backend)
    assert callable(ops.embedding)  # its table is frozen
    for op in OPS[1:]:
        assert callable(getattr(ops, f"{op}_forward"))
        assert callable(getattr(ops, f"{op}_backward"))
    for name in ("sample", "adamw_", "global_norm", "array", "zeros", "to_numpy", "side_by_side", "width"):
        assert callable(getattr(ops, name))
    assert sorted(ops.__all__) == ops.__all__


def test_checkpoints_live_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    assert storage_folder() == tmp_path


@pytest.mark.parametrize(
    ("home", "said"),
    [("~nosuchuser/a", "MINITINKER_HOME is '~nosuchuser/a', and"), (None, "MINITINKER_HOME is not set, and")],
)
def test_a_home_folder_that_is_not_known_is_told(monkeypatch, home, said):
    def unknown():
        raise RuntimeError("Could not determine home directory.")  # as for a user without a name

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("MINITINKER_HOME", raising=False)
    if home:
        monkeypatch.setenv("MINITINKER_HOME", home)
    with pytest.raises(
        BadRequestError, match=f"{said} that home folder is not known; set it to a whole path"
    ):
        storage_folder()


@pytest.mark.parametrize("unset", [True, False])
def test_checkpoints_live_in_the_home_folder_otherwise(monkeypatch, tmp_path, unset):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    if unset:
        monkeypatch.delenv("MINITINKER_HOME", raising=False)
    else:
        monkeypatch.setenv("MINITINKER_HOME", "")
    assert storage_folder() == tmp_path / ".minitinker"
