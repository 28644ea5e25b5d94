"""A server that is closed: what its operator and its clients see of that."""

from __future__ import annotations

import os
import socket
import ssl
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest

from tests.server.certificates import make_certificate
from tests.serving.conftest import Server, serving
from tests.serving.test_lifecycle import run_serve
from tests.tiny_model import write_tiny_model

COMPLETION = {"prompt": [5, 6, 7], "max_tokens": 2}


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[str, ...]:
    """Flags that serve a model of a few thousand weights."""
    return ("--model", write_tiny_model(tmp_path), "--load-format", "dummy", "--kv-cache-memory", "4MB")


def raw_status(server: Server, request: bytes) -> int:
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), timeout=30) as client:
        client.sendall(request)
        answer = HTTPResponse(client)
        answer.begin()
        return answer.status


def test_keys_from_everywhere_and_shown_nowhere(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("secret-file\n")
    monkeypatch.setenv("MINIVLLM_API_KEY", "secret-env")
    flags = (
        "--api-key",
        "secret-a",
        "secret-b",
        "--api-key-file",
        str(tmp_path / "keys"),
        "--host",
        "0.0.0.0",
    )
    with serving(*tiny, *flags, "--max-header-size", "4KiB", "--max-header-count", "50") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=url, timeout=30) as client:
            for key in ("secret-a", "secret-b", "secret-file", "secret-env"):
                answer = client.post(
                    "/v1/completions", json=COMPLETION, headers={"Authorization": f"Bearer {key}"}
                )
                assert answer.status_code == 200
            assert client.get("/health").status_code == client.get("/ping").status_code == 200
            for path in ("/v1/models", "/openapi.json", "/health/", "//health", "/nowhere"):
                assert client.get(path).status_code == 401
            refused = client.post(
                "/v1/completions", json=COMPLETION, headers={"Authorization": "Bearer secret-c"}
            )
            assert refused.status_code == 401
            assert "secret" not in refused.text

        head = b"GET /v1/models HTTP/1.1\r\nHost: "
        assert raw_status(server, head + b"/health\r\n\r\n") == 401
        assert raw_status(server, b"GET http://x/health HTTP/1.1\r\nHost: x\r\n\r\n") == 401
        assert raw_status(server, head + b"x\r\nX: " + b"y" * 5000 + b"\r\n\r\n") == 431
        assert raw_status(server, head + b"x\r\nX: " + b"y" * 500_000) == 431
        assert raw_status(server, head + b"x\r\n" + b"X: y\r\n" * 50 + b"\r\n") == 431
        assert raw_status(server, b"nonsense\r\n\r\n") == 400

        pid = server.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        if children.exists():
            for child in children.read_text().split():
                for file in ("environ", "cmdline"):
                    assert b"secret" not in Path(f"/proc/{child}/{file}").read_bytes()
        assert server.stop() == 0
        log = "".join(server.log)
        assert "secret" not in log
        assert "whoever reaches" not in log, "there are keys"


def test_an_open_server_says_so(tiny: tuple[str, ...]) -> None:
    with serving(*tiny, "--host", "0.0.0.0") as server:
        assert any("no --api-key: whoever reaches 0.0.0.0 can use the model" in line for line in server.log)
    with serving(*tiny) as server:
        assert not any("--api-key" in line for line in server.log)


def test_https(tiny: tuple[str, ...], tmp_path: Path) -> None:
    ours = make_certificate(tmp_path, "server")
    with serving(*tiny, "--ssl-certfile", ours.cert, "--ssl-keyfile", ours.key) as server:
        assert server.url.startswith("https://")
        trust = ssl.create_default_context(cafile=ours.cert)
        answer = httpx.post(f"{server.url}/v1/completions", json=COMPLETION, verify=trust, timeout=30)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ssl-certfile", "/nowhere.pem"], "can't read --ssl-certfile /nowhere.pem"),
        (["--api-key-file", "/nowhere.keys"], "can't read --api-key-file /nowhere.keys"),
        (["--api-key", "a b"], "key 1 of --api-key"),
        (["--ssl-keyfile", "x"], "--ssl-keyfile needs --ssl-certfile"),
        (["--allowed-origins", "https://a.com", "a.com"], "got 'a.com'"),
        (["--allowed-origins", "*", "--allow-credentials"], "--allow-credentials needs"),
        (["--max-header-size", "0"], "--max-header-size must be at least 1, got 0"),
        (["--max-tokens-per-request", "0"], "--max-tokens-per-request must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_one_line(flags: list[str], words: str) -> None:
    """Before anything is loaded."""
    result = run_serve("--port", "0", *flags)
    assert result.returncode in (1, 2)
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


def test_an_empty_variable_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MINIVLLM_API_KEY", "")
    result = run_serve("--port", "0")
    assert result.returncode == 1
    assert "MINIVLLM_API_KEY holds no API key" in result.stderr
