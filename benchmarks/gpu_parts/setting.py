"""What every part of the benchmark is given: the device, the sizes, the model, and when to be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""JSON-able."""

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
"""config.json, without what only a tokenizer needs."""

TINY_LLAMA = LLAMA_3_1_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything. Tokens, unless a name says otherwise."""

    model: dict[str, Any]
    """config.json."""
    copy_bytes: int
    product_size: int
    """Rows and columns of the matrices that the ceiling multiplies."""
    decode_batches: tuple[int, ...]
    """Sequences in a call of decode attention."""
    decode_contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    """Tokens of the one sequence that a call of prefill attention reads."""
    small_kernel_tokens: tuple[int, ...]
    measure_seconds: float
    """About how long each kernel is measured."""
    decodes: tuple[tuple[int, int], ...]
    """Of steady decode steps: sequences, context."""
    profiled: tuple[tuple[int, int], ...]
    """Those of ``decodes`` that are looked into with the profiler, too."""
    decode_steps: int
    table_users: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    max_model_len: int
    """Of every engine here: what a contiguous run reserves."""


FULL = Sizes(
    model=LLAMA_3_1_8B,
    copy_bytes=4 * 2**30,
    product_size=8192,
    decode_batches=(1, 4, 16, 64, 256),
    decode_contexts=(128, 512, 2048, 8192, 32768),
    prefills=(512, 2048, 4096, 8192, 16384),
    small_kernel_tokens=(1, 128, 4096),
    measure_seconds=0.3,
    decodes=(
        *((users, 200) for users in (1, 8, 32, 50, 64, 128, 256)),
        *((users, 2048) for users in (1, 32, 128)),
    ),
    profiled=((1, 200), (50, 200), (128, 200), (256, 200), (128, 2048)),
    decode_steps=40,
    table_users=(50, 128),
    prompt_tokens=100,
    output_tokens=200,
    max_model_len=8192,
)
TINY = Sizes(
    model=TINY_LLAMA,
    copy_bytes=8 * 2**20,
    product_size=128,
    decode_batches=(1, 4),
    decode_contexts=(32, 100),
    prefills=(64,),
    small_kernel_tokens=(1, 16),
    measure_seconds=0.005,
    decodes=((1, 20), (4, 20), (2, 64)),
    profiled=((4, 20),),
    decode_steps=4,
    table_users=(6, 12),
    prompt_tokens=10,
    output_tokens=8,
    max_model_len=128,
)
SHAPES = {"llama-3.1-8b": FULL, "tiny": TINY}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One part's surroundings."""

    device: str
    """``"cuda"`` or ``"cpu"``."""
    sizes: Sizes
    folder: str
    """With the model's config.json, and nothing else."""
    engine: dict[str, Any]
    """Engine settings that were given on the command line."""
    deadline: float
    """Of this part, on :func:`time.monotonic`'s clock, which all processes of a machine share."""

    @property
    def seconds_left(self) -> float:
        """Until the deadline; never negative."""
        return max(self.deadline - time.monotonic(), 0.0)


Part = Callable[[Setting], Iterator[tuple[str, Row]]]
"""Yields (section, row) as soon as each row is known: whoever runs it may stop after any of them."""


def skipped(case: str, reason: str) -> tuple[str, Row]:
    """The row that says why a case wasn't measured."""
    return "skipped", {"case": case, "reason": reason}
