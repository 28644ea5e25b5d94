"""transformers on the same model shape and the same device: ``generate``, and its continuous batching."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_parts.setting import Row, Setting, skipped
from benchmarks.gpu_parts.timing import synchronize


def transformers_peer(setting: Setting) -> Iterator[tuple[str, Row]]:
    """One sequence, a static batch, and ``generate_batch``; what fails is recorded."""
    import transformers

    model = make_model(setting)
    yield "model", {"transformers": transformers.__version__, "attention": model.config._attn_implementation}
    sizes, users = setting.sizes, setting.sizes.table_users[0]
    runs: list[tuple[str, int, Callable[..., int]]] = [
        ("generate", 1, generate),
        ("generate, static batch", users, generate),
        ("continuous batching", users, generate_batch),
    ]
    for name, batch, run in runs:
        if run is generate_batch and setting.device == "cpu":
            yield skipped(name, "on a CPU it takes minutes to size its cache")
            continue
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        row: Row = {"name": name, "users": batch}
        try:
            prompts = torch.randint(3, sizes.model["vocab_size"], (batch, sizes.prompt_tokens))
            start = time.perf_counter()
            run(setting, model, prompts, 4)  # warm-up
            row["warm_up_seconds"] = time.perf_counter() - start
            start = time.perf_counter()
            tokens = run(setting, model, prompts, sizes.output_tokens)
            seconds = time.perf_counter() - start
            row |= {"output_tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
        except Exception:  # another version, another set of things that don't work
            row["error"] = traceback.format_exc(limit=-3)
        yield "runs", row


def make_model(setting: Setting) -> Any:
    """Random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    names = {"torch_dtype", "architectures", "model_type"}
    config = LlamaConfig(**{k: v for k, v in setting.sizes.model.items() if k not in names})
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.inference_mode()
def generate(setting: Setting, model: Any, prompts: torch.Tensor, new_tokens: int) -> int:
    """All prompts in one static batch. Returns tokens that came out."""
    ids = prompts.to(setting.device)
    out: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    synchronize(torch.device(setting.device))
    return len(out) * (out.shape[1] - ids.shape[1])


def generate_batch(setting: Setting, model: Any, prompts: torch.Tensor, new_tokens: int) -> int:
    """Through transformers' own paged cache and scheduler. Returns tokens that came out."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
    )
    outputs = model.generate_batch(prompts.tolist(), generation_config=config)
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    if tokens != len(prompts) * new_tokens:
        raise RuntimeError(f"{tokens} tokens came out, not {len(prompts)} x {new_tokens}")
    return tokens
