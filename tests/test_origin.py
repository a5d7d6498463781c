"""engine/origin.py: from where a run may begin, and on which base model."""

import numpy as np
import pytest
from random_models import our_logits, random_flat, saved, their_logits
from small_states import state
from test_peft_adapter import made_by_peft
from transformers import AutoModelForCausalLM

from minitinker.engine.checkpoints import CheckpointStore, SavedState
from minitinker.engine.origin import agreed_base, merge_checkpoint, read_origin
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.adapter import adapter_spec
from minitinker.model.weights import load_base_model

PATH = "tinker://run/weights/a"


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "storage")


@pytest.fixture
def base(tmp_path):
    return str(saved(tmp_path / "base", "qwen3", std=0.2))


def test_a_checkpoint_is_read_by_its_path_and_by_its_folder(store):
    store.save("run", "weights", "a", state(1))
    for path in (PATH, store.find(PATH), str(store.find(PATH))):
        found = read_origin(path, store)
        assert (found.step, found.base_model) == (1, "owner/name")
        np.testing.assert_array_equal(found.m, state(1).m)


def test_an_adapter_made_by_peft_is_read_on_the_base_it_names_or_is_given(store, base, tmp_path):
    made_by_peft(tmp_path / "adapter")
    assert read_origin(tmp_path / "adapter", store, base).base_model == base
    config = tmp_path / "adapter" / "adapter_config.json"
    with pytest.raises(BadRequestError, match="names no base model; give base_model"):
        read_origin(tmp_path / "adapter", store)
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"')
    )
    assert read_origin(tmp_path / "adapter", store).base_model == base


@pytest.mark.parametrize("path", ["", "nowhere", "weights/a", None, 7, "file"])
def test_what_is_neither_a_path_nor_a_folder_is_refused(path, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        BadRequestError, match=f"the path is {path!r}; it must be a tinker:// path, or a folder"
    ):
        read_origin(path, store)


def test_a_folder_without_an_adapter_says_so(store, tmp_path):
    with pytest.raises(NotFoundError, match=r"neither minitinker\.json nor adapter_config\.json"):
        read_origin(tmp_path, store)


def test_the_base_that_is_given_must_be_the_one_that_is_named(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    here, link = str(tmp_path / "here"), str(tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for named, given, agreed in (
        ("owner/name", None, "owner/name"),
        ("owner/name", "owner/name", "owner/name"),
        ("", "owner/name", "owner/name"),
        (here, "here", here),
        (here, link, here),
        ("/nowhere/moved", here, here),
        ("/nowhere/moved", "owner/name", "owner/name"),
    ):
        assert agreed_base(named, given, PATH) == agreed
    for named, given in (("owner/name", "owner/other"), (here, "owner/name"), ("owner/name", here)):
        with pytest.raises(
            BadRequestError, match=f"base_model is '{given}'; {PATH} was trained on '{named}'"
        ):
            agreed_base(named, given, PATH)
    with pytest.raises(BadRequestError, match="names no base model"):
        agreed_base("", None, PATH)


def test_a_checkpoint_is_merged_into_the_base_that_it_names(base, tmp_path):
    model = load_base_model(base)
    spec = adapter_spec(model.config, 4, True, True, True)
    flat, tokens = random_flat(spec), np.arange(9)
    merged = merge_checkpoint(SavedState(spec, flat, base), tmp_path / "merged")
    assert merged == tmp_path / "merged"
    theirs = their_logits(AutoModelForCausalLM.from_pretrained(merged), tokens)
    np.testing.assert_allclose(theirs, our_logits(model, spec, flat, tokens), rtol=0, atol=1e-4)
