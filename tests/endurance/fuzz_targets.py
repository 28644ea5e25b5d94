"""What is fed with mutated input: each target takes a case's random numbers, and says what came of it.

It returns whether the input was taken. Refusing it is a :class:`MinivllmError`; whatever else is raised, and
whatever takes too long or too much memory, is a fault.
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from minivllm.config import ServerConfig
from minivllm.engine import messages
from minivllm.errors import InvalidRequestError, MessageError, MinivllmError, ModelLoadError
from minivllm.models.config import ModelConfig
from minivllm.request import EngineEvent, EngineInfo, EngineStats, FinishReason, SamplingParams, Terms
from minivllm.tokenizer.chat_template import ChatTemplate
from minivllm.tokenizer.gguf_vocab import tokenizer_from_gguf
from minivllm.weights.files import resolve_model
from minivllm.weights.gguf import open_gguf
from minivllm.weights.loader import check_and_iterate, iter_weights
from tests.endurance.mutations import mutate_bytes, mutate_text
from tests.server.fakes import served
from tests.tiny_model import CONFIG
from tests.tokenizer.test_chat_template import CHATML, FEATURES, LLAMA2, LLAMA3
from tests.weights.tiny_models import write_small_gguf

Target = Callable[[random.Random], bool]

TEMPLATES = (CHATML, LLAMA2, LLAMA3, FEATURES)

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, <b>you</b> & naïve 👍"},
    {"role": "assistant", "content": "Hello!"},
]
_TEMPLATE_WORDS = [
    "{{", "}}", "{%", "%}", "{#", "#}", "{% for m in messages %}", "{% endfor %}", "{% if x %}",
    "{% else %}", "{% endif %}", "{% set x = messages %}", "{% generation %}", "{% break %}",
    "{% macro a(b) %}", "{% endmacro %}", "| tojson", "| trim", "| length", "| join", "| list", "| int",
    "| attr('__class__')", "loop.index", "namespace(a=1)", "none", "true", "''", "' + ", "[0]", "[1:]",
    ".role", "['content']", "raise_exception('no')", "range(100)", "bos_token", "__class__",
    ".__init__.__globals__", "self", "()", "-", "~", "is defined", "'%s' % 1",
]  # fmt: skip
_JSON_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    -0.0,
    1e308,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
]
_JSON_VALUES += [
    "",
    "x",
    "\x00",
    "é" * 40,
    "a" * 5000,
    "json_object",
    [],
    [[]],
    [None],
    [1, 2],
    ["a", "b"],
    [7] * 300,
]
_JSON_VALUES += [{}, {"a": 1}, [{"role": "user"}], {"type": "json_object"}]
_JSON_VALUES += [{"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}]
_BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/completions",
        {
            "model": "org/fake-model",
            "prompt": "Hi",
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "n": 1,
            "stop": ["x"],
            "logprobs": 1,
            "echo": False,
            "seed": 1,
            "stream": False,
            "logit_bias": {"5": 1.5},
            "best_of": 1,
            "presence_penalty": 0.1,
            "timeout": 5,
            "priority": 0,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "max_completion_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "none",
            "logprobs": True,
            "top_logprobs": 2,
            "chat_template_kwargs": {},
        },
    ),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]


@contextmanager
def gguf_headers() -> Iterator[Target]:
    """A GGUF file whose header is changed: its metadata, its tensors and its tokenizer are all read."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST", "ab", "cd"],
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.token_type": [1] * 48,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    with tempfile.TemporaryDirectory() as folder:
        original = write_small_gguf(Path(folder) / "original.gguf", metadata)
        data = original.read_bytes()
        end = min(tensor.offset for tensor in open_gguf(original).tensors.values())
        numbers = iter(range(2**62))

        def read(rng: random.Random) -> bool:
            path = Path(folder) / f"{next(numbers)}.gguf"
            path.write_bytes(mutate_bytes(data, rng, end=end))
            try:
                file = open_gguf(path)
                dict(file.metadata)
                for _ in file.iter_tensors(ModelConfig.from_gguf(file)):
                    pass
                tokenizer = tokenizer_from_gguf(file.metadata)
                tokenizer.decode(tokenizer.encode("abcd"))
            finally:
                path.unlink()
            return True

        yield partial(_taken, read)


@contextmanager
def safetensors_headers() -> Iterator[Target]:
    """A checkpoint whose safetensors header is changed, or its length."""
    from safetensors.numpy import save

    data = save({f"layer.{i}": np.ones((4, 8), np.float32) for i in range(4)})
    (length,) = struct.unpack("<Q", data[:8])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))

        def read(rng: random.Random) -> bool:
            (folder / "model.safetensors").unlink(missing_ok=True)  # it may be mapped: no writing into it
            (folder / "model.safetensors").write_bytes(_mutated_safetensors(data, length, rng))
            files = resolve_model(str(folder))
            try:
                check_and_iterate(files, {})
            except ModelLoadError as error:
                if "the tensors don't fit the configuration" not in str(error):
                    raise
            for _ in iter_weights(files):
                pass
            return True

        yield partial(_taken, read)


def _mutated_safetensors(data: bytes, length: int, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutate_bytes(data, rng, end=8 + length)
    words = [
        '"dtype":"F64"',
        '"BF16"',
        "[0,1]",
        "-1",
        "18446744073709551615",
        "1e9",
        "null",
        "{",
        "}",
        '"',
        "[]",
    ]
    header = mutate_text(data[8 : 8 + length].decode(), rng, words).encode(errors="surrogatepass")
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@contextmanager
def model_configs() -> Iterator[Target]:
    """A config.json, changed as text and as values."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def read(rng: random.Random) -> bool:
            text = json.dumps(CONFIG)
            if rng.random() < 0.5:
                text = mutate_text(
                    text, rng, ["{", "}", "[", "null", "1e999", "-1", "0", '"', ":", "NaN", "2" * 50]
                )
            else:
                text = json.dumps({**CONFIG, rng.choice([*CONFIG]): rng.choice(_JSON_VALUES)})
            (folder / "config.json").write_text(text, errors="surrogatepass")
            resolve_model(str(folder), load_format="dummy")
            return True

        yield partial(_taken, read)


@contextmanager
def chat_templates() -> Iterator[Target]:
    """Templates of the usual kinds, and messages that they weren't written for."""

    def render(rng: random.Random) -> bool:
        source = mutate_text(rng.choice(TEMPLATES), rng, _TEMPLATE_WORDS)
        messages = [dict(rng.choice(_MESSAGES)) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.3:
            rng.choice(messages)[rng.choice(["role", "content", "tool_calls"])] = rng.choice(_JSON_VALUES)
        template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
        template.render(messages, add_generation_prompt=rng.random() < 0.5)
        return True

    yield partial(_taken, render)


@contextmanager
def json_bodies() -> Iterator[Target]:
    """Bodies of all routes at a server, changed as bytes, as text and as values."""
    with (
        served(ServerConfig()) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):

        def post(rng: random.Random) -> bool:
            path, body = rng.choice(_BODIES)
            kind = rng.randrange(3)
            if kind == 0:
                content = mutate_bytes(json.dumps(body).encode(), rng)
            elif kind == 1:
                words = [
                    "{",
                    "}",
                    "[",
                    "]",
                    "null",
                    "1e999",
                    "-1",
                    '"',
                    "\\ud800",
                    ":",
                    "NaN",
                    "[" * 200,
                    '"n": 2,',
                ]
                content = mutate_text(json.dumps(body), rng, words).encode(errors="surrogatepass")
            else:
                content = json.dumps(_with_another_value(body, rng)).encode()
            answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
            if answer.status_code == 200:
                return True
            error = answer.json()["error"]
            if not 400 <= answer.status_code < 500 or not error["message"] or len(error["message"]) > 1100:
                raise AssertionError(f"{answer.status_code} {answer.text[:300]} for {content[:300]!r}")
            return False

        yield post


def _with_another_value(body: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """One value, at any depth, is another; or there is a field more."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    place: Any = copy
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys) if keys and rng.random() < 0.95 else "extra"
        inner = place[key] if key in keys else None
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.6:
            place = inner
            continue
        if isinstance(place, dict):
            place[key] = rng.choice(_JSON_VALUES)
        else:
            place.append(rng.choice(_JSON_VALUES))
        return copy


@contextmanager
def message_frames() -> Iterator[Target]:
    """What server and engine process say to each other, both ways."""
    stats = EngineStats(1, 2, 3, 4, 5, 6, 7)
    sampling = SamplingParams(stop=("a",), logit_bias={5: 1.0}, seed=1, logprobs=2)
    to_engine = [
        messages.encode(messages.AddRequest("cmpl-1", [1, 2, 300], sampling, Terms(1, "key", 2.5, "mine"))),
        messages.encode(messages.AbortRequest("cmpl-1")),
    ]
    events = [
        EngineEvent("cmpl-1", [5, 6]),
        EngineEvent("cmpl-2", [], finish_reason=FinishReason.ERROR, error="the step raised"),
    ]
    from_engine = [
        messages.encode(messages.Ready(EngineInfo(128, 300), stats)),
        messages.encode(messages.StartFailed("no memory")),
        messages.encode(messages.StepEvents(events, stats)),
    ]

    def decode(rng: random.Random) -> bool:
        if rng.random() < 0.1:  # none at all, nested without end
            frame = rng.choice([b"\x91", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff"]) * rng.choice(
                [1, 1000, 100_000]
            )
            frame += rng.randbytes(rng.randrange(20))
        else:
            frame = mutate_bytes(rng.choice(to_engine + from_engine), rng)
        decoders: list[Callable[[bytes], object]] = [messages.decode_to_engine, messages.decode_from_engine]
        is_taken = False
        for decoder in decoders:
            try:
                message = decoder(frame)
            except MessageError:
                continue
            is_taken = True
            messages.encode(message)
        return is_taken

    yield decode


def _taken(target: Target, rng: random.Random) -> bool:
    try:
        return target(rng)
    except MinivllmError as error:
        is_one_line = "\n" not in str(error) or isinstance(
            error, InvalidRequestError
        )  # a template's own words
        if not str(error) or len(str(error)) > 5000 or not is_one_line:
            raise AssertionError(f"not one clear line: {error!s:.300}") from None
        return False


TARGETS: dict[str, Callable[[], Any]] = {
    "gguf": gguf_headers,
    "safetensors": safetensors_headers,
    "config": model_configs,
    "chat_template": chat_templates,
    "json": json_bodies,
    "messages": message_frames,
}
