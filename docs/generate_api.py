"""Writes ``docs/api.md`` from the code: ``make docs``. ``api_peers.py`` says what other servers have."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from api_peers import ABOUT, DIFFERS, OLDER_VLLM, OPENAI, ROUTES, VLLM
from fastapi import FastAPI
from pydantic import BaseModel

from minivllm.errors import InvalidRequestError
from minivllm.request import MAX_LOGIT_BIAS, SamplingParams
from minivllm.server.auth import PUBLIC_PATHS
from minivllm.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

API_MD = Path(__file__).with_name("api.md")
NO_EFFECT = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields of OpenAI's that are taken and change nothing."""
REQUESTS: dict[str, type[BaseModel]] = {
    "POST /v1/chat/completions": ChatRequest,
    "POST /v1/completions": CompletionRequest,
    "POST /tokenize": TokenizeRequest,
    "POST /detokenize": DetokenizeRequest,
}
PUBLIC_ROUTES = [f"`{path}`" for path in sorted(path.decode() for path in PUBLIC_PATHS)]
INTRODUCTION = f"""\
# The HTTP API

Generated from the code by `make docs`; `tests/test_api_docs.py` fails when it is out of date.

Bodies are JSON, with types taken literally (no `"5"` for 5), and a field that is null counts as not given.
OpenAI's fields are those that the pinned `openai` package knows, vLLM's those of its main branch in November
2026 ("older": it had them before). In the columns, **yes** is a field with an effect, **differs** one whose
effect differs as the last column says, **accepted** one that has no effect and does no harm, **no** one that
isn't there. A field that minivllm doesn't have is refused with a 400 that names it, unless the server runs
with `--ignore-unknown-fields`; vLLM ignores what it doesn't know. `/openapi.json` has the shapes of all
requests and answers, streamed ones included.

With `--api-key` every route but {", ".join(PUBLIC_ROUTES[:-1])} and {PUBLIC_ROUTES[-1]} needs the header
`Authorization: Bearer KEY`.
"""
DEBUG_ROUTES = """\
With `--debug-routes` there are also `GET /debug/steps` and `GET /debug/requests/{id}`:
[operations](operations.md#debugging-a-server).
"""
ERRORS = """\
## Errors

Errors have OpenAI's envelope, `{"error": {"message", "type", "param", "code"}}`; `param` is the field's path
(`messages[0].content`), and the message has the limit and the given value. A stream that fails midway ends
with such an event, and without `[DONE]`. Two answers have no envelope: the 503 of `/health`, `/ping` and
`/ready`, which has the fields above, and that to a CORS preflight that is refused, which is plain text.

| status | when | `code` |
|---|---|---|
"""


def main() -> str:
    """The whole document."""
    app = _make_app()
    document = app.openapi()
    parts = [INTRODUCTION, _routes(document)]
    for route, model in REQUESTS.items():
        parts.append(_request(route, model, document))
    return "\n".join([*parts, _errors()])


def _make_app() -> FastAPI:
    from minivllm.config import ServerConfig
    from minivllm.server.app import create_app
    from minivllm.server.context import ServerState
    from tests.server.fakes import FakeEngine, make_tokenizer

    tokenizer = make_tokenizer()
    return create_app(FakeEngine(tokenizer), tokenizer, ServerConfig(), "model", ServerState())


def _routes(document: dict[str, Any]) -> str:
    lines = ["## Routes", "", "| | key | OpenAI | vLLM | | answer |", "|---|---|---|---|---|---|"]
    routes = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    others = {
        "GET /metrics": "[metrics](metrics.md) in Prometheus's text format, or in OpenMetrics",
        "GET /openapi.json": "the OpenAPI document",
    }
    for route, operation in [*routes, *((route, None) for route in others)]:
        about, openai, vllm = ROUTES[route]
        answer = others.get(route, "")
        if operation is not None:
            content = operation["responses"]["200"]["content"]
            answer = _answer(content["application/json"]["schema"], document)
            answer += "; streamed, events" if "text/event-stream" in content else ""
        key = "no" if route.split()[1].encode() in PUBLIC_PATHS else "yes"
        lines.append(f"| `{route}` | {key} | {openai} | {vllm} | {about} | {answer} |")
    return "\n".join([*lines, "", DEBUG_ROUTES])


def _answer(schema: dict[str, Any], document: dict[str, Any]) -> str:
    """The names of an answer's fields."""
    shape = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    required = shape.get("required", [])
    return ", ".join(f"`{name}`" if name in required else f"(`{name}`)" for name in shape["properties"])


def _request(route: str, model: type[BaseModel], document: dict[str, Any]) -> str:
    """All fields of a request, those of other servers too."""
    texts = _docstrings(model)
    schemas = document["components"]["schemas"]
    operation = document["paths"][route.split()[1]]["post"]
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    properties = schemas[name]["properties"]
    openai, vllm = OPENAI.get(route, frozenset()), VLLM.get(route, frozenset())
    lines = [
        f"## `{route}`",
        "",
        "| field | type | default | limits | OpenAI | vLLM | minivllm | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for field in sorted(
        properties, key=lambda field: (field in NO_EFFECT, not _is_required(model, field), field)
    ):
        written = ABOUT.get((route, field)) or texts.get(field) or ABOUT.get(field)
        about = _join(written, DIFFERS.get((route, field)) or DIFFERS.get(field))
        state = "accepted" if field in NO_EFFECT else "differs" if _differs(route, field) else "yes"
        cells = [
            f"`{field}`",
            _type(properties[field], schemas),
            _default(route, model, field),
            _limits(model, field, properties[field]),
            _yes(field in openai),
            _vllm(route, field),
            state,
            about,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    missing = (openai | vllm | model.unsupported | getattr(model, "replaced", {}).keys()) - properties.keys()  # type: ignore[attr-defined]
    if missing:
        lines += ["", "Not there, and refused:", "", "| field | OpenAI | vLLM | |", "|---|---|---|---|"]
    for field in sorted(missing):
        instead = getattr(model, "replaced", {}).get(field)
        about = f"Use `{instead}`." if instead else ABOUT.get(field, "")
        lines.append(f"| `{field}` | {_yes(field in openai)} | {_vllm(route, field)} | {about} |")
    return "\n".join([*lines, ""])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _vllm(route: str, field: str) -> str:
    return "older" if field in OLDER_VLLM else _yes(field in VLLM.get(route, ()))


def _join(*texts: str | None) -> str:
    return " ".join(" ".join(text.split()) for text in texts if text).replace("``", "`").replace("|", "\\|")


def _differs(route: str, field: str) -> bool:
    return (route, field) in DIFFERS or field in DIFFERS


def _is_required(model: type[BaseModel], field: str) -> bool:
    known = model.model_fields.get(field)
    return known is not None and known.is_required()


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """What the source says below each field; the request's own words before those of SamplingParams."""
    texts: dict[str, str] = {}
    for owner in (*model.__mro__, SamplingParams):
        if not owner.__module__.startswith("minivllm"):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_text:
                texts.setdefault(statement.target.id, str(following.value.value))  # type: ignore[attr-defined]
    return texts


def _type(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = [_type(part, schemas) for part in schema[key] if part != {"type": "null"}]
            return " or ".join(dict.fromkeys(kinds))
    if "$ref" in schema:
        target = schemas[schema["$ref"].rpartition("/")[2]]
        return "object: " + ", ".join(f"`{name}`" for name in target["properties"])
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(
            f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in values
        )
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'], schemas)}"
    return {"boolean": "bool", "integer": "int", "number": "number", "string": "string"}.get(
        schema.get("type", ""), "object"
    )


def _default(route: str, model: type[BaseModel], field: str) -> str:
    if _is_required(model, field):
        return "required"
    if field == "max_tokens":
        default = getattr(model, "default_max_tokens", None)
        return "what the context holds" if default is None else str(default)
    value = model.model_fields[field].get_default() if field in model.model_fields else None
    takes_sampling = (
        value is None and route.startswith("POST /v1/") and field in SamplingParams.__dataclass_fields__
    )
    if takes_sampling:
        value = getattr(SamplingParams(), field)
    if value is None or value in ((), {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _limits(model: type[BaseModel], field: str, schema: dict[str, Any]) -> str:
    """What the checks say about values that are far too small and far too large."""
    kinds = {part.get("type") for part in schema.get("anyOf", [schema])}
    if "boolean" in kinds:
        return ""
    if field in SamplingParams.__dataclass_fields__ and "/v1/" in (model.__doc__ or ""):
        found = [_refusal(field, value) for value in (-(2.0**70), 0, 2.0**70)]
        told = list(dict.fromkeys(text.replace(".0", "") for text in found if text))
        if field == "logit_bias":
            least, _, most = (text.rpartition(" ")[2] for text in told)
            return f"values from {least} to {most}, at most {MAX_LOGIT_BIAS:,} tokens"
        return ", ".join(told[1:] if len(told) > 1 and "greater than" in told[1] else told)
    found = []
    for part in [schema, *schema.get("anyOf", ())]:
        for key, words in (
            ("minimum", "at least"),
            ("maximum", "at most"),
            ("minItems", "at least"),
            ("maxItems", "at most"),
        ):
            if abs(part.get(key, 2**63)) < 2**62:
                found.append(f"{words} {part[key]:g}")
    return ", ".join(found)


def _refusal(field: str, value: float) -> str | None:
    number: Any = value
    kind = SamplingParams.__dataclass_fields__[field].type
    if "int" in str(kind):
        number = max(-(2**62), min(2**62, int(value)))
    if field == "stop":
        number = ("x",) * (0 if value <= 0 else 1000)
    if field == "logit_bias":
        number = {5: value} if value else dict.fromkeys(range(5000), 0.0)
    if field == "stop_token_ids":
        number = (int(value),) if value < 0 else ()
    try:
        SamplingParams(**{"max_tokens": None, field: number})
    except InvalidRequestError as error:
        words = error.message.split(" must be ")[1].rpartition(", got ")[0]
        return None if words.endswith("number") else words
    return None


def _errors() -> str:
    from minivllm import errors

    rows = []
    not_answers = (errors.StartupError, errors.TraceError, errors.MessageError)
    for name, kind in vars(errors).items():
        is_error = isinstance(kind, type) and issubclass(kind, errors.MinivllmError)
        if is_error and kind is not errors.MinivllmError and not issubclass(kind, not_answers):
            about = _join((kind.__doc__ or name).partition("\n")[0])
            rows.append((kind.http_status, about, kind.code))
    body = [
        f"| {status} | {about} | {f'`{code}`' if code else ''} |"
        for status, about, code in sorted(rows, key=str)
    ]
    return ERRORS + "\n".join(body) + "\n"


if __name__ == "__main__":
    API_MD.write_text(main())
