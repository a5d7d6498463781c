"""losses.py: the ratio of a whole sequence, and thresholds token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import CONTEXT, FIXED, VOCAB, evaluated, numbers, seeds

from minitinker.errors import BadRequestError
from minitinker.hosted import HostedServiceError
from minitinker.losses import check_data, find_loss
from minitinker.types import Datum, ModelInput


@FIXED
@given(n=st.integers(1, 9), seed=seeds)
def test_gspo_with_one_advantage_for_all_is_the_gradient_of_the_sequences_loss(n, seed):
    """By differences of |M| min(s A, clip(s) A), which stops no gradient."""
    lp, inputs = numbers("gspo", (n, 1), seed, apart=0.3)
    mask = inputs["sequence_ratio_mask"] != 0
    advantage = inputs["advantages"][0, 0]
    inputs["advantages"] = np.where(mask, advantage, 0)
    low, high = (find_loss("gspo", None)[1][key] for key in ("clip_low_threshold", "clip_high_threshold"))

    def whole(lp):
        s = np.exp((lp - inputs["logprobs"])[mask].mean())
        return -mask.sum() * min(s * advantage, np.clip(s, low, high) * advantage)

    _, dlp, _ = evaluated("gspo", lp, inputs, find_loss("gspo", None)[1])
    step = 1e-6
    for i in range(n):
        e = np.zeros_like(lp)
        e[i] = step
        expected = (whole(lp + e) - whole(lp - e)) / (2 * step)
        assert dlp[i, 0] == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_the_ratio_of_a_sequence_is_the_geometric_mean_over_the_marked_tokens():
    lp = np.log(np.array([[0.5], [0.2], [0.9]]))
    inputs = {
        "logprobs": np.log(np.array([[0.25], [0.1], [0.1]])),
        "advantages": np.array([[1.0], [-2.0], [3.0]]),
        "sequence_ratio_mask": np.array([[1.0], [1.0], [0.0]]),
    }
    config = find_loss("gspo", {"clip_high_threshold": 9.0})[1]
    loss, dlp, _ = evaluated("gspo", lp, inputs, config)
    np.testing.assert_allclose(loss[:, 0], [-2.0, 4.0, -6.0])  # s is 2, and the third token has it too
    np.testing.assert_allclose(dlp, loss)


def test_clipping_a_sequence_drops_or_keeps_all_its_tokens_of_one_sign():
    lp, q = np.zeros((4, 1)), np.full((4, 1), -1.0)  # s is e, far above 1.2
    inputs = {"logprobs": q, "advantages": np.array([[1.0], [2.0], [-1.0], [-2.0]]), "sequence_ratio_mask": q}
    _, dlp, _ = evaluated("gspo", lp, inputs, find_loss("gspo", None)[1])
    np.testing.assert_allclose(dlp[:, 0], [0, 0, np.e, 2 * np.e])


RL = {"target_tokens": [1, 2], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("name", "further", "said"),
    [
        ("gspo", {}, ["'sequence_ratio_mask'"]),
        ("gspo", {"sequence_ratio_mask": [0, 0]}, ["'sequence_ratio_mask'", "0 everywhere", "sampled"]),
        ("ppo", {"clip_low_threshold": [0.8, 1.3]}, ["clip_low_threshold is 1.3 at token 1", "1.2"]),
        ("importance_sampling", {"clip_low_threshold": [0.8, 0.8]}, ["'clip_low_threshold'"]),
    ],
)
def test_a_mask_or_threshold_that_makes_no_sense_is_refused(name, further, said):
    bad = Datum(ModelInput.from_ints([3, 4]), RL | further)
    with pytest.raises(BadRequestError) as caught:
        check_data([bad], name, find_loss(name, None)[1], VOCAB, CONTEXT)
    for words in ("data[0]", *said):
        assert words in str(caught.value)


def test_a_sequence_without_advantage_needs_no_mark():
    datum = Datum(
        ModelInput.from_ints([3, 4]), RL | {"advantages": [0.0, 0.0], "sequence_ratio_mask": [0, 0]}
    )
    (example,) = check_data([datum], "gspo", find_loss("gspo", None)[1], VOCAB, CONTEXT)
    loss, dlp, _ = evaluated("gspo", np.array([[-900.0], [-1.0]]), example.inputs, find_loss("gspo", None)[1])
    assert not loss.any()
    assert not dlp.any()


@pytest.mark.parametrize("name", ["ppo", "cispo"])
def test_thresholds_given_token_by_token_stand_in_for_those_of_the_config(name):
    config = find_loss(name, None)[1]
    inputs = RL | {"clip_low_threshold": [0.1, 0.9], "clip_high_threshold": [5.0, 1.5]}
    (example,) = check_data([Datum(ModelInput.from_ints([3, 4]), inputs)], name, config, VOCAB, CONTEXT)
    lp = np.array([[0.0], [0.0]])  # r is e
    _, dlp, _ = evaluated(name, lp, example.inputs, config)
    np.testing.assert_allclose(dlp[:, 0], [-np.e, 0 if name == "ppo" else -1.5], rtol=1e-7)


@pytest.mark.parametrize("name", ["stable_reinforce", "custom"])
def test_a_loss_of_the_hosted_service_is_refused_with_what_to_do_instead(name):
    with pytest.raises(HostedServiceError, match=f"'{name}' belongs to the hosted service; on one machine"):
        find_loss(name, None)
