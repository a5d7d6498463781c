"""engine/sweeping.py: what goes, and what stays. How expiry looks from outside is in test_checkpoints.py."""

import os
import shutil
import time

import pytest
from small_states import PATH, everything, holds, state

from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.places import place_of
from minitinker.engine.sharing import work_folder
from minitinker.engine.sweeping import remove, sweep


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("run", "weights", "a", state(1))
    return store


def test_sweeping_a_tidy_folder_changes_nothing(store):
    before = everything(store.root)
    sweep(store.root)
    sweep(store.root, "run")
    sweep(store.root, "another")
    assert everything(store.root) == before
    assert holds(store, PATH, 1)


def test_an_overwriting_that_was_cut_off_is_ended(store):
    folder = store.find(PATH)
    old = folder.with_name(".old-a")
    folder.rename(old)
    sweep(store.root)
    assert (folder.is_dir(), old.exists()) == (True, False)
    assert holds(store, PATH, 1)
    shutil.copytree(folder, old)
    store.save("run", "weights", "b", state(2))  # which sweeps the run
    assert not old.exists()
    assert holds(store, PATH, 1)
    assert not list(store.root.glob(".part-*"))


def test_what_others_are_writing_stays(store):
    with work_folder(store.root) as folder:
        (folder / "new").mkdir()
        sweep(store.root)
        assert (folder / "new").is_dir()


def test_work_folders_of_earlier_versions_go_when_they_are_a_day_old(store):
    young, aged = (store.root / "run" / "weights" / f".new-{name}" for name in ("young", "aged"))
    for folder in (young, aged):
        folder.mkdir()
    os.utime(aged, (time.time() - 90000,) * 2)
    sweep(store.root)
    assert (young.is_dir(), aged.exists()) == (True, False)


def test_files_that_are_none_of_ours_stay(store):
    kept = [
        store.root / "note.txt",
        store.root / "run" / "note.txt",
        store.root / "run" / "weights" / "note.txt",
    ]
    for path in kept:
        path.write_text("")
    sweep(store.root)
    assert all(path.exists() for path in kept)


def test_removing_is_left_out_where_it_is_no_longer_wanted(store):
    remove(place_of(store.root, PATH), only_if=lambda folder: False)
    assert holds(store, PATH, 1)
    remove(place_of(store.root, PATH))
    remove(place_of(store.root, PATH))
    assert store.paths() == []


def test_a_link_within_the_root_is_removed_and_what_it_leads_to_stays(store):
    link = store.root / "run" / "weights" / "link"
    link.symlink_to("a")
    assert holds(store, "tinker://run/weights/link", 1)
    store.delete("tinker://run/weights/link")
    assert not link.is_symlink()
    assert holds(store, PATH, 1)
