"""``minivllm chat``: a conversation in the terminal, the engine in this process.

``/reset`` forgets the conversation, ``/exit`` or Ctrl-D leaves, Ctrl-C stops an answer.
"""

from __future__ import annotations

import contextlib
import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.config import EngineConfig, option
from minivllm.errors import InvalidRequestError
from minivllm.flags import Parser
from minivllm.generate import SamplingConfig
from minivllm.request import SamplingParams
from minivllm.terminal import configure_logging
from minivllm.tokenizer.load import read_chat_template

if TYPE_CHECKING:
    from minivllm.llm import LLM


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """The flags of ``chat`` alone."""

    system: str | None = option(None, "a system message to begin with (default: the chat template's own)")
    chat_template: str | None = option(None, "a file with a Jinja chat template (default: the model's own)")


def main(argv: list[str]) -> int:
    """Talk until the user leaves. Returns the exit code."""
    parser = Parser("minivllm chat", "Talk to a model in the terminal.")
    parser.add_config(ChatConfig, "chat")
    parser.add_config(SamplingConfig, "sampling")
    parser.add_config(EngineConfig, "engine")
    parsed = parser.parse(argv)
    config = parser.make_config(EngineConfig, parsed)
    sampling = parser.make_config(SamplingConfig, parsed).params()
    chat_config = parser.make_config(ChatConfig, parsed)
    configure_logging(logging.WARNING)
    path = chat_config.chat_template
    template = None if path is None else read_chat_template(Path(path))
    print("loading the model …", flush=True)
    from minivllm import LLM  # torch, and seconds: after the arguments have been checked

    llm = LLM(**vars(config))
    if template is not None:
        llm.tokenizer.set_chat_template(template)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history
    print("/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
    talk(llm, sampling, chat_config.system)
    return 0


def talk(llm: LLM, sampling: SamplingParams, system: str | None) -> None:
    """Read, answer, repeat."""
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text == "/exit":
            return
        if text == "/reset":
            messages = list(start)
            print("(forgotten)")
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": answer(llm, messages, sampling)})
            except InvalidRequestError as error:
                print(f"({error}; /reset forgets the conversation)")
                messages.pop()


def answer(llm: LLM, messages: list[dict[str, str]], sampling: SamplingParams) -> str:
    """Print the model's answer as it comes; what had come when Ctrl-C stopped it counts as the answer."""
    parts = []
    stream = llm.stream(llm.tokenizer.encode_chat(messages), sampling)
    with closing(stream) as deltas:
        try:
            for delta in deltas:
                parts.append(delta.text)
                print(delta.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
    print()
    return "".join(parts)
