"""Where tokens begin in an answer's text, and where an echoed prompt ends: half characters, hidden spaces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders
from tokenizers.models import BPE

from minivllm.config import ServerConfig
from minivllm.request import SamplingParams
from minivllm.server.app import create_app
from minivllm.server.context import ServerState
from minivllm.tokenizer.tokenizer import Tokenizer

from .fakes import BOS, MODEL, FakeEngine, RunningServer, make_tokenizer, run_server


class SayingEngine(FakeEngine):
    """Answers with the tokens that it is given."""

    answer: tuple[int, ...] = ()

    def _answer(self, sampling: SamplingParams) -> list[int]:
        return [*self.answer]


def spaced_tokenizer() -> Tokenizer:
    """SentencePiece's spelling, where the space before a text's first word isn't shown."""
    words = {"▁a": 0, "▁b": 1, "▁c": 2}
    backend = tokenizers.Tokenizer(BPE(words, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(BOS, special=True)])
    return Tokenizer(backend, special_tokens={"bos_token": BOS})


BYTES, SPACED = make_tokenizer(), spaced_tokenizer()
SPACED_BOS = min(SPACED.special_token_ids)


@pytest.fixture(scope="module", params=[BYTES, SPACED], ids=["bytes", "spaced"])
def any_server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    engine = SayingEngine(request.param)
    app = create_app(engine, request.param, ServerConfig(), MODEL, ServerState())
    with run_server(app) as port:
        server = RunningServer(engine, port)
        yield server
        server.close()


LLAMA = [*"🦙".encode()]


@pytest.mark.parametrize(
    ("any_server", "prompt", "answer", "echo", "text", "offsets"),
    [
        # The answer goes on with the prompt's half character.
        (BYTES, [*b"a\xc3"], [*b"\xb6\xc3"], True, "aö\ufffd", [0, 1, 1, 2]),
        (BYTES, [*b"a\xc3"], [*b"\xb6\xc3"], False, "ö\ufffd", [0, 1]),
        (BYTES, LLAMA[:2], [*LLAMA[2:], *b"!"], True, "🦙!", [0, 0, 0, 0, 1]),
        (BYTES, LLAMA[:2], [*LLAMA[2:], *b"!"], False, "🦙!", [0, 0, 1]),
        # It doesn't.
        (BYTES, [*b"a\xc3"], [*b"b"], True, "a\ufffdb", [0, 1, 1]),
        (BYTES, [*b"a\xc3"], [], True, "a\ufffd", [0, 1]),
        # Only a text's first space is hidden.
        (SPACED, [0], [1, 2], True, "a b c", [0, 1, 3]),
        (SPACED, [0], [1, 2], False, " b c", [0, 2]),
        (SPACED, [SPACED_BOS], [0, 1], True, "a b", [0, 0, 1]),
        (SPACED, [SPACED_BOS], [0, 1], False, "a b", [0, 1]),
    ],
    indirect=["any_server"],
)
def test_offsets_and_text(
    any_server: RunningServer, prompt: list[int], answer: list[int], echo: bool, text: str, offsets: list[int]
) -> None:
    """Whole, and streamed. An echo and its answer read as the token ids do in one go."""
    assert isinstance(any_server.engine, SayingEngine)
    any_server.engine.answer = (*(answer or b"x"),)
    body = {"prompt": prompt, "echo": echo, "logprobs": 0, "max_tokens": len(answer)}
    (choice,) = any_server.http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"] == offsets
    pieces = stream(any_server, body)
    assert "".join(piece["text"] for piece in pieces) == text
    found = [place for piece in pieces if piece["logprobs"] for place in piece["logprobs"]["text_offset"]]
    assert found == offsets


def stream(server: RunningServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = server.http.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
