"""One chat request: the prompt that its messages and tools make, and how its answers are to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minivllm.config import ServerConfig
from minivllm.errors import InvalidRequestError
from minivllm.request import SamplingParams
from minivllm.server.grammar_check import GrammarChecker
from minivllm.server.message import MessageParser
from minivllm.server.protocol import ChatRequest
from minivllm.server.tool_protocol import NamedTool
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm.tools import reasoning
from minivllm.tools.grammar import ToolGrammar, tool_grammar
from minivllm.tools.messages import with_calls_as_text, with_instruction, with_names
from minivllm.tools.reasoning import ReasoningSplitter
from minivllm.tools.style import HERMES, STYLES, ToolStyle, style_of_template
from minivllm.tools.tool import Choice, Tool


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """How the served model writes tool calls and reasoning."""

    tools: ToolStyle | None
    """None: it can't be known, or the operator wants none."""
    template_shows_tools: bool
    reasons: bool
    no_tools_because: str = ""
    """Where ``tools`` is None."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: ServerConfig) -> ChatStyle:
        """From the flags, and where they leave it open from the chat template."""
        template, takes_tools = tokenizer.chat_template, tokenizer.chat_template_takes_tools
        if config.tool_call_parser == "auto":
            tools = style_of_template(template, takes_tools=takes_tools)
            because = "this model's chat template doesn't say in a known way how tools are called"
        else:
            tools = STYLES.get(config.tool_call_parser)
            because = "this server was started with --tool-call-parser none"
        has_tags = template is not None and any(tag in template for tag in ReasoningSplitter.markers)
        reasons = config.reasoning_parser == "think" or (config.reasoning_parser == "auto" and has_tags)
        return cls(tools, takes_tools, reasons, because)


class ChatTurn:
    """One request to a model of a style."""

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer, style: ChatStyle) -> None:
        """Raises :class:`InvalidRequestError` for tools where the style has none."""
        self._body = body
        self._tokenizer = tokenizer
        self._style = style
        self._is_reasoning = False  # the prompt has opened it
        choice = body.tool_choice or "auto"
        self._named = choice.function.name if isinstance(choice, NamedTool) else None
        self._choice: Choice = "auto" if choice == "auto" else "required"
        self._parts: list[tuple[int, str]] = []
        self._tools: list[Tool] = []
        """What the model is told of."""
        if body.tools and choice != "none":
            if style.tools is None:
                raise InvalidRequestError(
                    f"{style.no_tools_because}: the only tool_choice is 'none'; "
                    f"--tool-call-parser takes {', '.join(STYLES)}",
                    param="tools",
                )
            self._tools = [tool.as_tool() for tool in body.tools]

    @property
    def is_parsed(self) -> bool:
        """Whether an answer may be more than text."""
        return bool(self._tools) or self._style.reasons

    @property
    def shown_token_ids(self) -> frozenset[int]:
        """Special tokens that the parsers must see."""
        markers: set[str] = set()
        if self._tools and self._style.tools:
            markers.update(self._style.tools.parser.markers)
        if self._style.reasons:
            markers.update(ReasoningSplitter.markers)
        return self._tokenizer.special_ids_of(markers)

    def prepare(self, sampling: SamplingParams, max_tokens: int) -> tuple[list[list[int]], SamplingParams]:
        """The prompt's token ids, in a list, and the parameters with the grammar of the answer.

        A prompt that must have more than ``max_tokens`` is refused.
        """
        prompt = self.render()
        self._is_reasoning = self._style.reasons and prompt.rstrip().endswith(reasoning.OPEN)
        ids = self._tokenizer.encode(
            prompt, add_special_tokens=bool(self._body.add_special_tokens), max_tokens=max_tokens
        )
        grammar = self._grammar()
        if grammar is None:
            return [ids], sampling
        if sampling.grammar is not None:
            raise InvalidRequestError(
                "one answer can't follow both a format and the tools' schemas: leave one of them out",
                param="tools",
            )
        self._parts = grammar.parts
        return [ids], replace(sampling, grammar=grammar.text)

    async def check_grammar(self, grammars: GrammarChecker, grammar: str) -> None:
        """Return if the grammar that answers must follow can be served.

        Raises :class:`InvalidRequestError` that names the tool at fault, if one is.
        """
        try:
            await grammars.check(grammar, self._body.grammar_and_param[1] or "tools")
        except InvalidRequestError:
            for i, part in self._parts:
                await grammars.check(part, f"tools[{i}].function.parameters")
            raise

    def render(self) -> str:
        """The prompt's text."""
        messages: Sequence[Mapping[str, Any]] = with_names(
            [message.for_template() for message in self._body.messages]
        )
        if self._style.template_shows_tools:
            tools = [tool.for_template() for tool in self._tools] or None
            return self._tokenizer.apply_chat_template(messages, tools=tools, **self._body.template_options)
        style = self._style.tools or HERMES
        messages = with_calls_as_text(messages, style)
        if self._tools:
            messages = with_instruction(messages, self._tools, self._choice, style)
        return self._tokenizer.apply_chat_template(messages, **self._body.template_options)

    def make_parser(self) -> MessageParser:
        """For one answer to the prompt that :meth:`prepare` made."""
        splitter = ReasoningSplitter(is_open=self._is_reasoning) if self._style.reasons else None
        if not self._tools or self._style.tools is None:
            return MessageParser(splitter, None)
        return MessageParser(splitter, self._style.tools.parser([tool.name for tool in self._tools]))

    def _grammar(self) -> ToolGrammar | None:
        is_parallel = self._body.parallel_tool_calls is not False
        is_free = self._choice == "auto" and is_parallel and not any(tool.is_strict for tool in self._tools)
        if not self._tools or self._style.tools is None or is_free:
            return None
        return tool_grammar(
            self._style.tools,
            self._tools,
            self._choice,
            is_parallel=is_parallel and self._named is None,
            named=self._named,
            may_reason=self._style.reasons,
            is_reasoning=self._is_reasoning,
        )
