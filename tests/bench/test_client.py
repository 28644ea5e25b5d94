"""One request, against a server whose every byte has a known time: the clock is virtual, times exact."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.errors import ConfigError
from minivllm_bench.client import Client, UnreachableError, shown
from minivllm_bench.prompts import Conversation, TextSource
from minivllm_bench.records import RequestRecord
from minivllm_bench.workloads import Session, Turn

from .fake_server import DONE, FakeServer, Reply, answer, connected, event, text_event, usage_event
from .virtual_time import run

END = text_event("", finish_reason="length")


def conversation(text: str = "say it") -> Conversation:
    talk = Conversation(TextSource(0), 0, Session(()))
    talk.ask(Turn(7, 1, text))
    return talk


def ask(
    reply: Reply | FakeServer, num_tokens: int = 4, *, sent: float = 0.0, **client_settings: Any
) -> tuple[RequestRecord, str]:
    """The record and the text of one request, sent at ``sent``."""
    server = reply if isinstance(reply, FakeServer) else FakeServer(lambda body: reply)

    async def work() -> tuple[RequestRecord, str]:
        loop = asyncio.get_running_loop()
        async with connected(server, **client_settings) as client:
            await asyncio.sleep(sent)
            record = RequestRecord(0, 0, loop.time(), 7)
            text = await client.ask(conversation(), num_tokens, record, loop.time)
        return record, text

    return run(work())


seconds = st.floats(0.001, 1000)


@given(st.lists(seconds, min_size=1, max_size=8), seconds, st.booleans())
@settings(max_examples=40)
def test_times_are_those_of_the_server(gaps: list[float], sent: float, is_chat: bool) -> None:
    server = FakeServer(lambda body: answer(body, gaps))
    endpoint = "chat" if is_chat else "completions"
    record, text = ask(server, len(gaps), sent=sent, endpoint=endpoint)
    times = [sent + gap for gap in itertools.accumulate(gaps)]
    assert record.chunk_times == pytest.approx(times, rel=1e-12, abs=1e-6)
    assert record.finished == record.chunk_times[-1]
    assert record.ttft == pytest.approx(gaps[0], rel=1e-9, abs=1e-6)
    assert record.e2e == pytest.approx(sum(gaps), rel=1e-9, abs=1e-6)
    assert record.inter_token_latencies == pytest.approx(gaps[1:], rel=1e-9, abs=1e-6)
    assert (record.prompt_tokens, record.output_tokens) == (2, len(gaps))
    assert (record.status, record.error) == (200, None)
    assert len(text.split()) == len(gaps)
    if len(gaps) > 1:
        assert record.tpot == pytest.approx(sum(gaps[1:]) / (len(gaps) - 1), rel=1e-9, abs=1e-6)


def test_several_tokens_in_a_chunk() -> None:
    """Five tokens in two chunks: the server's count is right, and the gap is one."""
    record, text = ask(
        Reply(
            [(1, text_event(" a b")), (2, text_event(" c d e")), (0, END), (0, usage_event(3, 5, 2) + DONE)]
        )
    )
    assert text == " a b c d e"
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (3, 2, 5)
    assert record.chunk_times == [1, 3]
    assert record.tpot == pytest.approx(2 / 4)


def test_without_usage_chunks_are_counted() -> None:
    record, _ = ask(Reply([(1, text_event(" a")), (1, text_event(" b")), (0, END), (0, DONE)]))
    assert (record.prompt_tokens, record.output_tokens) == (7, 2)
    assert record.error is None


def test_usage_in_every_chunk() -> None:
    both = [
        (1, event({"choices": [{"text": f" {n}"}], "usage": {"prompt_tokens": 9, "completion_tokens": n}}))
        for n in (1, 2, 3)
    ]
    record, _ = ask(Reply([*both, (0, DONE)]))
    assert (record.prompt_tokens, record.output_tokens) == (9, 3)


def test_thoughts_are_tokens_and_not_the_answer() -> None:
    parts = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"reasoning": "so"},
             {"content": "yes"}, {"content": None}]  # fmt: skip
    events = [(1.0, event({"choices": [{"delta": delta}], "usage": None})) for delta in parts]
    record, text = ask(Reply([*events, (0, DONE)]), endpoint="chat")
    assert text == "yes"
    assert record.chunk_times == [2, 3, 4]


def test_an_end_without_done() -> None:
    """A finish reason is enough; the end is that of the stream."""
    record, _ = ask(Reply([(1, text_event(" a", finish_reason="length")), (2, b": bye\n\n")]))
    assert record.error is None
    assert record.finished == 3


@given(st.data())
@settings(max_examples=40)
def test_bytes_may_be_cut_anywhere(data: st.DataObject) -> None:
    """CRLF, comments between events, and pieces that end in the middle of a character."""
    newline = data.draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    words = [" é", " 好", " c", " 👍"]
    stream = b": hello\n\n" + b": ping\n\n".join([*map(text_event, words), usage_event(3, 4), DONE])
    stream = stream.replace(b"\n", newline)
    cuts = data.draw(st.lists(st.integers(1, len(stream) - 1), unique=True, max_size=12).map(sorted))
    pieces = [stream[start:end] for start, end in itertools.pairwise([0, *cuts, len(stream)])]
    record, text = ask(Reply([(1.0, piece) for piece in pieces]))
    assert text == "".join(words)
    assert (record.error, record.output_tokens, len(record.chunk_times)) == (None, 4, 4)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply([(1, text_event(" a"))], is_cut=True), "the connection was lost"),
        (Reply([(1, text_event(" a"))]), "the stream ended before the answer was complete"),
        (Reply([(1, text_event(" a")), (0, b"data: {\"choices\": [{\n\n")]), 'OpenAI\'s: {"choices": [{'),
        (Reply([(1, text_event(" a")), (0, event({"choices": 5}))]), 'OpenAI\'s: {"choices": 5}'),
        (Reply([(1, text_event(" a")), (0, event(b"\xff"))]), "not an event of OpenAI's"),
        (Reply([(1, text_event(" a")), (0, event({"error": {"message": "no\nspace"}}))]), "no space"),
        (Reply([(1, text_event(" a")), (0, event({"error": "broken"})), (0, DONE)]), "broken"),
        (Reply([(1, text_event(" a"))], hangs=True), "no complete answer within 60 s"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_the_middle(reply: Reply, message: str) -> None:
    record, _ = ask(reply, timeout=60)
    assert record.error is not None
    assert message in record.error
    assert "\n" not in record.error
    assert (record.chunk_times, record.output_tokens, record.status) == ([1], 1, 200)
    assert record.finished == (60 if reply.hangs else 1)
    assert not record.is_complete


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply([(1, b'{"error": {"message": "no such\\nmodel"}}')], 404), "HTTP 404: no such model"),
        (Reply([(1, b'{"error": "model not found"}')], 404), "HTTP 404: model not found"),
        (Reply([(1, b'{"object": "error", "message": "bad key"}')], 401), "HTTP 401: bad key"),
        (Reply([(1, b'{"detail": [{"loc": ["n"]}]}')], 422), "HTTP 422: [{'loc': ['n']}]"),
        (Reply([(1, b"<h1>Oh no</h1>\n" * 100)], 500), "HTTP 500: <h1>Oh no</h1> <h1>Oh no</h1>"),
        (Reply([(1, b"")], 503), "HTTP 503"),
        (Reply([(1, b"{}")], 200, "application/json"), "no stream of events came back but application/json"),
        (Reply([(1, b"")], 200), "the stream ended before"),
    ],
)
def test_what_is_no_answer_at_all(reply: Reply, message: str) -> None:
    record, text = ask(reply)
    assert record.error is not None
    assert record.error.startswith(message)
    assert len(record.error) < 320
    assert (record.status, record.finished, record.chunk_times, text) == (reply.status, 1, [], "")


def test_a_server_that_never_answers() -> None:
    record, _ = ask(Reply(hangs=True), timeout=2.5)
    assert record.error == "no complete answer within 2.5 s"
    assert record.finished == 2.5


def test_what_comes_after_the_end_does_not_matter() -> None:
    record, _ = ask(Reply([(1, text_event(" a")), (1, DONE), (5, event(b"junk"))], is_cut=True))
    assert (record.error, record.finished) == (None, 2)


def test_cancelled_in_the_middle() -> None:
    """The record keeps what had come, unfinished, and the server sees that the client has left."""
    server = FakeServer(lambda body: Reply([(1, text_event(" a")), (1, text_event(" b"))], hangs=True))

    async def work() -> RequestRecord:
        loop = asyncio.get_running_loop()
        async with connected(server) as client:
            record = RequestRecord(0, 0, 0.0, 7)
            task = asyncio.create_task(client.ask(conversation(), 4, record, loop.time))
            await asyncio.sleep(5)
            assert server.num_under_way == 1
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(1)
            assert server.num_under_way == 0
            return record

    record = run(work())
    assert (record.chunk_times, record.output_tokens, record.finished, record.error) == (
        [1, 2],
        2,
        None,
        None,
    )


def test_the_body_and_its_headers() -> None:
    server = FakeServer()
    ask(server, 3, api_key="abc", temperature=0.5, extra_body={"top_k": 5, "ignore_eos": None})
    assert server.bodies == [
        {
            "model": "fake", "prompt": "say it", "max_tokens": 3, "temperature": 0.5, "stream": True,
            "stream_options": {"include_usage": True}, "top_k": 5,
        }
    ]  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer abc"
    ask(server, 3, endpoint="chat")
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "say it"}]
    assert server.bodies[1]["ignore_eos"] is True
    assert "Authorization" not in server.headers[1]


def find_model(models: Reply | None) -> str:
    async def work() -> str:
        async with connected(FakeServer(models=models), model=None, timeout=3) as client:
            return await client.find_model()

    return run(work())


def test_the_first_model_is_taken() -> None:
    assert find_model(None) == "fake"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (Reply([(0, b'{"error": {"message": "bad key"}}')], 401), "http://fake/v1/models: HTTP 401: bad key"),
        (Reply([(0, b"<html>")]), "lists no model: name one with --model"),
        (Reply([(0, b'{"data": []}')]), "lists no model"),
        (Reply([(0, b'{"data": null}')]), "lists no model"),
        (Reply(hangs=True), "no complete answer within 3 s"),
    ],
)
def test_a_list_of_models_that_is_none(models: Reply, message: str) -> None:
    with pytest.raises(UnreachableError, match="http://fake/v1/models") as error:
        find_model(models)
    assert message in str(error.value)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://x:99999", "http://x:y"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:8000, got"):
        Client(url)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1", "https://h/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/api?x=1#y", "https://h/api/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_urls_with_and_without_v1(url: str, base: str) -> None:
    assert Client(url).base_url == base


def test_a_shown_url_has_no_password() -> None:
    assert shown("https://user:pass@h:1/v1") == "https://h:1/v1"
