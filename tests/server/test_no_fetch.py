"""No route fetches a URL or opens a file that a client names."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from .fakes import RunningServer

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "URL"},
        {"prompt": ["URL"], "stop": "URL"},
        {"prompt": "x", "model": "URL"},
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "URL"}]},
        {"messages": [{"role": "user", "content": "x", "name": "URL"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "URL"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "URL"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "URL"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "URL"}}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "URL"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "URL"}}]}]},
        {"messages": [{"role": "user", "content": "x"}], "chat_template": "URL"},
        {"messages": [{"role": "user", "content": "x"}], "documents": [{"url": "URL"}]},
        {"messages": [{"role": "user", "content": "x"}], "model": "URL"},
    ],
    "/tokenize": [
        {"prompt": "URL"},
        {"prompt": "x", "model": "URL"},
        {"prompt": "x", "chat_template": "URL"},
    ],
    "/detokenize": [{"tokens": [1], "model": "URL"}],
}


def with_url(value: Any, url: str) -> Any:
    if isinstance(value, dict):
        return {key: with_url(item, url) for key, item in value.items()}
    if isinstance(value, list):
        return [with_url(item, url) for item in value]
    return url if value == "URL" else value


@pytest.mark.parametrize("path", BODIES)
def test_nobody_calls(server: RunningServer, path: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as named_by_client:
        port = named_by_client.getsockname()[1]
        for body in BODIES[path]:
            for url in (f"http://127.0.0.1:{port}/x.png", f"//127.0.0.1:{port}/x", "file:///etc/hostname"):
                headers = dict.fromkeys(("Origin", "Referer", "X-Forwarded-Host", "Forwarded", "Link"), url)
                response = server.http.post(path, json=with_url(body, url), headers=headers)
                assert response.status_code in (200, 400, 404)
        named_by_client.setblocking(False)
        with pytest.raises(BlockingIOError):
            named_by_client.accept()


@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url", "input_audio", "file", "refusal"])
def test_media_are_refused_by_kind(server: RunningServer, kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://127.0.0.1:1/x"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "only text is supported" in response.json()["error"]["message"]
    assert not server.engine.requests
