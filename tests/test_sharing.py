"""engine/sharing.py: one at a time under the lock, and a work folder that goes with its process."""

import errno
import importlib.util
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from minitinker.engine import sharing
from minitinker.engine.sharing import LOCK, PART, locked, sweep_work_folders, work_folder
from minitinker.errors import APIError

HOLDS = """
import sys
from pathlib import Path
from minitinker.engine.sharing import locked, work_folder
with {what}(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A function that starts another process, which holds the lock or a work folder until it is ended."""
    processes = []

    def start(what):
        command = [sys.executable, "-c", HOLDS.format(what=what), str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def work_folders(root):
    return [path for path in root.iterdir() if path.name.startswith(PART)]


def test_only_one_thread_at_a_time_holds_the_lock(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path) as alone:
                assert alone
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 80


def test_the_lock_of_a_living_process_is_waited_for_and_that_of_a_killed_one_is_free(
    other, tmp_path, monkeypatch
):
    process = other("locked")
    monkeypatch.setattr(sharing, "_PATIENCE", 0.1)
    with pytest.raises(APIError, match=rf"another process has held .*{LOCK}"), locked(tmp_path):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path) as alone:
        assert alone


def test_a_work_folder_is_swept_when_its_process_was_killed_and_not_before(other, tmp_path):
    process = other("work_folder")
    sweep_work_folders(tmp_path)
    assert len(work_folders(tmp_path)) == 1
    process.kill()
    process.wait()
    sweep_work_folders(tmp_path)
    assert work_folders(tmp_path) == []


def test_a_work_folder_of_this_process_is_not_swept_and_goes_at_its_end(tmp_path):
    with work_folder(tmp_path) as folder:
        (folder / "file").write_text("half")
        sweep_work_folders(tmp_path)
        assert (folder / "file").read_text() == "half"
    assert work_folders(tmp_path) == []


def test_a_work_folder_goes_also_where_the_work_fails(tmp_path):
    with pytest.raises(NotADirectoryError), work_folder(tmp_path) as folder:
        (folder / "file" / "within").write_text((folder / "file").write_text("half") and "")
    assert work_folders(tmp_path) == []


def test_a_link_with_the_name_of_a_work_folder_is_not_followed(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root):
        folder.mkdir()
    (outside / "kept").write_text("kept")
    (root / f"{PART}link").symlink_to(outside)
    inner = root / f"{PART}inner"
    inner.mkdir()
    (inner / "lock").symlink_to(outside / "kept")
    sweep_work_folders(root)
    assert (outside / "kept").read_text() == "kept"


def test_where_there_are_no_locks_work_goes_on_and_nothing_is_swept(tmp_path, monkeypatch):
    def no_locks(descriptor):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(sharing, "_try", no_locks)
    (tmp_path / f"{PART}left").mkdir()
    with work_folder(tmp_path) as folder:
        assert folder.is_dir()
    with locked(tmp_path) as alone:
        assert not alone
    sweep_work_folders(tmp_path)
    assert [path.name for path in work_folders(tmp_path)] == [f"{PART}left"]


@pytest.fixture
def on_windows(monkeypatch):
    """sharing.py as it is where there is no fcntl, on a msvcrt that locks as Microsoft documents it.

    Locks are of a byte range from the file's position on and of one open file; EACCES says that another has it.
    """

    fcntl = pytest.importorskip("fcntl")

    def locking(descriptor, mode, length):
        assert (os.lseek(descriptor, 0, os.SEEK_CUR), length) == (0, 1)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN if mode == "unlock" else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    msvcrt = SimpleNamespace(LK_NBLCK="lock", LK_UNLCK="unlock", locking=locking)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    spec = importlib.util.spec_from_file_location("sharing_on_windows", sharing.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.msvcrt is msvcrt
    return module


def test_on_windows_one_at_a_time_holds_the_lock(on_windows, tmp_path, monkeypatch):
    monkeypatch.setattr(on_windows, "_PATIENCE", 0.05)
    for _ in range(2):
        with on_windows.locked(tmp_path) as alone:
            assert alone
            with pytest.raises(APIError, match="another process has held"), on_windows.locked(tmp_path):
                pass


def test_on_windows_a_work_folder_is_swept_when_it_was_left_and_not_before(on_windows, tmp_path):
    left = tmp_path / f"{PART}left"
    left.mkdir()
    (left / "lock").touch()
    with on_windows.work_folder(tmp_path) as folder:
        on_windows.sweep_work_folders(tmp_path)
        assert work_folders(tmp_path) == [folder]
    assert work_folders(tmp_path) == []


def test_on_windows_a_file_system_without_locks_is_told_from_a_lock_that_is_held(
    on_windows, tmp_path, monkeypatch
):
    def no_locks(*arguments):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(on_windows.msvcrt, "locking", no_locks)
    with on_windows.locked(tmp_path) as alone:
        assert not alone


def test_nothing_is_made_to_sweep_what_is_not_there(tmp_path):
    sweep_work_folders(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
