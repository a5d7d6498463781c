"""model/sums.py: a file that was altered or cut off after it was saved is named when its folder is loaded."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_flat, saved

from minitinker.engine.checkpoints import CheckpointStore, SavedState
from minitinker.errors import BadRequestError, NotFoundError
from minitinker.model.adapter import adapter_spec
from minitinker.model.sums import METADATA, check_sum, check_sums, sha256_of
from minitinker.model.weights import load_base_model


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    """A folder that save_weights_external wrote."""
    root = tmp_path_factory.mktemp("external")
    base = load_base_model(str(saved(root / "base")))
    spec = adapter_spec(base.config, 2, True, True, True)
    store = CheckpointStore(root / "storage")
    return store.find(
        store.save_merged("run", "a", SavedState(spec, random_flat(spec, 0), base.name), base),
        ["external_weights"],
    )


def test_a_file_is_held_against_its_checksum(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(NotFoundError, match=rf"{path} does not exist; by {METADATA} it must"):
        check_sum(path, sha256_of("content"))
    path.write_text("content")
    check_sum(path, sha256_of("content"))
    path.write_text("contend")
    with pytest.raises(
        BadRequestError, match=rf"{path} is not as it was saved: it has 7 bytes with the sha256"
    ):
        check_sum(path, sha256_of("content"))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), cut=st.booleans())
def test_an_altered_or_cut_off_file_of_a_merged_model_is_named_when_it_is_loaded(
    data, cut, external, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(external, folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != METADATA)
    assert "model.safetensors" in names
    path = folder / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if cut:
        del content[at:]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(BadRequestError) as caught:
        load_base_model(str(folder))
    assert str(path) in str(caught.value)


def test_a_merged_model_that_is_whole_is_loaded_and_one_that_lacks_a_file_is_not(external, tmp_path):
    load_base_model(str(external))
    shutil.copytree(external, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=rf"tokenizer.json does not exist; by {METADATA} it must"):
        load_base_model(str(tmp_path / "model"))


def test_a_change_of_ones_own_is_kept_as_the_message_says(external, tmp_path):
    folder = shutil.copytree(external, tmp_path / "model")
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(
        BadRequestError, match=rf"remove generation_config.json from the sha256 of {METADATA}"
    ):
        load_base_model(str(folder))
    fields = json.loads((folder / METADATA).read_text())
    del fields["sha256"]["generation_config.json"]
    (folder / METADATA).write_text(json.dumps(fields))
    load_base_model(str(folder))


@pytest.mark.parametrize("text", ["{}", '{"sha256": {}}', '{"sha256": {"minitinker.json": "a"}}', None])
def test_where_there_are_no_sums_nothing_is_checked(text, tmp_path):
    if text is not None:
        (tmp_path / METADATA).write_text(text)
    check_sums(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ('{"sha256": ["a"]}', "sha256 is .'a'.; it must be an object"),
        ('{"sha256": {"a": 1}}', "sha256 has 1 for 'a'; it must give a file's sum by its name"),
        ('{"sha256": {"../a": "b"}}', "sha256 has 'b' for '../a'; it must give a file's sum by its name"),
    ],
)
def test_sums_that_cannot_be_are_named(text, said, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_text("")
    (tmp_path / "folder" / METADATA).write_text(text)
    with pytest.raises(BadRequestError, match=rf"{METADATA}.*{said}"):
        check_sums(tmp_path / "folder")
