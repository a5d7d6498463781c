import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
from small_clients import model
from tiny_models import make_model

from minitinker import APIError, reference
from minitinker.engine.session import Session
from minitinker.model.weights import load_base_model


@pytest.fixture
def sessions(tmp_path):
    pair = [Session(reference, tmp_path) for _ in range(2)]
    yield pair
    for session in pair:
        session.worker.close(finish=False)


def load(session, name):
    return session.submit(lambda: session.load_base(name)).result(timeout=30)


def test_one_base_model_in_memory_serves_every_session(sessions):
    assert load(sessions[0], model()) is load(sessions[1], model()) is load_base_model(model())


def test_one_sampler_serves_a_base_model_by_whatever_name(sessions, monkeypatch):
    session, _ = sessions
    base = load(session, model())
    sampler = session.sampler(base)
    assert session.sampler(load(session, model() + "/")) is sampler
    other = load(session, str(make_model(seed=1)[0]))
    assert session.sampler(other) is not sampler


def test_a_base_model_is_let_go_with_the_last_session_that_used_it(tmp_path):
    folder = str(make_model(seed=2)[0])
    session = Session(reference, tmp_path)
    base = weakref.ref(load(session, folder))
    gc.collect()
    assert load_base_model(folder) is base()
    session.worker.close(finish=True)
    del session
    gc.collect()
    assert base() is None


def test_a_base_model_that_finds_no_room_is_refused_and_the_session_goes_on(tmp_path):
    ops = SimpleNamespace(**vars(reference))
    session = Session(ops, tmp_path)

    def no_room(*inputs):
        raise MemoryError

    ops.array, ops.free_memory = no_room, lambda: 5 * 10**8
    with pytest.raises(APIError, match=r"out of memory on cpu: .* GB, did not fit, where 0.5 GB are free"):
        load(session, str(make_model(seed=3)[0]))
    ops.array = reference.array
    assert load(session, str(make_model(seed=3)[0])).config.num_hidden_layers
    session.worker.close(finish=False)


def test_a_tokenizer_is_made_once(sessions):
    session, _ = sessions
    base = load(session, model())
    assert session.tokenizer(base) is session.tokenizer(base)
    assert session.tokenizer(base).decode(session.tokenizer(base).encode("Grüße 🙂")) == "Grüße 🙂"


def test_jobs_of_a_session_run_in_its_thread_and_sessions_do_not_wait_for_each_other(sessions):
    first, second = sessions
    go_on = threading.Event()
    waiting = first.submit(go_on.wait)
    assert second.submit(threading.current_thread).result(timeout=10) is second.worker.thread
    assert not waiting.future().done()
    go_on.set()
    assert waiting.result(timeout=10)


def test_the_thread_of_a_session_that_nobody_holds_ends(tmp_path):
    session = Session(reference, tmp_path)
    thread = session.worker.thread
    del session
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_what_was_asked_of_a_session_is_finished_though_nobody_holds_it(tmp_path):
    session = Session(reference, tmp_path)
    go_on, done = threading.Event(), []
    session.submit(go_on.wait)
    last = session.submit(lambda session=session: done.append(session.store.root))
    del session
    go_on.set()
    last.result(timeout=10)
    assert done == [tmp_path]


def test_memory_that_runs_out_in_any_call_is_told_with_what_is_free(tmp_path):
    ops = SimpleNamespace(**vars(reference))
    ops.free_memory = lambda: 10**9
    session = Session(ops, tmp_path)

    def no_room():
        raise MemoryError

    with pytest.raises(APIError, match=r"out of memory on cpu: this call did not fit, where 1.0 GB are free"):
        session.submit(no_room).result(timeout=30)
    session.worker.close(finish=False)
