"""engine/checkpoints.py: names, paths, and saving that fails. What is in the files: test_saved_state.py."""

import contextlib
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import our_logits, random_flat, saved, their_logits
from transformers import AutoModelForCausalLM

from minitinker.engine.checkpoints import CheckpointStore, SavedState, check_name, merge_checkpoint
from minitinker.errors import APIError, BadRequestError, ConflictError, NotFoundError
from minitinker.model import files
from minitinker.model.adapter import AdapterSpec, adapter_spec
from minitinker.model.weights import load_base_model

SPEC = AdapterSpec(2, {"model.layers.0.self_attn.q_proj": (6, 4), "lm_head": (10, 4)})
PATH = "tinker://run/weights/a"


def state(seed: int = 0) -> SavedState:
    flat, m, v = (random_flat(SPEC, 3 * seed + i) for i in range(3))
    return SavedState(SPEC, flat, "owner/name", seed, m, v)


def holds(store: CheckpointStore, path: str, seed: int) -> bool:
    """Whether the checkpoint is whole and is state(seed)."""
    found, wanted = store.load(path), state(seed)
    pairs = ((found.flat, wanted.flat), (found.m, wanted.m), (found.v, wanted.v))
    same = [found.step == wanted.step, *(np.array_equal(ours, theirs) for ours, theirs in pairs)]
    assert all(same) == any(same)
    return all(same)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "home" / "checkpoints")


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_what_was_saved_is_loaded_by_its_path(kind, store):
    path = store.save("run", kind, "a", state())
    assert path == f"tinker://run/{kind}/a"
    found = store.load(path)
    np.testing.assert_array_equal(found.flat, state().flat)
    assert (found.m is not None) == (kind == "weights")
    assert store.find(path) == store.root / "run" / kind / "a"


def test_a_name_that_is_taken_is_refused_unless_it_is_overwritten(store):
    store.save("run", "weights", "a", state(1))
    with pytest.raises(ConflictError, match="tinker://run/weights/a exists"):
        store.save("run", "weights", "a", state(2))
    assert holds(store, PATH, 1)
    store.save("run", "weights", "a", state(2), overwrite=True)
    assert holds(store, PATH, 2)
    store.save("run", "sampler_weights", "a", state(3))  # of another kind is another name
    assert holds(store, PATH, 2)


def test_a_path_that_is_nowhere_is_named_with_what_there_is(store):
    with pytest.raises(NotFoundError, match=f"no checkpoint {PATH} in .*; there is: none"):
        store.load(PATH)
    store.save("run", "weights", "b", state())
    store.save("other", "weights", "a", state())
    with pytest.raises(NotFoundError, match=r"there is: tinker://run/weights/b$"):
        store.load(PATH)
    with pytest.raises(NotFoundError, match=r"there is: tinker://other/weights/a, tinker://run/weights/b$"):
        store.load("tinker://third/weights/a")


def test_many_checkpoints_do_not_make_a_long_message(store):
    for i in range(14):
        store.save("run", "sampler_weights", f"{i:02}", state())
    with pytest.raises(NotFoundError, match=r"sampler_weights/13, and 4 more$"):
        store.load(PATH)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a",
        "/etc/passwd",
        "tinker://",
        "tinker://run/weights",
        "tinker://run/other/a",
        "file://run/weights/a",
        "tinker://run/weights/a/b",
        "tinker://run/weights/..",
        "tinker:///weights/a",
        "tinker://../weights/a",
        "tinker://run/weights/.hidden",
        "tinker://run/weights/a\0",
        "tinker://run/weights/a\\b",
        7,
        None,
    ],
    ids=repr,
)
def test_what_is_no_tinker_path_is_refused(path, store):
    with pytest.raises(BadRequestError):
        store.load(path)


def test_a_path_of_another_kind_than_asked_for_is_refused(store):
    path = store.save("run", "sampler_weights", "a", state())
    with pytest.raises(BadRequestError, match="of the kind sampler_weights; it must be weights"):
        store.load(path, ["weights"])
    with pytest.raises(BadRequestError, match="kind external_weights"):
        store.load("tinker://run/external_weights/a")
    with pytest.raises(BadRequestError, match=r"kind is '\.\.'"):
        store.save("run", "..", "a", state())


@pytest.mark.parametrize(
    "name", ["a", "step 10", "été", "😀", "a" * 200, "é" * 100, "a.b", "~", "-rf", "con", "%2e"]
)
def test_names_that_are_accepted(name, store):
    assert check_name(name) == name
    path = store.save(name, "weights", name, state())
    assert holds(store, path, 0)
    assert store.paths() == [path]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "/a", "a\\b", "a\0", "a\n", "a\x7f", "\ud800", "\u202ea"]
)
def test_names_that_are_refused(name):
    with pytest.raises(BadRequestError, match="it must be 1 to 200 bytes"):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["a" * 201, "é" * 101, "a" * 10**6, None, 7, b"a", Path("a")], ids=lambda x: repr(x)[:9]
)
def test_names_that_are_too_long_or_no_text_are_refused_briefly(name):
    with pytest.raises(BadRequestError) as caught:
        check_name(name, "run id")
    assert str(caught.value).startswith("the run id is ")
    assert len(str(caught.value)) < 300


def everything(folder: Path) -> set[Path]:
    return {Path(at, name) for at, folders, names in os.walk(folder) for name in (*folders, *names)}


HOSTILE = st.text(st.sampled_from("./\\~:ab\0\n $%*?\u2044\uff0f\u202e"), max_size=8) | st.text(max_size=300)


@settings(deadline=None, max_examples=150)
@given(run=HOSTILE | st.just("run"), name=HOSTILE)
def test_no_name_leaves_the_root(run, name, tmp_path_factory):
    outside = tmp_path_factory.getbasetemp() / "hostile"
    store = CheckpointStore(outside / "deep" / "root")
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_text("secret")
    try:
        path = store.save(run, "weights", name, state(), overwrite=True)
    except BadRequestError:
        with pytest.raises(BadRequestError):
            store.load(f"tinker://{run}/weights/{name}")
    else:
        assert holds(store, path, 0)
        assert path in store.paths(run)
    beside = everything(outside) - everything(store.root)
    assert beside <= {outside / "secret", outside / "deep", store.root}
    assert all(path.parent.parent.parent == store.root for path in store.root.glob("*/*/*"))


@settings(deadline=None, max_examples=300)
@given(path=HOSTILE | st.builds("tinker://{}/weights/{}".format, HOSTILE, HOSTILE))
def test_no_path_reads_anything_outside_the_root(path, tmp_path_factory):
    outside = tmp_path_factory.getbasetemp() / "readable"
    inner = CheckpointStore(outside / "run" / "weights" / "root")
    if not outside.exists():
        CheckpointStore(outside).save("run", "weights", "a", state())
        inner.save("run", "weights", "a", state())
    with contextlib.suppress(BadRequestError, NotFoundError):
        assert inner.find(path).is_relative_to(inner.root)


@pytest.mark.parametrize("level", ["run", "run/weights", "run/weights/a", "run/weights/.old-a"])
def test_a_link_that_leaves_the_root_is_neither_read_nor_written(level, store, tmp_path):
    elsewhere = CheckpointStore(tmp_path / "elsewhere")
    elsewhere.save("run", "weights", "a", state())
    before = everything(elsewhere.root)
    link = store.root / level
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere.root / level.replace(".old-", ""))
    with pytest.raises(BadRequestError, match="goes through a link that leaves"):
        store.load(PATH)
    if ".old-" not in level:
        with pytest.raises(BadRequestError, match="goes through a link that leaves"):
            store.save("run", "weights", "a", state(), overwrite=True)
    assert everything(elsewhere.root) == before
    if level in ("run", "run/weights"):
        assert store.paths() == store.paths("run") == []


def test_a_file_of_a_checkpoint_that_links_out_of_the_root_is_not_read(store, tmp_path):
    file = store.find(store.save("run", "weights", "a", state())) / "adapter_model.safetensors"
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(BadRequestError, match=r"adapter_model\.safetensors goes through a link"):
        store.load(PATH)


def test_a_circle_of_links_is_refused(store):
    (store.root / "run" / "weights").mkdir(parents=True)
    (store.root / "run" / "weights" / "a").symlink_to("a")
    with pytest.raises((BadRequestError, NotFoundError)):
        store.load(PATH)


def test_the_root_itself_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = CheckpointStore(tmp_path / "link")
    assert holds(store, store.save("run", "weights", "a", state()), 0)


def test_checkpoints_are_listed_by_run_and_temporary_folders_are_not(store):
    assert store.paths() == store.paths("run") == []
    made = [
        store.save(run, kind, name, state())
        for run in ("one", "two")
        for kind in ("weights", "sampler_weights")
        for name in ("a", "b")
    ]
    (store.root / "one" / "weights" / f"{files.ASIDE}left").mkdir()
    (store.root / "one" / "weights" / "note.txt").write_text("")
    (store.root / "empty").mkdir()
    assert store.paths() == made
    assert store.paths("two") == made[4:]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", ["rename", "fsync"])
@pytest.mark.parametrize("nth", range(7))
def test_a_save_that_fails_leaves_the_old_checkpoint_or_none(nth, call, overwrite, store, monkeypatch):
    if overwrite:
        store.save("run", "weights", "a", state(1))
    real, calls = getattr(os, call), []

    def fail(*args):
        calls.append(args)
        if len(calls) > nth:
            raise OSError(errno.EIO, "the disk is broken")
        return real(*args)

    refused = ""
    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        try:
            store.save("run", "weights", "a", state(2), overwrite)
        except APIError as error:
            refused = str(error)
    assert not refused or f"{PATH} was not saved in {store.root}: the disk is broken" in refused
    if not overwrite and not store.paths("run"):
        assert refused
        with pytest.raises(NotFoundError):
            store.load(PATH)
    else:
        assert store.paths() == [PATH]
        assert holds(store, PATH, 2) or (refused and overwrite and holds(store, PATH, 1))
    store.save("run", "weights", "a", state(3), overwrite=True)
    assert holds(store, PATH, 3)


def full_disk(limit: int, monkeypatch) -> None:
    """From here on, files take this many bytes in all."""
    written = [0]
    opened = Path.open

    def limited(self, mode="r", *args, **kwargs):
        file = opened(self, mode, *args, **kwargs)
        if "w" in mode:
            write = file.write

            def checked(data):
                written[0] += len(data)
                if written[0] > limit:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(data)

            monkeypatch.setattr(file, "write", checked, raising=False)
        return file

    monkeypatch.setattr(Path, "open", limited)


@pytest.mark.parametrize("limit", [0, 10, 300, 700, 1000])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_is_said_and_leaves_the_earlier_checkpoint(limit, overwrite, store, monkeypatch):
    if overwrite:
        store.save("run", "weights", "a", state(1))
    before = everything(store.root / "run" / "weights")
    with monkeypatch.context() as full:
        full_disk(limit, full)
        with pytest.raises(APIError, match=f"{PATH} was not saved in {store.root}: No space left on device"):
            store.save("run", "weights", "a", state(2), overwrite)
    assert everything(store.root / "run" / "weights") == before
    if overwrite:
        assert holds(store, PATH, 1)
    store.save("run", "weights", "a", state(2), overwrite)
    assert holds(store, PATH, 2)


def test_a_root_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(APIError, match="was not saved"):
        CheckpointStore(tmp_path / "file" / "root").save("run", "weights", "a", state())


def test_a_checkpoint_is_merged_into_the_base_that_it_names(store, tmp_path):
    base = load_base_model(str(saved(tmp_path / "base", "qwen3-tied", std=0.2)))
    spec = adapter_spec(base.config, 4, True, True, True)
    flat, tokens = random_flat(spec), np.arange(9)
    path = store.save("run", "sampler_weights", "a", SavedState(spec, flat, base.name))
    assert merge_checkpoint(store.find(path), tmp_path / "merged") == tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours = our_logits(base, spec, flat, tokens)
    np.testing.assert_allclose(their_logits(model, tokens), ours, rtol=0, atol=1e-4)
