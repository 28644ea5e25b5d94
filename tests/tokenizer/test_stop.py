"""Stop strings against a search in the whole text."""

from __future__ import annotations

from typing import SupportsIndex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.tokenizer.stop import StopStringMatcher

words = st.text("ab", min_size=1, max_size=6) | st.text("abc", min_size=1, max_size=4)
stop_lists = st.lists(words, min_size=0, max_size=4)
chunked_texts = st.lists(st.text("abc", max_size=5), max_size=15)


def expected_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """By brute force: read on until the text so far ends with a stop string; cut the longest off."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def longest_beginning_of_a_stop(text: str, stops: list[str]) -> int:
    """By brute force: how many last characters of ``text`` might become a stop string."""
    return max(
        (
            n
            for n in range(len(text) + 1)
            if any(len(stop) > n and stop.startswith(text[len(text) - n :]) for stop in stops)
        ),
        default=0,
    )


@given(chunked_texts, stop_lists)
@settings(max_examples=400)
def test_finds_what_a_search_in_the_whole_text_finds(chunks: list[str], stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    shown = "".join(matcher.push(chunk) for chunk in chunks) + matcher.flush()
    assert (shown, matcher.is_stopped) == expected_text("".join(chunks), stops)


@given(chunked_texts, stop_lists)
@settings(max_examples=400)
def test_holds_back_no_more_than_it_must(chunks: list[str], stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    text = shown = ""
    for chunk in chunks:
        text += chunk
        shown += matcher.push(chunk)
        if matcher.is_stopped:
            break
        assert len(text) - len(shown) == longest_beginning_of_a_stop(text, stops)
        assert text.startswith(shown)


@given(st.text("ab", min_size=1, max_size=40), st.integers(0, 60))
@settings(max_examples=400)
def test_long_repetitive_stop_strings(stop: str, num_before: int) -> None:
    matcher = StopStringMatcher([stop])
    text = stop[:num_before] * 2 + stop + "tail"
    shown = "".join(matcher.push(char) for char in text)
    assert (shown, matcher.is_stopped) == (text[: text.index(stop)], True)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    for chunks in (["xabcd"], list("xabcd")):
        matcher = StopStringMatcher(["abcd", "bc"])
        assert "".join(matcher.push(chunk) for chunk in chunks) == "xa"
        assert matcher.is_stopped
        assert matcher.push("more") == matcher.flush() == ""


@pytest.mark.parametrize("stops", [["abc", "bc"], ["bc", "abc"]])
def test_of_stop_strings_that_end_together_the_longest_wins(stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    assert matcher.push("xab") + matcher.push("cd") == "x"
    assert matcher.is_stopped


class CountingStr(str):
    """Counts how often one of its characters is looked at."""

    num_looks = 0

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        self.num_looks += 1
        return super().__getitem__(key)


@pytest.mark.parametrize("text", ["a" * 20_000, "ab" * 10_000, "aab" * 7_000])
def test_a_huge_stop_string_makes_nothing_slow(text: str) -> None:
    stops = [CountingStr("a" * 10**6), CountingStr("ab" * 10**5 + "c"), CountingStr("aa" * 10**3 + "b")]
    matcher = StopStringMatcher(stops)
    shown = "".join(matcher.push(text[i : i + 4]) for i in range(0, len(text), 4))
    assert shown + matcher.flush() == text
    assert all(0 < stop.num_looks < 8 * len(text) for stop in stops)
