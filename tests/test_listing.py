"""listing.py: what storage holds, counted, sorted and cut into pages."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_states import state

from minitinker.engine import checkpoints, metadata, saved_state
from minitinker.engine.checkpoints import CheckpointStore
from minitinker.engine.runs import new_record, user_name
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.listing import checkpoints as list_checkpoints
from minitinker.listing import page, sessions, storage_usage, training_run, training_runs, weights_info


@pytest.fixture
def store(tmp_path, monkeypatch):
    """One where each save is a second later than the one before."""
    seconds = iter(range(10**6))

    def now():
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(seconds))

    for module in (checkpoints, metadata, saved_state):
        monkeypatch.setattr(module, "now", now)
    return CheckpointStore(tmp_path)


def test_checkpoints_are_listed_with_all_that_is_known_the_newest_first(store):
    store.save("one", "weights", "a", state(user_metadata={"k": "v"}))
    store.save("two", "weights", "b", state(), ttl_seconds=10**6)
    store.save("one", "sampler_weights", "c", state())
    store.set_public("tinker://two/weights/b", True)
    sampler, public, first = list_checkpoints(store)
    assert (sampler.checkpoint_id, sampler.checkpoint_type) == ("sampler_weights/c", "sampler")
    assert (public.tinker_path, public.public) == ("tinker://two/weights/b", True)
    assert public.expires_at > public.time
    assert (first.user_metadata, first.expires_at, first.public) == ({"k": "v"}, None, False)
    folder = store.find("tinker://one/weights/a")
    assert first.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert [one.tinker_path for one in list_checkpoints(store, "two")] == ["tinker://two/weights/b"]


def test_a_run_has_its_record_and_its_last_checkpoints(store):
    store.note_run("run", new_record("owner/base", 2, session_id="s", user_metadata={"k": "v"}))
    assert training_run(store, "run").last_checkpoint is None
    for name in ("b", "a"):
        store.save("run", "weights", name, state())
    store.save("run", "sampler_weights", "c", state())
    run = training_run(store, "run")
    assert run.last_checkpoint.checkpoint_id == "weights/a"
    assert run.last_sampler_checkpoint.checkpoint_id == "sampler_weights/c"
    assert (run.base_model, run.lora_rank, run.user_metadata) == ("owner/base", 2, {"k": "v"})
    assert (run.model_owner, run.is_lora, run.corrupted) == (user_name(), True, False)
    with pytest.raises(NotFoundError, match="no training run 'other'"):
        training_run(store, "other")
    with pytest.raises(BadRequestError, match="run id is"):
        training_run(store, "..")


def test_runs_are_listed_by_their_last_use(store):
    for run in ("a", "b", "c"):
        store.save(run, "weights", "first", state())
    store.save("a", "weights", "second", state())
    runs = training_runs(store)
    assert [run.training_run_id for run in runs] == ["a", "c", "b"]
    assert runs[0].last_request_time == runs[0].last_checkpoint.time


def test_a_run_with_a_checkpoint_that_cannot_be_read_is_corrupted_and_still_listed(store):
    store.save("run", "weights", "a", state())
    store.save("run", "weights", "b", state())
    (store.find("tinker://run/weights/a") / "minitinker.json").write_text("{")
    assert training_run(store, "run").corrupted
    assert {one.checkpoint_id for one in list_checkpoints(store)} == {"weights/a", "weights/b"}


def test_weights_info_says_what_is_adapted(store):
    info = weights_info(store, store.save("run", "weights", "a", state()))
    assert (info.base_model, info.lora_rank, info.is_lora) == ("owner/name", 2, True)
    assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, False, True)
    assert info.optimizer_config.type == "adamw"


def test_the_usage_is_the_sum_of_the_sizes(store):
    assert storage_usage(store).data[0].checkpoint_count == 0
    for name in ("a", "b"):
        store.save("run", "weights", name, state())
    (usage,) = storage_usage(store).data
    assert usage.checkpoint_count == 2
    assert usage.size_bytes == sum(one.size_bytes for one in list_checkpoints(store))
    assert usage.size_gigabytes == usage.size_bytes / 1e9


def test_sessions_are_listed_once_the_newest_first(store):
    for run, session in (("a", "s"), ("b", "t"), ("c", "s"), ("d", None)):
        store.note_run(run, new_record("owner/base", 1, session_id=session))
    assert sessions(store) == ["s", "t"]


@given(count=st.integers(0, 9), limit=st.integers(0, 9), offset=st.integers(0, 9))
def test_pages_hold_every_item_once(count, limit, offset):
    shown, cursor = page(list(range(count)), limit, offset)
    assert shown == [item for item in range(count) if offset <= item < offset + limit]
    assert (cursor.limit, cursor.offset, cursor.total_count) == (limit, offset, count)


@pytest.mark.parametrize("wrong", [-1, 1.5, "1", None, True])
def test_a_limit_or_offset_that_cannot_be_is_named(wrong):
    with pytest.raises(BadRequestError, match=f"limit is {wrong!r}"):
        page([], wrong, 0)
    with pytest.raises(BadRequestError, match=f"offset is {wrong!r}"):
        page([], 1, wrong)
