"""``minivllm generate "…"``: complete one prompt, print the text as it comes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from minivllm.config import EngineConfig, option
from minivllm.flags import Parser
from minivllm.request import SamplingParams
from minivllm.terminal import configure_logging


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The sampling flags of ``chat`` and ``generate``; :class:`SamplingParams` checks their values."""

    max_tokens: int | None = option(None, "most tokens to generate (default: what the context holds)")
    temperature: float = option(0.0, "randomness; 0 takes the most likely token, always")
    top_p: float = option(1.0, "keep the smallest set of likely tokens whose probability reaches this")
    top_k: int = option(0, "keep this many likely tokens; 0: all")
    min_p: float = option(0.0, "drop tokens less likely than this share of the most likely one")
    repetition_penalty: float = option(1.0, "above 1: tokens that occurred become less likely")

    def params(self) -> SamplingParams:
        """Raises InvalidRequestError, naming limit and value."""
        return SamplingParams(**vars(self))


def main(argv: list[str]) -> int:
    """Print the prompt's completion. Returns the exit code."""
    parser = Parser("minivllm generate", "Complete one prompt and print it.")
    parser.add_argument("prompt", help="the text to go on from")
    parser.add_config(SamplingConfig, "sampling")
    parser.add_config(EngineConfig, "engine")
    parsed = parser.parse(argv)
    config = parser.make_config(EngineConfig, parsed)
    sampling = parser.make_config(SamplingConfig, parsed).params()
    configure_logging(logging.WARNING)
    from minivllm import LLM  # torch, and seconds: after the arguments have been checked

    for delta in LLM(**vars(config)).stream(parsed.prompt, sampling):
        print(delta.text, end="", flush=True)
    print()
    return 0
