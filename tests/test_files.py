"""model/files.py: a folder is the old one, the new one, or not there, whenever the writer stops."""

import errno
import os

import pytest

from minitinker.errors import ConflictError
from minitinker.model import files
from minitinker.model.files import make_folder, present, written_aside


class KilledError(BaseException):
    """Stands for the end of the process: nothing that comes after it changes the disk."""


def write(folder, content, overwrite=False):
    with written_aside(folder, overwrite) as new:
        (new / "one").write_text(content)
        (new / "two").write_text(content)


def read(folder):
    """The content, which must be the same in both files; None where there is no folder."""
    there = present(folder)
    if there is None:
        return None
    assert {path.name for path in there.iterdir()} == {"one", "two"}
    content = (there / "one").read_text()
    assert (there / "two").read_text() == content
    return content


def kill_after(calls, monkeypatch):
    """Let this many renames and fsyncs happen; then the process stops, so that nothing is cleaned up."""
    done = []

    def counted(real):
        def call(*args):
            if len(done) == calls:
                raise KilledError
            done.append(real)
            return real(*args)

        return call

    class NoCleanup:
        def __init__(self, prefix, dir):
            self.name = os.path.join(dir, prefix + "left")

        def __enter__(self):
            os.mkdir(self.name)
            return self.name

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(files.os, "rename", counted(os.rename))
    monkeypatch.setattr(files.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", NoCleanup)


def test_a_folder_is_there_after_the_block_and_not_before(tmp_path):
    folder = tmp_path / "a" / "b" / "c"
    with written_aside(folder) as new:
        (new / "one").write_text("1")
        assert present(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["c"]
    assert (folder / "one").read_text() == "1"


def test_a_folder_has_the_permissions_that_a_new_folder_has(tmp_path):
    write(tmp_path / "a", "1")
    (tmp_path / "b").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_every_file_and_folder_is_forced_to_the_disk_before_the_rename(tmp_path, monkeypatch):
    order = []
    rename = os.rename
    monkeypatch.setattr(files, "fsync", lambda path: order.append(path.name))
    monkeypatch.setattr(files.os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    write(tmp_path / "a", "1")
    first = order.index("rename")
    assert {"one", "two", "new"} == set(order[:first])
    assert order[-1] == tmp_path.name


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_in_the_block_leaves_what_was_there(overwrite, tmp_path):
    def fail():
        with written_aside(tmp_path / "a", overwrite) as new:
            (new / "one").write_text("2")
            raise OSError(errno.ENOSPC, "full")

    if overwrite:
        write(tmp_path / "a", "1")
    with pytest.raises(OSError, match="full"):
        fail()
    assert read(tmp_path / "a") == ("1" if overwrite else None)
    assert len(list(tmp_path.iterdir())) == overwrite


@pytest.mark.parametrize("calls", range(10))
def test_a_process_that_is_killed_leaves_the_whole_new_folder_or_none(calls, tmp_path, monkeypatch):
    kill_after(calls, monkeypatch)
    finished = False
    try:
        write(tmp_path / "a", "1")
        finished = True
    except KilledError:
        pass
    content = read(tmp_path / "a")
    assert content in (None, "1")
    if finished:
        assert content == "1"
    monkeypatch.undo()
    write(tmp_path / "a", "2", overwrite=True)
    assert read(tmp_path / "a") == "2"


@pytest.mark.parametrize("calls", range(10))
def test_a_process_that_is_killed_while_it_overwrites_leaves_the_old_or_the_new(calls, tmp_path, monkeypatch):
    write(tmp_path / "a", "1")
    kill_after(calls, monkeypatch)
    finished = False
    try:
        write(tmp_path / "a", "2", overwrite=True)
        finished = True
    except KilledError:
        pass
    content = read(tmp_path / "a")
    assert content in ("1", "2")
    if finished:
        assert content == "2"
    assert finished == (calls == 9)
    monkeypatch.undo()
    with pytest.raises(ConflictError):
        write(tmp_path / "a", "3")
    assert read(tmp_path / "a") == content
    write(tmp_path / "a", "3", overwrite=True)
    assert read(tmp_path / "a") == "3"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(files.OLD)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_process_that_writes_the_same_folder_meanwhile_loses_nothing_silently(overwrite, tmp_path):
    def both():
        with written_aside(tmp_path / "a", overwrite) as new:
            (new / "one").write_text("late")
            (new / "two").write_text("late")
            write(tmp_path / "a", "early")

    if overwrite:
        both()
    else:
        with pytest.raises(ConflictError):
            both()
    assert read(tmp_path / "a") == ("late" if overwrite else "early")


def test_a_file_in_the_way_is_kept_unless_it_is_overwritten(tmp_path):
    (tmp_path / "a").write_text("file")
    with pytest.raises(ConflictError, match="not an empty folder"):
        write(tmp_path / "a", "1")
    assert (tmp_path / "a").read_text() == "file"
    write(tmp_path / "a", "1", overwrite=True)
    assert read(tmp_path / "a") == "1"


def test_a_folder_and_those_above_it_are_made_once(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
