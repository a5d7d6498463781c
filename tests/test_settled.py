"""engine/settled.py: what is read is of one checkpoint, whoever replaces it meanwhile."""

import pytest
from small_states import state

from minitinker.engine import settled as module
from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.metadata import read_metadata
from minitinker.engine.places import place_of
from minitinker.engine.settled import settled
from minitinker.errors import APIError, BadRequestError
from minitinker.model.sums import METADATA

PATH = "tinker://run/weights/a"


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("run", "weights", "a", state(1))
    return store


def test_what_was_replaced_between_two_files_is_read_again(store):
    steps = iter([2, 3, None])

    def look(folder):
        first = read_metadata(folder).step
        if (step := next(steps)) is not None:
            store.save("run", "weights", "a", state(step), overwrite=True)
        return first, read_metadata(folder).step

    assert settled(place_of(store.root, PATH), look) == (3, 3)


def test_what_was_deleted_meanwhile_is_not_there(store):
    def look(folder):
        store.delete(PATH)
        return read_metadata(folder)

    with pytest.raises(FileNotFoundError):
        settled(place_of(store.root, PATH), look)


def test_what_lies_beside_because_an_overwriting_was_cut_off_is_read_there(store):
    folder = store.find(PATH)
    folder.rename(folder.with_name(".old-a"))
    assert settled(place_of(store.root, PATH), read_metadata).step == 1


def test_an_error_is_raised_when_it_comes_twice(store):
    looks = []

    def look(folder):
        looks.append(folder)
        if len(looks) == 1:
            raise BadRequestError("once")
        return "fine"

    assert settled(place_of(store.root, PATH), look) == "fine"
    (store.find(PATH) / METADATA).write_text("{")
    with pytest.raises(BadRequestError, match="not valid JSON"):
        settled(place_of(store.root, PATH), read_metadata)


def test_what_is_replaced_all_the_time_is_given_up(store, monkeypatch):
    monkeypatch.setattr(module, "_TRIES", 5)

    def look(folder):
        store.save("run", "weights", "a", state(2), overwrite=True)

    with pytest.raises(APIError, match=rf"{PATH} is overwritten again and again"):
        settled(place_of(store.root, PATH), look)
