"""The fields that ask for structured output: what they become, what they refuse, and whom they delay."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest

from minivllm.config import ServerConfig
from minivllm.server import grammar_check
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.server.grammar_check import GrammarChecker
from minivllm.server.grammar_worker import Table, Trial, Verdict
from minivllm.structured import grammar_from_choice, grammar_from_json_object, grammar_from_json_schema
from tests.conftest import wait_until
from tests.server.fakes import ANSWER, FakeEngine, RunningServer, make_tokenizer, run_server

from .schemas import SCHEMAS

TOKENIZER = make_tokenizer()
SCHEMA = SCHEMAS["nested objects"]


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(TOKENIZER, TOKENIZER.vocab_size)
    yield checker
    checker.close()


@pytest.fixture(scope="module")
def server(checker: GrammarChecker) -> Iterator[RunningServer]:
    engine = FakeEngine(TOKENIZER)
    app = create_app(engine, TOKENIZER, ServerConfig(), "fake", ServerState(), grammars=checker)
    with run_server(app) as port:
        server = RunningServer(engine, port)
        yield server
        server.close()


def chat(server: RunningServer, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return server.http.post("/v1/chat/completions", json=body, timeout=60)


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, grammar_from_json_object()),
        (
            {"response_format": json_schema(SCHEMA, strict=True, description="a person")},
            grammar_from_json_schema(SCHEMA),
        ),
        ({"response_format": json_schema(SCHEMA, strict=False)}, grammar_from_json_schema(SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, grammar_from_json_schema(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, grammar_from_json_schema(SCHEMA)),
        ({"structured_outputs": {"regex": "a/[0-9]+\\/\n"}}, "start: /a\\/[0-9]+\\/\\n/"),
        ({"structured_outputs": {"grammar": 'start: "a"+'}}, 'start: "a"+'),
        ({"structured_outputs": {"choice": ["a", "é"]}}, grammar_from_choice(["a", "é"])),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"choice": ["a"]}},
            grammar_from_choice(["a"]),
        ),
    ],
)
def test_every_form_reaches_the_engine(
    server: RunningServer, fields: dict[str, Any], grammar: str | None
) -> None:
    server.engine.requests.clear()
    assert chat(server, **fields, n=2).status_code == 200
    assert [sampling.grammar for _, sampling in server.engine.requests.values()] == [grammar] * 2
    server.engine.requests.clear()
    answer = server.http.post("/v1/completions", json={"prompt": "hi", **fields})
    assert answer.status_code == 200, answer.text
    assert [sampling.grammar for _, sampling in server.engine.requests.values()] == [grammar]


def references(length: int) -> dict[str, Any]:
    """A chain of them: as deep as a stack, in a text that is flat."""
    definitions: dict[str, Any] = {
        f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}, "required": ["a"]}
        for i in range(length)
    }
    return {"$defs": {**definitions, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


HOSTILE: dict[str, dict[str, Any]] = {
    "deep nesting": {"json": nested(80)},
    "very deep nesting": {"json": nested(20_000)},
    "a long chain of references": {"json": references(4000)},
    "a loop of references": {"json": {"allOf": [{"$ref": "#"}, {"type": "object"}]}},
    "a huge enum": {"json": {"enum": [f"value number {i}" for i in range(100_000)]}},
    "many alternatives": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"k{i}_{j}": {"type": "string"}}} for j in range(4)]}
                for i in range(12)
            ]
        }
    },
    "thousands of properties": {"json": {"properties": {f"property {i}": {} for i in range(4000)}}},
    "a regex that doubles": {"regex": "(((a{999}){999}){999}|b{999}){999}c" * 200},
    "terminals that double": {
        "grammar": "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(40)) + 'T40: "a"'
    },
    "a long chain of rules": {
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(12_000)) + 'r12000: "a"'
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused(server: RunningServer, name: str) -> None:
    for _ in range(2):  # the verdict is remembered
        answer = chat(server, structured_outputs=HOSTILE[name])
        assert answer.status_code == 400, answer.text[:200]
        error = answer.json()["error"]
        assert error["param"] == "structured_outputs"
        assert len(error["message"]) < 500
    # The next one finds all as it was.
    assert chat(server, structured_outputs={"choice": [name]}).status_code == 200


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
        {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
        {"type": "string", "pattern": "^(a|b)*a(a|b){30}$"},
    ],
)
def test_what_only_looks_expensive_is_served(server: RunningServer, schema: dict[str, Any]) -> None:
    assert chat(server, response_format=json_schema(schema)).status_code == 200


def test_nothing_is_fetched(server: RunningServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"
        answer = chat(server, response_format=json_schema({"$ref": url}))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "response_format"
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required with"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format.json_schema",
            "needs type 'json_schema', got 'text'",
        ),
        ({"response_format": json_schema([])}, None, ""),
        ({"response_format": json_schema({}, name="no spaces")}, None, "name"),
        ({"response_format": json_schema({"type": "strin"})}, "response_format", "Invalid type: strin"),
        ({"response_format": json_schema({"uniqueItems": True})}, "response_format", "uniqueItems"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "got 2"),
        ({"structured_outputs": {"choice": []}}, None, "choice"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs", "missing"),
        ({"structured_outputs": {"grammar": " "}}, "structured_outputs", "empty"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "isn't JSON"),
        (
            {"structured_outputs": {"json_object": True}},
            "structured_outputs.json_object",
            "not supported",
        ),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "did you mean 'json'?"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"choice": ["a"]}},
            "response_format",
            "can't be combined",
        ),
    ],
)
def test_bad_fields(server: RunningServer, fields: dict[str, Any], param: str | None, message: str) -> None:
    server.engine.requests.clear()
    answer = chat(server, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param
    assert not server.engine.requests


def test_a_grammar_that_is_being_tried_delays_nobody(
    server: RunningServer, checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain requests are answered, and so are those whose grammars are known or tried meanwhile."""
    assert chat(server, structured_outputs={"choice": ["known"]}).status_code == 200
    may_go_on = threading.Event()
    submit = checker._submit

    def hold_some(grammar: str) -> Future[str | None]:
        if "slow" in grammar:
            may_go_on.wait()
        return submit(grammar)

    monkeypatch.setattr(checker, "_submit", hold_some)
    with ThreadPoolExecutor() as clients:
        slow = [
            clients.submit(chat, server, structured_outputs={"choice": [f"slow {i // 2}"]}) for i in range(4)
        ]
        for fields in ({}, {"choice": ["known"]}, {"choice": ["new"]}):
            answer = chat(server, **({"structured_outputs": fields} if fields else {}))
            assert answer.json()["choices"][0]["message"]["content"] == ANSWER
        assert not any(future.done() for future in slow)
        may_go_on.set()
        assert [future.result().status_code for future in slow] == [200] * 4


def test_the_process_may_die(server: RunningServer, checker: GrammarChecker) -> None:
    """What it was trying fails, and the next grammar starts another one."""
    assert chat(server, structured_outputs={"choice": ["one"]}).status_code == 200
    worker = checker._worker
    assert worker is not None
    pid = worker._process.pid
    os.kill(pid, signal.SIGSTOP)  # it takes what it is sent, and does nothing
    with ThreadPoolExecutor() as clients:
        hanging = clients.submit(chat, server, structured_outputs={"choice": ["two"]})
        wait_until(lambda: worker._waiting)
        assert chat(server).status_code == 200
        os.kill(pid, signal.SIGKILL)
        assert hanging.result().status_code == 500
    assert chat(server, structured_outputs={"choice": ["two"]}).status_code == 200


def test_a_timeout_holds_while_a_grammar_is_tried(server: RunningServer, checker: GrammarChecker) -> None:
    assert chat(server, structured_outputs={"choice": ["one"]}).status_code == 200
    assert checker._worker is not None
    pid = checker._worker._process.pid
    os.kill(pid, signal.SIGSTOP)
    late = chat(server, structured_outputs={"choice": ["three"]}, timeout=0.05)
    os.kill(pid, signal.SIGCONT)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert chat(server, structured_outputs={"choice": ["three"]}).status_code == 200


@pytest.mark.parametrize("length", [1, 200_000], ids=["small", "larger than the pipe"])
def test_a_process_that_stands_still_is_no_verdict(
    server: RunningServer, checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Another takes its place, and the same grammar is tried again."""
    assert chat(server, structured_outputs={"choice": ["one"]}).status_code == 200
    assert checker._worker is not None
    process = checker._worker._process
    os.kill(process.pid, signal.SIGSTOP)
    text = f"{length}" + "x" * length
    with monkeypatch.context() as patched:
        patched.setattr(grammar_check, "MAX_SECONDS", 0.1)
        answer = chat(server, structured_outputs={"grammar": f'start: "a" // {text}'})
    assert answer.status_code == 500
    assert "try again" in answer.json()["error"]["message"]
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert chat(server, structured_outputs={"grammar": f'start: "a" // {text}'}).status_code == 200


@pytest.mark.parametrize(
    ("body", "is_verdict"),
    [
        ("while True: pass", True),
        ("os.kill(os.getpid(), 11)", True),
        ("bytearray(2**40)", True),
        ("worker.signal.alarm(1); worker.signal.pause()", False),
        ("os.kill(os.getpid(), 9)", False),
    ],
)
def test_a_trial_is_ended_from_outside(body: str, is_verdict: bool) -> None:
    """Whatever it does: without end, a crash, more memory than there is. Where the machine is too busy, or
    has too little memory itself, nothing is known of the grammar.
    """
    code = (
        "import os, minivllm.server.grammar_worker as worker\n"
        "worker.MAX_CPU_SECONDS = 0.2\n"
        "real = worker.try_grammar\n"
        "def try_grammar(tokenizer, grammar):\n"
        "    if 'evil' not in grammar: return real(tokenizer, grammar)\n"
        f"    {body}\n"
        "worker.try_grammar = try_grammar\n"
        "worker.main()\n"
    )
    table = Table([TOKENIZER.token_bytes(i) for i in range(258)], [256, 257])
    messages = [table, Trial(1, 'start: "evil"'), Trial(2, 'start: "good"'), Trial(3, "start: bad")]
    frames = [msgspec.msgpack.encode(message) for message in messages]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        for frame in frames:
            process.stdin.write(len(frame).to_bytes(4, "little") + frame)
        process.stdin.flush()
        verdicts = {
            verdict.id: verdict
            for verdict in (msgspec.json.decode(process.stdout.readline(), type=Verdict) for _ in range(3))
        }
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    assert verdicts[1].is_cut_short != is_verdict
    assert ("too complex" in str(verdicts[1].error)) == is_verdict
    assert verdicts[2] == Verdict(2, None)
    assert "bad" in str(verdicts[3].error)
