"""engine/runs.py: what a run notes of itself comes back, or counts for nothing."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_states import state

from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.runs import new_record, read_record, write_record
from minitinker.errors import BadRequestError

NOTES = st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


@settings(deadline=None, max_examples=20)
@given(base=st.text(), rank=st.integers(1, 512), session=st.none() | st.text(), notes=NOTES, own=NOTES)
def test_a_record_comes_back_as_it_was(base, rank, session, notes, own, tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "records"
    record = new_record(base, rank, session_id=session, user_metadata=notes, session_metadata=own)
    write_record(root, "run", record)
    assert read_record(root, "run") == record
    assert record.time.tzinfo is not None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps(asdict(new_record("a", 1)) | {"rank": "1"}),
        json.dumps(asdict(new_record("a", 1)) | {"created": "today"}),
        json.dumps(asdict(new_record("a", 1)) | {"created": "2026-01-01"}),
        json.dumps(asdict(new_record("a", 1)) | {"unknown": 1}),
    ],
)
def test_a_damaged_record_is_as_good_as_none_and_checkpoints_tell_of_the_run(content, tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("run", "weights", "a", state())
    (tmp_path / "run" / "run.json").write_text(content)
    assert read_record(tmp_path, "run") is None
    assert store.run("run").base_model == "owner/name"
    assert list(store.runs()) == ["run"]


def test_a_run_of_which_nothing_is_known_is_none(tmp_path):
    store = CheckpointStore(tmp_path)
    (tmp_path / "run" / "weights").mkdir(parents=True)
    assert store.run("run") is store.run("nobody") is None
    assert store.runs() == {}
    with pytest.raises(BadRequestError, match=r"run id is '\.\./run'"):
        store.run("../run")


def test_a_run_that_cannot_be_noted_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    CheckpointStore(tmp_path / "file").note_run("run", new_record("a", 1))
