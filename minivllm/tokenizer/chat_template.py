"""A model's chat template: Jinja, as Hugging Face models write it, in jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivllm.errors import InvalidRequestError

MAX_RENDERED_CHARS = 16 * 2**20
"""A template that writes more is running away: no context holds so much."""

_GIVEN_VARIABLES = ("messages", "add_generation_prompt", "tools", "documents")


class ChatTemplate:
    """A compiled template and the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises :class:`InvalidRequestError` where ``source`` isn't valid Jinja, or can't be compiled."""
        environment = _environment()
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise InvalidRequestError(
                f"the chat template isn't valid Jinja, line {error.lineno}: {error.message}"
            ) from None
        except (SyntaxError, RecursionError) as error:  # of the Python that jinja2 makes of it
            raise InvalidRequestError(f"the chat template can't be compiled: {error}") from None
        self._special_tokens = dict(special_tokens)
        read = meta.find_undeclared_variables(environment.parse(source))
        self._own_variables = read - {*_GIVEN_VARIABLES, *special_tokens, *environment.globals}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for ``messages``, and ``tools``. A message's fields that are None count as left out.

        Args:
            extra: variables of the template's own, such as ``enable_thinking``.

        Raises :class:`InvalidRequestError` with the template's message where it refuses the
        messages, with what went wrong where it can't handle them, and where it doesn't read one of
        ``extra``.
        """
        if not messages:
            raise InvalidRequestError("messages must have at least 1 message, got 0", param="messages")
        for name in extra or {}:
            if name not in self._own_variables:
                known = ", ".join(sorted(self._own_variables)) or "none"
                raise InvalidRequestError(
                    f"this model's chat template reads no {name[:80]!r}; it reads: {known}",
                    param="chat_template_kwargs",
                )
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {
            **(extra or {}),
            **self._special_tokens,
            "messages": given,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": None,
        }
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise TemplateError(f"it writes more than {MAX_RENDERED_CHARS} characters")
        except _RefusedByTemplate as error:
            raise InvalidRequestError(str(error), param="messages") from None
        # A template is code from the model's files: on messages it wasn't written for, anything may happen.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequestError(
                f"the chat template can't render these messages: {reason}", param="messages"
            ) from error
        return "".join(pieces)


def takes_tools(source: str) -> bool:
    """Whether a template reads the variable ``tools``. One that isn't valid Jinja does nothing."""
    try:
        return "tools" in meta.find_undeclared_variables(_environment().parse(source))
    except (TemplateError, RecursionError):
        return False


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )


class _RefusedByTemplate(TemplateError):
    """``raise_exception`` was called."""


class _GenerationTag(Extension):
    """``{% generation %}`` … ``{% endgeneration %}`` marks answers for training; the inside is rendered."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedByTemplate(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, >, & and ' for HTML, which a prompt doesn't want.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
