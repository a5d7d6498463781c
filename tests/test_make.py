"""tiny/make.py: the random base, the batches, and the page that is written about the model."""

import sys

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitinker.model.weights import load_base_model
from minitinker.tiny import corpus, make, scaffold


def test_the_random_base_has_the_variances_that_training_wants(tmp_path):
    make.write_random_base(tmp_path / "base", seed=0)
    weights = load_base_model(str(tmp_path / "base")).weights
    for name, x in weights.items():
        if x.ndim == 1:
            assert (x == 1).all(), name
        else:
            expected = 1 if "embed_tokens" in name else x.shape[1] ** -0.5
            assert abs(np.std(x) / expected - 1) < 0.05, name


def test_rows_are_whole_documents_and_the_weights_of_a_batch_sum_to_one():
    batches = make.training_batches(seed=0)
    for _ in range(3):
        batch = next(batches)
        assert len(batch) == make.ROWS
        total = 0.0
        for datum in batch:
            tokens, targets = datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].to_numpy()
            assert len(tokens) <= make.ROW_TOKENS
            assert targets[-1] == scaffold.END_ID
            assert tokens[1:] == targets[:-1].tolist()
            total += float(datum.loss_fn_inputs["weights"].to_numpy().sum())
        assert abs(total - 1) < 1e-5


def test_two_steps_make_a_model_that_transformers_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TASKS", {name: corpus.TASKS[name] for name in ("copy", "add")})
    monkeypatch.setattr(make, "HELD_OUT", 2)
    monkeypatch.setenv("MINITINKER_HOME", str(tmp_path))
    monkeypatch.setattr(
        sys, "argv", ["make", "--out", str(tmp_path / "out"), "--steps", "2", "--seeds", "0", "1"]
    )
    make.main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == 920_960
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4e6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("add 3 4\n")) == "add 3 4\n"
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| loss, seed 0 | right | loss, seed 1 | right |" in page
    assert "| copy | `copy " in page
