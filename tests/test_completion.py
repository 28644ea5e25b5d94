"""One completion's events to text, against the same done in one go by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.completion import CompletionDelta, CompletionStream
from minivllm.request import EngineEvent, FinishReason, RequestMetrics, SamplingParams, TokenLogprob
from minivllm.tokenizer.bpe import byte_level_bpe
from minivllm.tokenizer.tokenizer import Tokenizer

TOKENS = ["a", "b", "c", "ab", "ba", "bc", "Ã", "©"]  # the last two are the halves of "é"
EOS = len(TOKENS)


def make_tokenizer() -> Tokenizer:
    backend = byte_level_bpe(TOKENS, [], split_patterns=[], ignore_merges=False)
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<eos>"})


TOKENIZER = make_tokenizer()

token_lists = st.lists(st.integers(0, len(TOKENS) - 1), min_size=1, max_size=20)
stop_lists = st.lists(st.text("abcé", min_size=1, max_size=5), max_size=3)


def events_of(token_ids: list[int], sizes: list[int], reason: FinishReason) -> list[EngineEvent]:
    """A request's events: so many tokens in each, all that is left in the last."""
    events, position = [], 0
    for size in sizes:
        if position + size < len(token_ids):
            events.append(make_event(token_ids[position : position + size]))
            position += size
    return [*events, make_event(token_ids[position:], reason)]


def make_event(token_ids: list[int], reason: FinishReason | None = None) -> EngineEvent:
    return EngineEvent(
        request_id="r",
        new_token_ids=token_ids,
        logprobs=[TokenLogprob(token_id, -0.5, [(token_id, -0.5)]) for token_id in token_ids],
        finish_reason=reason,
        metrics=None if reason is None else RequestMetrics(finished_time=7.0),
    )


def expected_result(
    token_ids: list[int], stops: list[str], min_tokens: int, reason: FinishReason
) -> tuple[str, int, FinishReason]:
    """Text, number of tokens and finish reason, from decoding ever longer beginnings of the output.

    A beginning's half character is left out, as it isn't known yet what it will be.
    """

    def text_of(n: int) -> str:
        data = TOKENIZER.join_bytes(token_ids[:n])
        return data.decode(errors="replace").removesuffix("\ufffd" if data.endswith(b"\xc3") else "")

    shown_without_stop = len(text_of(min_tokens))
    visible = len(token_ids) - (reason is FinishReason.STOP)
    for n in range(min_tokens + 1, visible + 1):
        text = text_of(n)
        ends = [
            (start + len(stop), start)
            for stop in stops
            for start in range(shown_without_stop, len(text))
            if text.startswith(stop, start)
        ]
        if ends:
            return text[: min(ends)[1]], n, FinishReason.STOP
    return TOKENIZER.decode(token_ids[:visible]), len(token_ids), reason


@given(
    token_ids=token_lists,
    sizes=st.lists(st.integers(0, 4), max_size=20),
    stops=stop_lists,
    min_tokens=st.integers(0, 4),
    reason=st.sampled_from([FinishReason.LENGTH, FinishReason.STOP, FinishReason.ABORT]),
)
@settings(max_examples=400)
def test_collects_what_the_whole_output_says(
    token_ids: list[int], sizes: list[int], stops: list[str], min_tokens: int, reason: FinishReason
) -> None:
    if reason is FinishReason.STOP:
        token_ids = [*token_ids, EOS]
    sampling = SamplingParams(max_tokens=99, min_tokens=min_tokens, stop=tuple(stops), logprobs=1)
    stream = CompletionStream(TOKENIZER, [0, 1], sampling, index=3)
    deltas = [stream.push(event) for event in events_of(token_ids, sizes, reason)]

    text, num_tokens, finish_reason = expected_result(token_ids, stops, min_tokens, reason)
    output = stream.output
    assert (output.index, output.text, output.finish_reason) == (3, text, finish_reason)
    assert output.token_ids == token_ids[:num_tokens]
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert output.metrics.finished_time == 7.0

    assert "".join(delta.text for delta in deltas) == text
    assert [i for delta in deltas for i in delta.token_ids] == output.token_ids
    assert [entry for delta in deltas for entry in delta.logprobs or []] == output.logprobs
    reasons = [delta.finish_reason for delta in deltas if delta.finish_reason is not None]
    assert reasons == [finish_reason]


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    stream = CompletionStream(TOKENIZER, [0], SamplingParams(stop=("bcc",)))
    shown = [stream.push(make_event([token_id])).text for token_id in (0, 1, 0, 1, 2, 2)]
    assert shown == ["a", "", "ba", "", "", ""]
    assert (stream.is_finished, stream.needs_abort) == (True, True)
    assert stream.output.text == "aba"
    assert stream.output.token_ids == [0, 1, 0, 1, 2, 2]
    assert stream.output.finish_reason is FinishReason.STOP


def test_events_after_a_stop_string_add_nothing_but_metrics() -> None:
    stream = CompletionStream(TOKENIZER, [0], SamplingParams(stop=("b",)))
    stream.push(make_event([0, 1, 2]))
    assert stream.push(make_event([2])) == CompletionDelta("", [], None, None)
    assert stream.push(make_event([], FinishReason.ABORT)) == CompletionDelta("", [], None, None)
    assert (stream.output.text, stream.output.token_ids) == ("a", [0, 1])
    assert stream.output.finish_reason is FinishReason.STOP
    assert stream.output.metrics.finished_time == 7.0


def test_what_is_known_at_the_first_token_stays_when_a_stop_string_ends_it() -> None:
    stream = CompletionStream(TOKENIZER, [0], SamplingParams(stop=("b",)))
    first = EngineEvent("id", [0], metrics=RequestMetrics(num_cached_tokens=16))
    stream.push(first)
    stream.push(make_event([1]))
    assert stream.needs_abort
    assert stream.output.metrics.num_cached_tokens == 16


def test_no_abort_is_needed_where_the_engine_has_finished_too() -> None:
    stream = CompletionStream(TOKENIZER, [0], SamplingParams(stop=("b",)))
    delta = stream.push(make_event([1], FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason) == ("", FinishReason.STOP)
    assert not stream.needs_abort


def test_what_was_held_back_is_shown_at_the_end() -> None:
    stream = CompletionStream(TOKENIZER, [0], SamplingParams(stop=("abcc",)))
    assert [stream.push(make_event([i])).text for i in (0, 1, 2)] == ["", "", ""]
    assert stream.push(make_event([], FinishReason.LENGTH)).text == "abc"
    assert stream.output.text == "abc"


def test_the_token_that_ended_the_answer_shows_no_text() -> None:
    """Whether the tokenizer calls it special (EOS) or not (a stop token id that is a word)."""
    for stop_id in (EOS, 4):
        stream = CompletionStream(TOKENIZER, [0], SamplingParams())
        stream.push(make_event([2]))
        delta = stream.push(make_event([1, stop_id], FinishReason.STOP))
        assert (delta.text, delta.token_ids) == ("b", [1, stop_id])
        assert stream.output.text == "cb"


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    stream = CompletionStream(TOKENIZER, [0], SamplingParams())
    assert stream.push(make_event([6])).text == ""
    assert stream.push(make_event([7, 6])).text == "é"
    assert stream.push(make_event([], FinishReason.LENGTH)).text == "\ufffd"


def test_the_output_continues_the_prompt() -> None:
    stream = CompletionStream(TOKENIZER, [0, 6], SamplingParams())
    assert stream.push(make_event([7])).text == "é"


@pytest.mark.parametrize("logprobs", [None, 0])
def test_logprobs_are_there_where_asked_for(logprobs: int | None) -> None:
    stream = CompletionStream(TOKENIZER, [0], SamplingParams(logprobs=logprobs))
    delta = stream.push(make_event([0, 1], FinishReason.LENGTH))
    if logprobs is None:
        assert delta.logprobs is None
        assert stream.output.logprobs is None
    else:
        assert delta.logprobs == stream.output.logprobs
        assert len(delta.logprobs or []) == 2
