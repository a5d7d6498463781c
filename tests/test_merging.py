"""merging.py: a checkpoint, by its path or its folder, becomes a model of its own."""

import numpy as np
import pytest
from small_clients import model, saved, train
from transformers import AutoModelForCausalLM

import minitinker
from minitinker.errors import BadRequestError, NotFoundError


def test_a_merged_checkpoint_says_what_the_adapter_said(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path / "home"))
    service = minitinker.ServiceClient()
    client = service.create_lora_training_client(model(), rank=4, seed=0)
    train(client)
    path = client.save_weights_for_sampler("done").result().path
    by_path = minitinker.merge(path, tmp_path / "by-path")
    by_folder = minitinker.merge(saved(tmp_path / "home", path), tmp_path / "by-folder")
    prompt = minitinker.ModelInput.from_ints([1, 2, 3, 4, 5])
    expected = client.save_weights_and_get_sampling_client().compute_logprobs(prompt).result()
    for folder in (by_path, by_folder):
        merged = service.create_sampling_client(base_model=str(folder)).compute_logprobs(prompt).result()
        np.testing.assert_allclose(merged[1:], expected[1:], atol=1e-4)
        AutoModelForCausalLM.from_pretrained(folder)
    service.close()


def test_a_path_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    with pytest.raises(NotFoundError, match="tinker://run/weights/nothing"):
        minitinker.merge("tinker://run/weights/nothing", tmp_path / "out")


@pytest.mark.parametrize("folder", ["", None, 3, b"a"])
def test_what_is_no_folder_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    with pytest.raises(BadRequestError, match=r"folder is .*; it must be the path of a folder"):
        minitinker.merge("tinker://run/weights/nothing", folder)
