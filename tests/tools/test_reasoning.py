"""Reasoning split off, wherever the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.tools.reasoning import ReasoningSplitter

from .reading import splits

CASES = [
    (False, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    (False, " \n<think>a\n\nb</thin</think>c</think>", "a\n\nb</thin", "c</think>"),
    (False, "<think>a", "a", ""),
    (False, "<think>a \n</th", "a \n</th", ""),
    (False, "<think>\n\n</think>\n\nYes.", "", "Yes."),
    (False, "Yes.", "", "Yes."),
    (False, " \nYes <think>no</think>", "", " \nYes <think>no</think>"),
    (False, "<thin", "", "<thin"),
    (False, " \n", "", " \n"),
    (False, "", "", ""),
    (True, "Hm. < 5\n</think>\nYes.\n", "Hm. < 5", "Yes.\n"),
    (True, "<think>\nHm.</think>Yes.", "Hm.", "Yes."),
    (True, "<thank>you", "<thank>you", ""),
    (True, " </think>Yes.", "", "Yes."),
    (True, "<th", "<th", ""),
    (True, "</</think>", "</", ""),
]


def split(is_open: bool, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(is_open=is_open)
    reasoning, answer = zip(*map(splitter.push, pieces), splitter.finish(), strict=True)
    return "".join(reasoning), "".join(answer)


@pytest.mark.parametrize(("is_open", "text", "reasoning", "answer"), CASES)
def test_every_split(is_open: bool, text: str, reasoning: str, answer: str) -> None:
    for pieces in splits(text):
        assert split(is_open, pieces) == (reasoning, answer)


PIECES = ["<think>", "</think>", "<", "</", "thi", ">", " ", "\n", "a"]


@given(is_open=st.booleans(), parts=st.lists(st.sampled_from(PIECES), max_size=15), seed=st.integers(0, 99))
def test_any_text(is_open: bool, parts: list[str], seed: int) -> None:
    text = "".join(parts)
    reasoning, answer = split(is_open, [text])
    for pieces in splits(text, seed):
        assert split(is_open, pieces) == (reasoning, answer)
    # By another way: with what was between the tags, the whole text again.
    rest = text.lstrip()
    opened = is_open or rest.startswith("<think>")
    if not opened:
        assert (reasoning, answer) == ("", text)
        return
    inside, tag, after = rest.removeprefix("<think>").partition("</think>")
    assert (reasoning, answer) == (inside.strip(), after.lstrip() if tag else "")


@pytest.mark.parametrize(
    "text", [" " * 200_000 + "<", "<think>a" + "\n" * 200_000, "<think>" + "</thin" * 50_000]
)
def test_hostile_texts(text: str) -> None:
    whole = split(False, [text])
    assert split(False, list(text)) == whole


def test_nothing_is_held_back() -> None:
    splitter = ReasoningSplitter(is_open=True)
    for char in "Hm.":
        assert splitter.push(char) == (char, "")
    splitter.push("</think>")
    for char in "Yes, <so>":
        assert splitter.push(char) == ("", char)
