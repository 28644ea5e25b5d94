"""minivllm: an LLM inference engine with a paged KV cache and continuous batching.

>>> from minivllm import LLM, SamplingParams
>>> llm = LLM()                                             # the embedded model
>>> llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minivllm.config import EngineConfig
from minivllm.request import CompletionOutput, FinishReason, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from minivllm.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "EngineConfig", "FinishReason", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # LLM brings torch, which takes seconds to import: only for those who ask for it.
    if name == "LLM":
        from minivllm.openmp import spin_briefly

        spin_briefly()
        from minivllm.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
