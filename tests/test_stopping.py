from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitinker.engine.stopping import stop_rule
from minitinker.errors import BadRequestError

EOS = (7, 9)
LETTERS = "ab é日🙂"  # of one, two, three and four bytes


def decode_bytes(pieces):
    return b"".join(pieces).decode(errors="replace")


def rule(stop, decode=None):
    return stop_rule(stop, EOS, decode, vocab_size=16)


def test_none_stops_at_the_end_tokens_alone():
    assert [token for token in range(16) if rule(None).stops([1, token])] == [7, 9]


def test_an_empty_list_stops_at_nothing():
    assert not any(rule([]).stops([1, token]) for token in range(16))


def test_stop_tokens_are_heeded_beside_the_end_tokens():
    assert [token for token in range(16) if rule([3, 15]).stops([token])] == [3, 7, 9, 15]


def test_stop_strings_are_heeded_beside_the_end_tokens():
    rule_of_two = rule(["b", "cd"], lambda tokens: "".join("abcdefgh"[token] for token in tokens))
    assert rule_of_two.stops([0, 1])
    assert not rule_of_two.stops([0, 2])
    assert rule_of_two.stops([0, 2, 3])
    assert rule_of_two.stops([0, 7])


def test_one_string_is_a_list_of_one():
    assert rule("ab") == rule(["ab"])


def test_only_the_last_token_is_a_stop_token():
    assert not rule([3]).stops([3, 4])


@pytest.mark.parametrize("stop", ["", ["a", ""], [16], [-1], ["a", 3], [1.5], [None]])
def test_what_cannot_stop_anything_is_refused(stop):
    with pytest.raises(BadRequestError, match=r"SamplingParams\.stop is .*; it must be") as error:
        rule(stop)
    assert repr(stop) in str(error.value)


@st.composite
def cut_text(draw):
    """A text as pieces of bytes, cut anywhere, also inside a character: what tokens may look like."""
    whole = draw(st.text(LETTERS, min_size=1, max_size=12)).encode()
    cuts = sorted(draw(st.sets(st.integers(1, len(whole)), max_size=len(whole))) | {0, len(whole)})
    return [whole[start:end] for start, end in pairwise(cuts)]


@given(pieces=cut_text(), strings=st.lists(st.text(LETTERS, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_sample_stops_at_the_first_token_whose_text_holds_a_stop_string(pieces, strings):
    stops = stop_rule(strings, (), decode_bytes, vocab_size=16).stops
    for end in range(1, len(pieces) + 1):
        expected = any(string in decode_bytes(pieces[:end]) for string in strings)
        assert stops(pieces[:end]) == expected
        if expected:
            break


def test_a_long_sample_is_not_decoded_again_and_again():
    decoded = []

    def decode(tokens):
        decoded.append(len(tokens))
        return "x" * len(tokens)

    assert not stop_rule("stop", (), decode, vocab_size=16).stops([1] * 10_000)
    assert decoded == [8]
