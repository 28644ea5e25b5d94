"""What the engine says offline, for the clients' checks to compare with what the server told them."""

from __future__ import annotations

import json
from pathlib import Path

from minivllm import LLM, SamplingParams

SCORED = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Berlin"),
    ("Once upon a time,", " there was a little girl who lived in a small village."),
    ("Two and two make", " five, says nobody"),
    ("Ein schöner", " Tag 🦙 für alle"),
]
"""Contexts and continuations, as an evaluation harness asks for them."""
ROLLING = "The quick brown fox jumps over the lazy dog. It does so every day, and the dog does not mind."


def write_reference(folder: Path) -> None:
    """Write the embedded model's tokenizer as transformers reads it, and ``reference.json``.

    That has, for each pair of :data:`SCORED`, ``[log probability of the continuation, whether greedy decoding
    would have given it]``, and for :data:`ROLLING` the log probability of the whole text after a begin token.
    """
    llm = LLM()
    tokenizer = llm.tokenizer
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def score(ids: list[int], num_context: int) -> tuple[float, bool]:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        (output,) = llm.generate([ids], sampling, use_tqdm=False)
        entries = output.outputs[0].prompt_logprobs
        assert entries is not None
        scored = entries[num_context - 1 :]
        return sum(entry.logprob for entry in scored), all(entry.rank == 1 for entry in scored)

    pairs = []
    for context, continuation in SCORED:
        ids = tokenizer.encode(context + continuation)
        pairs.append(score(ids, len(tokenizer.encode(context))))
    (begin,) = tokenizer.encode(tokenizer.bos_token or "")
    rolling, _ = score([begin, *tokenizer.encode(ROLLING)], 1)
    (folder / "reference.json").write_text(
        json.dumps({"texts": SCORED, "pairs": pairs, "rolling_text": ROLLING, "rolling": rolling})
    )
