"""API keys at the door: without one there is 401, on every route and for every spelling of every path."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minivllm.config import ServerConfig
from minivllm.server.app import create_app
from minivllm.server.auth import PUBLIC_PATHS
from minivllm.server.context import ServerState
from minivllm.server.keys import ApiKeys

from .fakes import MODEL, FakeEngine, make_tokenizer, send_raw, served

KEY, OTHER_KEY = "sk-first.key_1", "sk-second/key+2="
HOSTS = ["test", "127.0.0.1", "/health", "test/health?", "x/health#", "[", "health:99999", "", "é", "a b"]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(ServerConfig(), ApiKeys([KEY, OTHER_KEY])) as port:
        yield port


def all_routes() -> list[tuple[str, str]]:
    """Method and path of each route of the application, whoever added it."""
    tokenizer = make_tokenizer()
    app = create_app(FakeEngine(tokenizer), tokenizer, ServerConfig(), MODEL, ServerState())

    def walk(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
        for route in routes:
            if inner := getattr(route, "original_router", None):
                yield from walk(inner.routes)
            else:
                path = re.sub(r"{.*?}", "x", route.path)
                yield from ((method, path) for method in sorted(route.methods))

    return list(walk(app.routes))


def spellings(path: str) -> list[str]:
    """Ways to write ``path`` that a router, a proxy or a careless check may take for it, and others."""
    head, tail = path[:1], path[1:]
    encoded = f"%{ord(tail[0]):02x}{tail[1:]}" if tail else "%2f"
    return [
        path + "/",
        head + path,
        f"/.{path}",
        f"{path}/.",
        f"/x/..{path}",
        f"/%2e{path}",
        f"/{encoded}",
        path.replace("/", "%2f"),
        path.replace("/", "/%2F"),
        path.replace("/", "\\"),
        path + "%00",
        path + "%20",
        path + ";x",
        path + ";/health",
        path + "%3f",
        path.upper(),
        path.title(),
        f"/health{path}",
        f"{path}/health",
        f"/health/..{path}",
        f"/health%2f..{path}",
        f"/ping/../..{path}",
        f"http://test{path}",
        f"http://h/health{path}",
        f"https://user@test:80{path}",
        f"//health{path}",
        f"{path}#/health",
        f"{path}%23/health",
        f"{path}%3f/health",
    ]


ROUTES = all_routes()
UNKNOWN = [("GET", "/"), ("GET", "/docs"), ("GET", "/metrics"), ("POST", "/v1/embeddings"), ("GET", "*")]
PRIVATE = [(method, path) for method, path in [*ROUTES, *UNKNOWN] if path.encode() not in PUBLIC_PATHS]


def head(method: str, target: str, host: str = "test", *more: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *more, "", ""]
    return "\r\n".join(lines).encode()


def refused(port: int, request: bytes, method: str = "GET") -> None:
    answer = send_raw(port, request, method=method)
    assert answer.status == 401, (request, answer)
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["X-Request-Id"]
    if method != "HEAD":
        assert answer.error["code"] == "invalid_api_key"
        assert answer.error["type"] == "invalid_request_error"


def test_the_routes_are_found() -> None:
    assert len(ROUTES) >= 11
    assert {"/openapi.json", "/v1/models", "/v1/chat/completions", "/tokenize"} <= {
        path for _, path in ROUTES
    }
    assert {path.encode() for _, path in ROUTES} >= PUBLIC_PATHS


@pytest.mark.parametrize(("method", "path"), PRIVATE)
def test_every_route_with_every_method(port: int, method: str, path: str) -> None:
    for other in {method, "GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "health"}:
        refused(port, head(other, path), other)
    refused(port, head(method, path + "?/health"), method)
    refused(port, head(method, path + "?key=" + KEY), method)


@pytest.mark.parametrize("path", sorted({path for _, path in [*ROUTES, *UNKNOWN]}))
def test_every_spelling_and_host(port: int, path: str) -> None:
    for spelling, host in zip(spellings(path), itertools.cycle(HOSTS), strict=False):
        refused(port, head("GET", spelling, host))
    if path.encode() not in PUBLIC_PATHS:
        for host in HOSTS:
            refused(port, head("GET", path, host))


@pytest.mark.parametrize(
    "target", ["?/health", "#/health", "health", "/health/", "/healthz", "/", "*", "test:80"]
)
def test_targets_that_are_not_health(port: int, target: str) -> None:
    refused(port, head("GET", target))


def test_headers_that_name_another_path_change_nothing(port: int) -> None:
    names = ["X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Path", "X-Forwarded-Prefix", "X-Forwarded-Host"]
    refused(port, head("GET", "/v1/models", "test", *(f"{name}: /health" for name in names)))
    refused(port, head("POST", "/v1/models", "test", "X-HTTP-Method-Override: OPTIONS"), "POST")


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready"])
def test_the_open_paths(port: int, path: str) -> None:
    for target in (path, path + "?x=/v1/models"):
        for host in ("test", "[", "test/v1/models?"):
            answer = send_raw(port, head("GET", target, host))
            assert answer.status == 200
            assert json.loads(answer.body)["status"] == "ok"
    assert send_raw(port, head("POST", path), method="POST").status == 405


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_target(port: int, tail: str) -> None:
    if tail.split("?")[0] not in ("health", "ping"):
        refused(port, head("GET", "/" + tail))


GOOD = [f"Bearer {KEY}", f"Bearer {OTHER_KEY}", f"bearer {KEY}", f"BEARER   {KEY}", f"Bearer {KEY}  "]
BAD = [
    "",
    "Bearer",
    "Bearer ",
    KEY,
    f"Bearer{KEY}",
    f"Basic {KEY}",
    f"Token {KEY}",
    f"Bearer {KEY}x",
    f"Bearer {KEY[:-1]}",
    f"Bearer {KEY.upper()}",
    f'Bearer "{KEY}"',
    f"Bearer {KEY},{OTHER_KEY}",
    f"Bearer {KEY} {KEY}",
    f"Bearer\t{KEY}",
    f"Bearer, Bearer {KEY}",
    f"Bearer {KEY}\u00e9",
    "Bearer \u00ff\u00fe",
    "Bearer " + "x" * 50_000,
    "Bearer null",
    "Bearer *",
]


@pytest.mark.parametrize("value", GOOD)
def test_a_key_opens(port: int, value: str) -> None:
    assert send_raw(port, head("GET", "/version", "test", f"Authorization: {value}")).status == 200
    # Behind the door the Host header doesn't matter, not for what an error says either.
    for host in HOSTS:
        answer = send_raw(port, head("GET", "/nowhere", host, f"Authorization: {value}"))
        assert (answer.status, answer.error["message"]) == (404, "unknown route GET /nowhere")


@pytest.mark.parametrize("value", BAD)
def test_wrong_keys(port: int, value: str) -> None:
    refused(port, head("GET", "/version", "test", f"Authorization: {value}"))
    request = head("GET", "/version", "test", f"Authorization: {value}")
    refused(port, request.decode().encode("latin-1"))


def test_several_authorization_headers(port: int) -> None:
    lines = [f"Authorization: Bearer {KEY}"] * 2
    refused(port, head("GET", "/version", "test", *lines))
    refused(port, head("GET", "/version", "test", lines[0], "Authorization: Bearer wrong"))


@given(st.binary(max_size=40))
@settings(max_examples=150)
def test_only_the_keys_are_accepted(given_key: bytes) -> None:
    keys = [b"k%d" % i for i in range(100)]
    api_keys = ApiKeys(key.decode() for key in keys)
    name = f"key-{keys.index(given_key) + 1}" if given_key in keys else None
    assert api_keys.name_of(given_key) == name
    assert all(api_keys.name_of(key) for key in keys)
    assert not any(api_keys.name_of(key + b"x") for key in keys)


def test_a_refused_body_is_not_read_and_the_answer_arrives(port: int) -> None:
    """The client sends more than any buffer holds before it reads; it gets its 401 all the same."""
    content = b"x" * 100_000
    request = head("POST", "/v1/completions", "test", "Content-Length: 20000000")
    refused(port, request + content * 200, "POST")
    # And one that sends nothing of it, and waits.
    refused(port, head("POST", "/v1/completions", "test", "Content-Length: 20000000"), "POST")
    refused(
        port, head("POST", "/v1/completions", "test", "Content-Length: 9", "Expect: 100-continue"), "POST"
    )


def test_a_refused_connection_stays_usable(port: int) -> None:
    """Where there is no body to drop, the connection is kept."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        first = client.get("/version")
        second = client.get("/version", headers={"Authorization": f"Bearer {KEY}"})
    assert (first.status_code, second.status_code) == (401, 200)
    assert "connection" not in first.headers


def test_pipelined_requests_are_checked_one_by_one(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        wrong, right = (
            head("GET", "/version"),
            head("GET", "/version", "test", f"Authorization: Bearer {KEY}"),
        )
        client.sendall(
            right + wrong + head("GET", "/health") + wrong + head("GET", "/ping", "x", "Connection: close")
        )
        data = b""
        while piece := client.recv(65536):
            data += piece
    assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"401", b"200", b"401", b"200"]


def test_an_upgrade_is_no_way_in(port: int) -> None:
    upgrade = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: eA==",
    )
    refused(port, head("GET", "/v1/models", "test", *upgrade))
    refused(port, head("GET", "/health/x", "test", "Connection: Upgrade", "Upgrade: h2c"))


@pytest.mark.parametrize("raw_path", [b"/x", None])
def test_scopes_that_our_server_never_makes(raw_path: bytes | None) -> None:
    """WebSockets are closed, and a server that doesn't say what was sent gets no benefit of the doubt."""
    tokenizer = make_tokenizer()
    app = create_app(FakeEngine(tokenizer), tokenizer, ServerConfig(), MODEL, ServerState(), ApiKeys([KEY]))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"path": "/health", "raw_path": raw_path, "headers": [], "query_string": b"", "method": "GET"}
    asyncio.run(app({"type": "websocket", **scope}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]
    sent.clear()
    asyncio.run(app({"type": "http", **scope}, receive, send))
    assert sent[0]["status"] == 401


def test_the_openai_package(port: int) -> None:
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key=OTHER_KEY, max_retries=0) as client:
        assert client.models.list().data[0].id == MODEL
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as error,
    ):
        client.models.list()
    assert error.value.code == "invalid_api_key"
    assert "wrong" not in str(error.value)
