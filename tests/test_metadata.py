"""engine/metadata.py: what is written comes back, and what was altered is refused.

Fields that cannot be are in test_saved_state.py, where a whole checkpoint is read.
"""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitinker.engine import metadata as module
from minitinker.engine.metadata import Metadata, metadata_text, read_metadata
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.adapter import AdapterSpec
from minitinker.model.sums import METADATA

SPEC = AdapterSpec(2, {"lm_head": (10, 4)})
PLAIN = Metadata("weights", datetime(2026, 1, 2, tzinfo=UTC), "owner/name", SPEC, 3, True)
TIMES = st.datetimes(timezones=st.just(UTC))


def written(folder, metadata=PLAIN):
    folder.mkdir(exist_ok=True)
    (folder / METADATA).write_text(metadata_text(metadata))
    return folder


def changed(folder, **fields):
    path = folder / METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@given(
    created=TIMES,
    expires=st.none() | TIMES,
    base=st.text(),
    notes=st.none() | st.dictionaries(st.text(), st.text()),
    public=st.booleans(),
    alpha=st.integers(1, 100) | st.floats(0.1, 100),
    sums=st.dictionaries(st.text(min_size=1), st.text()),
)
def test_metadata_come_back_as_they_were(
    created, expires, base, notes, public, alpha, sums, tmp_path_factory
):
    sums.pop(METADATA, None)
    spec = AdapterSpec(3, {"a": (1, 2), "b": (3, 4)}, alpha)
    metadata = Metadata("weights", created, base, spec, 5, False, notes, expires, public, sums)
    folder = written(tmp_path_factory.getbasetemp() / "metadata", metadata)
    assert read_metadata(folder) == metadata


@pytest.mark.parametrize(
    "fields", [{"alpha": 33}, {"step": 4}, {"base_model": "other"}, {"expires": None, "public": True}]
)
def test_a_change_that_makes_sense_is_noticed_all_the_same(fields, tmp_path):
    changed(written(tmp_path), **fields)
    with pytest.raises(BadRequestError, match=rf"{METADATA} is not as it was saved.*remove {METADATA} from"):
        read_metadata(tmp_path)


def test_a_change_of_ones_own_is_kept_as_the_message_says(tmp_path):
    changed(written(tmp_path), base_model="moved", sha256={})
    assert read_metadata(tmp_path).base_model == "moved"


def test_the_order_and_the_spaces_of_the_file_do_not_matter(tmp_path):
    path = written(tmp_path) / METADATA
    path.write_text(json.dumps(dict(sorted(json.loads(path.read_text()).items()))))
    assert read_metadata(tmp_path) == PLAIN


@pytest.mark.parametrize("time", ["yesterday", "2026-01-31T12:00:00", 7, True])
def test_a_time_that_is_none_or_has_no_zone_is_named(time, tmp_path):
    changed(written(tmp_path), expires=time, sha256={})
    with pytest.raises(BadRequestError, match=rf"expires is {json.dumps(time)}; it must be a time"):
        read_metadata(tmp_path)


def test_a_folder_without_metadata_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotFoundError, match=rf"{METADATA} does not exist"):
            read_metadata(folder)


def test_what_expires_has_expired_at_that_moment_and_not_before(monkeypatch):
    moment = datetime(2026, 3, 4, tzinfo=UTC)
    metadata = replace(PLAIN, expires_at=moment)
    for seconds, expired in ((-1, False), (0, True), (1, True)):
        monkeypatch.setattr(module, "now", lambda seconds=seconds: moment + timedelta(seconds=seconds))
        assert metadata.expired == expired
        assert not PLAIN.expired
