"""engine/checkpoints.py: names, paths, and saving that fails. What is in the files: test_saved_state.py."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_states import PATH, everything, holds, state

from minitinker.engine import checkpoints, metadata
from minitinker.engine.checkpoints import CheckpointStore
from minitinker.errors import APIError, BadRequestError, ConflictError, NotFoundError
from minitinker.model import files


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


@settings(deadline=None, max_examples=40)
@given(limit=st.integers(0, 3000), call=st.sampled_from(["save", "overwrite", "copy", "ttl"]))
def test_a_disk_that_is_full_at_any_place_leaves_what_there_was(limit, call, tmp_path_factory):
    store = CheckpointStore(tmp_path_factory.mktemp("full"))
    store.save("run", "weights", "a", state(1))
    before = everything(store.root)
    calls = {
        "save": lambda: store.save("run", "weights", "b", state(2)),
        "overwrite": lambda: store.save("run", "weights", "a", state(2), overwrite=True),
        "copy": lambda: store.copy(PATH),
        "ttl": lambda: store.set_ttl(PATH, 1000),
    }
    with pytest.MonkeyPatch.context() as full:
        full_disk(limit, full)
        refused = ""
        try:
            calls[call]()
        except APIError as error:
            refused = str(error)
    if refused:
        assert "No space left on device" in refused
        assert everything(store.root) == before
        assert holds(store, PATH, 1)
        assert store.info(PATH).expires_at is None
    else:
        assert holds(store, PATH, 2 if call == "overwrite" else 1)
    assert holds(store, store.save("run", "weights", "c", state(3)), 3)


def test_deleting_needs_no_room(store, monkeypatch):
    store.save("run", "weights", "a", state(1))
    with monkeypatch.context() as full:
        full_disk(0, full)
        full.setattr(os, "mkdir", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        store.delete(PATH)
    assert store.paths() == []
    assert everything(store.root) == {store.root / name for name in (".lock", "run", "run/weights")}


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_file_that_may_not_grow_is_said_and_the_earlier_checkpoint_stays(store):
    store.save("run", "weights", "a", state(1))
    program = f"""
import resource
import numpy as np
from minitinker.engine.checkpoints import CheckpointStore, SavedState
from minitinker.errors import APIError
from minitinker.model.adapter import AdapterSpec
spec = AdapterSpec(1, {{"lm_head": (100, 100)}})
state = SavedState(spec, np.ones(spec.size, np.float32), "owner/name")
store = CheckpointStore({str(store.root)!r})
for limit in range(0, 900, 50):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        store.save("run", "weights", "a", state, overwrite=True)
    except APIError as error:
        assert "File too large" in str(error), error
    else:
        raise SystemExit("it was saved")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.save("run", "weights", "b", state)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert holds(store, PATH, 1)
    assert store.load("tinker://run/weights/b").flat.sum() == 200
    assert not list(store.root.glob(".part-*"))


# Files that are not as they were saved


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "minitinker.json"])
@pytest.mark.parametrize("damage", ["altered", "truncated", "emptied", "gone"])
def test_a_damaged_file_is_named_and_the_others_are_read_as_before(file, damage, store):
    store.save("run", "weights", "b", state(1))
    path = store.find(store.save("run", "weights", "a", state())) / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"altered": data, "truncated": data[:-5], "emptied": b""}[damage])
    with pytest.raises((BadRequestError, NotFoundError)) as caught:
        store.load(PATH)
    assert str(path) in str(caught.value)
    assert holds(store, "tinker://run/weights/b", 1)
    assert PATH in store.paths()  # so that it can be deleted
    store.delete(PATH)
    assert PATH not in store.paths()


# How long they are kept


@pytest.fixture
def later(monkeypatch):
    """A function that lets so many seconds pass."""

    def pass_by(seconds):
        moment = datetime.now(UTC) + timedelta(seconds=seconds)
        monkeypatch.setattr(metadata, "now", lambda: moment)
        monkeypatch.setattr(checkpoints, "now", lambda: moment)

    return pass_by


def test_what_has_expired_is_neither_listed_nor_found_nor_in_the_way(store, later):
    store.save("run", "weights", "a", state(1), ttl_seconds=100)
    store.save("run", "weights", "b", state(2))
    later(99)
    assert len(store.paths()) == 2
    assert holds(store, PATH, 1)
    later(101)
    assert store.paths() == ["tinker://run/weights/b"]
    for call in (store.load, store.find, store.info, store.delete, store.copy):
        with pytest.raises(NotFoundError, match="tinker://run/weights/a expired at 20"):
            call(PATH)
    with pytest.raises(NotFoundError):
        store.set_ttl(PATH, None)
    store.save("run", "weights", "a", state(3))
    assert holds(store, PATH, 3)


def test_what_has_expired_is_swept_at_the_next_save_of_its_run_or_when_asked(store, later):
    for run in ("one", "two"):
        store.save(run, "weights", "a", state(1), ttl_seconds=100)
    later(101)
    store.save("one", "weights", "b", state(2))
    assert not (store.root / "one" / "weights" / "a").exists()
    assert (store.root / "two" / "weights" / "a").exists()
    store.sweep()
    assert not (store.root / "two" / "weights" / "a").exists()
    assert store.paths() == ["tinker://one/weights/b"]


def test_a_ttl_is_set_anew_from_now_and_taken_away(store, later):
    store.save("run", "weights", "a", state(1, user_metadata={"k": "v"}), ttl_seconds=100)
    store.set_ttl(PATH, 1000)
    later(500)
    store.set_ttl(PATH, 1000)
    later(1400)
    assert holds(store, PATH, 1)
    store.set_ttl(PATH, None)
    later(10**6)
    assert holds(store, PATH, 1)
    assert store.info(PATH).user_metadata == {"k": "v"}


@pytest.mark.parametrize("ttl", [0, -1, 1.5, True, "3600", float("nan"), 10**10])
def test_a_ttl_that_cannot_be_is_refused_with_its_value_and_changes_nothing(ttl, store):
    store.save("run", "weights", "a", state(1))
    calls = [
        lambda: store.save("run", "weights", "a", state(2), overwrite=True, ttl_seconds=ttl),
        lambda: store.copy(PATH, ttl),
        lambda: store.set_ttl(PATH, ttl),
    ]
    for call in calls:
        with pytest.raises(
            BadRequestError, match=f"ttl_seconds is {ttl!r}; it must be None or a whole number"
        ):
            call()
    assert store.paths() == [PATH]
    assert holds(store, PATH, 1)
    assert store.info(PATH).expires_at is None


def test_overwriting_replaces_notes_and_expiry(store):
    store.save("run", "weights", "a", state(1, user_metadata={"k": "v"}), ttl_seconds=100)
    store.save("run", "weights", "a", state(2), overwrite=True)
    info = store.info(PATH)
    assert (info.user_metadata, info.expires_at) == (None, None)


# Deleted, copied, published


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_what_is_deleted_is_gone_and_its_name_is_free(kind, store):
    path = store.save("run", kind, "a", state(1))
    store.save("run", kind, "b", state(2))
    store.delete(path)
    assert store.paths() == [f"tinker://run/{kind}/b"]
    assert not (store.root / "run" / kind / "a").exists()
    with pytest.raises(NotFoundError, match="there is no checkpoint"):
        store.delete(path)
    store.save("run", kind, "a", state(3))


def test_what_an_overwriting_left_behind_does_not_come_back_after_deleting(store):
    store.save("run", "weights", "a", state(1))
    folder = store.find(PATH)
    folder.rename(folder.with_name(".old-a"))
    assert holds(store, PATH, 1)
    with pytest.raises(ConflictError):
        store.save("run", "weights", "a", state(2))
    store.save("run", "weights", "a", state(2), overwrite=True)
    store.delete(PATH)
    assert store.paths() == []


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_is_a_checkpoint_of_its_own_in_a_run_of_its_own(links, store, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    store.save("run", "weights", "a", state(1, user_metadata={"k": "v"}), ttl_seconds=100)
    copy = store.copy(PATH)
    assert copy.endswith("/weights/a")
    assert copy != PATH
    assert holds(store, copy, 1)
    info = store.info(copy)
    assert (info.user_metadata, info.expires_at, info.public) == ({"k": "v"}, None, False)
    store.save("run", "weights", "a", state(2), overwrite=True)
    assert holds(store, copy, 1)
    store.delete(PATH)
    assert holds(store, copy, 1)
    assert list(store.runs()) == [copy.split("/")[2]]
    assert store.info(store.copy(copy, 50)).expires_at is not None


def test_a_copy_of_what_is_not_there_makes_nothing(store):
    store.save("run", "weights", "a", state(1))
    before = everything(store.root)
    with pytest.raises(NotFoundError, match="there is no checkpoint tinker://run/weights/b"):
        store.copy("tinker://run/weights/b")
    assert everything(store.root) == before


def test_public_is_noted_and_what_it_is_already_is_refused(store):
    store.save("run", "weights", "a", state(1))
    with pytest.raises(ConflictError, match="is private already"):
        store.set_public(PATH, False)
    store.set_public(PATH, True)
    assert store.info(PATH).public
    with pytest.raises(ConflictError, match="is public already"):
        store.set_public(PATH, True)
    assert holds(store, PATH, 1)
    store.set_public(PATH, False)
    assert not store.info(PATH).public


# What earlier versions wrote


def test_a_checkpoint_of_an_earlier_version_is_read_listed_copied_and_changed(store):
    folder = store.find(store.save("run", "weights", "a", state(1)))
    path = folder / "minitinker.json"
    fields = json.loads(path.read_text())
    for later_field in ("sha256", "expires", "public"):
        del fields[later_field]
    path.write_text(json.dumps(fields, indent=2))
    (store.root / "run" / "run.json").unlink(missing_ok=True)
    assert holds(store, PATH, 1)
    assert store.paths() == [PATH]
    assert holds(store, store.copy(PATH), 1)
    record = store.run("run")
    assert (record.base_model, record.rank) == ("owner/name", 2)
    store.set_ttl(PATH, 1000)
    assert holds(store, PATH, 1)
