"""Detokenising while tokens arrive, and stop texts."""

from __future__ import annotations

import pytest

from tuneloop.engines.text import Detokenizer, StopTexts


def from_bytes(ids) -> str:
    return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["plain", "é ü ß", "日本語", "👩‍👩‍👧 family", "", "a\ufffdb"])
def test_pieces_add_up_to_the_whole_text(text):
    detokenizer = Detokenizer(from_bytes)
    pieces = [detokenizer.push(byte) for byte in text.encode()] + [detokenizer.flush()]
    assert "".join(pieces) == text


def test_a_character_is_held_back_until_it_is_whole():
    detokenizer = Detokenizer(from_bytes)
    assert [detokenizer.push(byte) for byte in "aé".encode()] == ["a", "", "é"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    detokenizer = Detokenizer(from_bytes)
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_stop_text_cuts_the_reply_before_it():
    stops = StopTexts(["END"])
    assert stops.push("one END two") == "one "
    assert stops.is_met


def test_a_stop_text_is_found_across_pieces_and_nothing_of_it_is_shown():
    stops = StopTexts(["\n\nUser:"])
    shown = [stops.push(piece) for piece in ["Yes.", "\n", "\nUs", "er", ": more"]]
    assert "".join(shown) == "Yes."
    assert stops.is_met


def test_what_only_looked_like_a_stop_text_is_shown_after_all():
    stops = StopTexts(["END"])
    assert [stops.push("E"), stops.push("N"), stops.push("T")] == ["", "", "ENT"]
    assert stops.push(" EN") == " "
    assert stops.flush() == "EN"
    assert not stops.is_met


def test_the_first_of_several_stop_texts_counts():
    stops = StopTexts(["two", "one"])
    assert stops.push("zero one two") == "zero "
