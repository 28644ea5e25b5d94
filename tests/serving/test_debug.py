"""The debug routes tell what really happened, and are only there where they were asked for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx

from tests.serving.conftest import serving
from tests.serving.test_lifecycle import COMPLETION, engine_process
from tests.tiny_model import write_tiny_model


def test_a_request_s_timeline(tmp_path: Path) -> None:
    flags = ("--model", write_tiny_model(tmp_path), "--load-format", "dummy", "--kv-cache-memory", "4MB")
    limits = ("--max-num-batched-tokens", "16", "--debug-routes")
    with serving(*flags, *limits) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        body = {**COMPLETION, "prompt": [5] * 40, "max_tokens": 6, "n": 2}
        answer = client.post("/v1/completions", json=body, headers={"X-Request-Id": "mi/ne"}).json()
        client.post("/v1/completions", json={**COMPLETION, "max_tokens": 2})
        for id in ("mi%2Fne", answer["id"]):
            timeline = client.get(f"/debug/requests/{id}").json()
            text = "\n".join(timeline["summary"])
            assert text.count(", mi/ne\n") == 2, "each of its two samples has its life"
            assert "a prompt of 40 tokens" in text
            assert "ended" in text
            assert "6 tokens: length" in text
            prefills = [item for step in timeline["steps"] for item in step.get("prefills", [])]
            # The second sample shares the two blocks that the first one has computed.
            assert sum(item["num_tokens"] for item in prefills) == 40 + 8
            decodes = [context for step in timeline["steps"] for context in step.get("decodes", {}).values()]
            assert sorted(decodes) == sorted([*range(40, 45)] * 2)
        steps = client.get("/debug/steps", params={"limit": 1000}).json()["steps"]
        assert [step["number"] for step in steps] == list(range(1, len(steps) + 1))
        assert sum(item["num_tokens"] for step in steps for item in step["prefills"]) == 40 + 8 + 3
        assert client.get("/debug/steps", params={"limit": 2}).json()["steps"] == steps[-2:]
        assert client.get("/debug/steps", params={"limit": 1001}).status_code == 400
        unknown = client.get("/debug/requests/nobody")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
        # What came before a death can still be seen until another engine serves.
        os.kill(engine_process(server), signal.SIGKILL)
        while client.get("/ready").status_code == 200:
            time.sleep(0.02)
        assert client.get("/debug/requests/mi/ne").json()["summary"] == timeline["summary"]
        while client.get("/ready").status_code != 200:
            time.sleep(0.02)
        assert client.get("/debug/requests/mi/ne").status_code == 404


def test_they_are_off_by_default(embedded_server: object) -> None:
    url = embedded_server.url  # type: ignore[attr-defined]
    for path in ("/debug/steps", "/debug/requests/x"):
        assert httpx.get(url + path, timeout=30).json()["error"]["message"] == f"unknown route GET {path}"
