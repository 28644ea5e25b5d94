"""What browsers are told: nothing by default, and with --allowed-origins what they need, errors included."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.errors import ConfigError
from minivllm.server.keys import ApiKeys

from .fakes import MAX_BODY_SIZE, RunningServer, send_raw, served

KEY, ORIGIN, OTHER = "some-key", "https://chat.example.com", "https://evil.example.com"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def client_for(config: ServerConfig) -> Iterator[httpx.Client]:
    with served(config, ApiKeys([KEY])) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a server that knows one origin."""
    yield from client_for(
        ServerConfig(
            allowed_origins=(ORIGIN, "http://localhost:3000"),
            allow_credentials=True,
            max_body_size=MAX_BODY_SIZE,
            max_header_count=20,
        )
    )


def cors_headers(response: httpx.Response) -> set[str]:
    return {name for name in response.headers if name.startswith("access-control-")}


def test_off_by_default(server: RunningServer) -> None:
    response = server.http.get("/version", headers={"Origin": ORIGIN})
    assert response.status_code == 200
    assert not cors_headers(response)
    preflight = server.http.options("/v1/completions", headers={"Origin": ORIGIN, **PREFLIGHT})
    assert preflight.status_code == 405
    assert not cors_headers(preflight)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health", "/nowhere"])
def test_preflight_needs_no_key(client: httpx.Client, path: str) -> None:
    response = client.options(path, headers={"Origin": ORIGIN, **PREFLIGHT})
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert response.headers["Access-Control-Allow-Credentials"] == "true"
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    assert response.headers["X-Request-Id"]


def test_what_is_no_preflight_needs_a_key(client: httpx.Client) -> None:
    assert client.options("/v1/completions").status_code == 401
    assert client.options("/v1/completions", headers={"Origin": ORIGIN}).status_code == 401
    for method in ("GET", "POST"):
        assert (
            client.request(method, "/v1/models", headers={"Origin": ORIGIN, **PREFLIGHT}).status_code == 401
        )


def test_other_origins(client: httpx.Client) -> None:
    for origin in (OTHER, ORIGIN + ".evil.com", ORIGIN.replace("https", "http"), ORIGIN + ":444", "null"):
        preflight = client.options("/version", headers={"Origin": origin, **PREFLIGHT})
        assert preflight.status_code == 400
        assert "Access-Control-Allow-Origin" not in preflight.headers
        response = client.get("/version", headers={"Origin": origin, "Authorization": f"Bearer {KEY}"})
        assert "Access-Control-Allow-Origin" not in response.headers


def test_every_kind_of_answer_can_be_read(client: httpx.Client) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    crash = {"prompt": "[crash]"}
    for status, method, path, headers, body in [
        (200, "GET", "/version", key, None),
        (200, "POST", "/v1/completions", key, {"prompt": "x", "stream": True}),
        (400, "POST", "/v1/completions", key, {"prompt": "x", "n": 0}),
        (401, "POST", "/v1/completions", {}, {"prompt": "x"}),
        (404, "GET", "/nowhere", key, None),
        (405, "GET", "/v1/completions", key, None),
        (413, "POST", "/v1/completions", key, {"prompt": "x" * MAX_BODY_SIZE}),
        (431, "GET", "/version", {**key, **{f"X-{i}": "" for i in range(30)}}, None),
        (500, "POST", "/v1/completions", key, crash),
    ]:
        response = client.request(method, path, headers={"Origin": ORIGIN, **headers}, json=body)
        assert response.status_code == status
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
        assert "Origin" in response.headers["Vary"]


def test_every_origin() -> None:
    config = ServerConfig(
        allowed_origins=("*",), allowed_methods=("GET", "POST"), allowed_headers=("Authorization",)
    )
    for client in client_for(config):
        response = client.get("/version", headers={"Origin": OTHER})
        assert response.status_code == 401
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in response.headers
        asked = {"Origin": OTHER, **PREFLIGHT, "Access-Control-Request-Headers": "authorization"}
        assert client.options("/version", headers=asked).status_code == 200
        for name, value in (("Method", "DELETE"), ("Headers", "x-other")):
            refused = client.options("/version", headers=asked | {f"Access-Control-Request-{name}": value})
            assert refused.status_code == 400


@pytest.mark.parametrize(
    "origin",
    ["", "chat.example.com", "https://x.com/", "https://x.com/app", "https://a.com,https://b.com", "null"],
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins takes"):
        ServerConfig(allowed_origins=(ORIGIN, origin))


def test_credentials_need_names() -> None:
    with pytest.raises(ConfigError, match="by name"):
        ServerConfig(allowed_origins=("*",), allow_credentials=True)
    with pytest.raises(ConfigError, match="needs --allowed-origins"):
        ServerConfig(allow_credentials=True)


def test_a_malformed_preflight_is_an_answer(client: httpx.Client) -> None:
    port = client.base_url.port
    assert port is not None
    lines = (
        "OPTIONS /version HTTP/1.1\r\nHost: [\r\nOrigin: \xff\r\nAccess-Control-Request-Method: \xfe\r\n\r\n"
    )
    assert send_raw(port, lines.encode("latin-1"), method="OPTIONS").status == 400
