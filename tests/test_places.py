"""engine/places.py: which names there can be, and that none of them leads out of the storage folder."""

import contextlib
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_states import everything, holds, state

from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.places import check_name, namesake
from minitinker.errors import BadRequestError, ConflictError, NotFoundError


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "home" / "checkpoints")


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


@given(st.text(max_size=250))
def test_a_name_stays_what_it_is_when_it_is_checked_again(name):
    with contextlib.suppress(BadRequestError):
        checked = check_name(name)
        assert check_name(checked) == checked == unicodedata.normalize("NFC", name)


def test_the_two_ways_to_write_a_letter_are_one_name(store):
    composed, decomposed = "\u00e9", "e\u0301"
    path = store.save("run", "weights", decomposed, state(1))
    assert path == f"tinker://run/weights/{composed}"
    with pytest.raises(ConflictError):
        store.save("run", "weights", composed, state(2))
    assert holds(store, f"tinker://run/weights/{decomposed}", 1)
    assert store.paths() == [path]


def test_upper_and_lower_case_are_two_names_where_the_file_system_tells_them(store):
    store.save("run", "weights", "a", state(1))
    store.save("run", "weights", "A", state(2))
    assert holds(store, "tinker://run/weights/a", 1)
    assert holds(store, "tinker://run/weights/A", 2)


def tell_no_case(monkeypatch) -> None:
    """Let this process see a file system like those of macOS and Windows."""

    lstat, is_dir = os.lstat, Path.is_dir

    def seen(path):
        path = Path(path)
        names = os.listdir(path.parent) if is_dir(path.parent) else []
        alike = [name for name in names if name.casefold() == path.name.casefold()]
        return path.parent / alike[0] if alike and path.name not in alike else path

    monkeypatch.setattr(os, "lstat", lambda path: lstat(seen(path)))
    monkeypatch.setattr(Path, "is_dir", lambda self: is_dir(seen(self)))


def test_a_name_that_the_file_system_takes_for_another_is_refused_and_found_nowhere(store, monkeypatch):
    store.save("run", "weights", "step", state(1))
    tell_no_case(monkeypatch)
    assert namesake(store.root / "run" / "weights" / "Step") == "step"
    for overwrite in (False, True):
        with pytest.raises(ConflictError, match="this file system takes 'step' for the same name"):
            store.save("run", "weights", "Step", state(2), overwrite)
    with pytest.raises(NotFoundError, match="there is no checkpoint tinker://run/weights/Step"):
        store.load("tinker://run/weights/Step")
    with pytest.raises(NotFoundError):
        store.delete("tinker://run/weights/Step")
    assert holds(store, "tinker://run/weights/step", 1)


PARTS = st.one_of(
    st.sampled_from(
        ["..", ".", "", "run", "weights", "secret", "inside", "outside", "/etc", "~", ".lock", "a\0b"]
    ),
    st.text(st.sampled_from("./\\~:ab\0\n $%*?\u2044\uff0f\u202e"), max_size=8),
    st.text(max_size=20),
)


@settings(deadline=None, max_examples=60)
@given(run=PARTS, name=PARTS, kind=st.sampled_from(["weights", "sampler_weights", "..", "external_weights"]))
def test_nothing_outside_of_the_storage_folder_is_read_written_or_deleted(run, name, kind, tmp_path_factory):
    around = tmp_path_factory.getbasetemp() / "around"
    store = CheckpointStore(around / "deep" / "root")
    outside = CheckpointStore(around / "outside")
    if not around.exists():
        outside.save("run", "weights", "a", state(7))
        (around / "secret").write_text("secret")
        store.save("run", "weights", "a", state(1))
        (store.root / "link").symlink_to(outside.root / "run")
        (store.root / "run" / "weights" / "inside").symlink_to(outside.root / "run" / "weights" / "a")
        (store.root / "run" / "sampler_weights").symlink_to(outside.root / "run" / "weights")
    path = f"tinker://{run}/{kind}/{name}"
    before = {one: one.lstat().st_mtime_ns for one in everything(outside.root)}
    calls = [
        lambda: store.save(run, kind, name, state(2), overwrite=True),
        lambda: store.copy(path),
        lambda: store.set_ttl(path, 1000),
        lambda: store.set_public(path, True),
        lambda: store.note_run(run, store.run("run")),
        lambda: store.entries(run),
        lambda: store.run(run),
        lambda: store.delete(path),
        lambda: store.sweep(),
    ]
    for call in calls:
        with contextlib.suppress(BadRequestError, NotFoundError, ConflictError):
            call()
    with contextlib.suppress(BadRequestError, NotFoundError):
        assert store.load(path).step != 7
    assert all(store.load(one).step != 7 for one in store.paths() if "/external_weights/" not in one)
    assert {one: one.lstat().st_mtime_ns for one in everything(outside.root)} == before
    assert (around / "secret").read_text() == "secret"
    beside = everything(around) - everything(store.root) - everything(outside.root)
    assert beside == {around / "secret", around / "deep", store.root, outside.root}


@pytest.mark.parametrize("run", ["link", "run"])
def test_a_run_folder_that_links_outwards_is_not_listed_and_gets_no_record(run, store, tmp_path):
    outside = CheckpointStore(tmp_path / "outside")
    outside.save("run", "weights", "a", state(7))
    before = everything(outside.root)
    store.root.mkdir(parents=True)
    (store.root / run).symlink_to(outside.root / "run")
    assert store.paths() == store.paths(run) == []
    assert store.runs() == {}
    with contextlib.suppress(BadRequestError):
        store.note_run(run, outside.run("run"))
    assert everything(outside.root) == before
