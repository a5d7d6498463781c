"""backend.py: which ops are chosen, and where checkpoints live."""

from pathlib import Path

import pytest

from minitinker import reference
from minitinker.backend import BACKENDS, load_backend, storage_folder
from minitinker.errors import BadRequestError

OPS = ["embedding", "rms_norm", "rope", "swiglu", "lora_linear", "attention", "logprob"]


def test_the_reference_is_the_default(monkeypatch):
    monkeypatch.delenv("MINITINKER_BACKEND", raising=False)
    assert load_backend() is reference


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


@pytest.mark.parametrize("unset", [True, False])
def test_checkpoints_live_in_the_home_folder_otherwise(monkeypatch, tmp_path, unset):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    if unset:
        monkeypatch.delenv("MINITINKER_HOME", raising=False)
    else:
        monkeypatch.setenv("MINITINKER_HOME", "")
    assert storage_folder() == tmp_path / ".minitinker"
