"""A small Llama 3.1 as a checkpoint, and transformers' view of it: exact, and in the checkpoint's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # the prompts are longer
}
SHAPE: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": LLAMA3_ROPE,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ERROR_FACTOR = 2.0
"""Our logits may be this many times as far from the exact ones as transformers' in the same dtype."""


@dataclass
class Oracle:
    """One model in float32 and in its own dtype, both with the same weights, which the dtype can hold."""

    exact: Any
    rounded: Any
    folder: Path
    """The checkpoint, as transformers saved it."""

    @cached_property
    def device(self) -> torch.device:
        device: torch.device = self.exact.device
        return device

    @torch.inference_mode()
    def logits(self, tokens: list[int], *, exactly: bool = True) -> torch.Tensor:
        """At every position, [tokens, V] in float32 on the CPU."""
        model = self.exact if exactly else self.rounded
        logits: torch.Tensor = model(torch.tensor([tokens], device=self.device)).logits[0]
        return logits.float().cpu()

    def near_tie(self, tokens: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What greedy decoding may choose from ``start`` on.

        Returns:
            (exact logits [tokens - start, V] of what follows each token; how far each choice may lie
            below the best of them: two errors, of its own logit and of the best one's).
        """
        exact = self.logits(tokens)
        errors = (exact - self.logits(tokens, exactly=False)).abs().max(dim=-1).values
        # The next run's error isn't small just where this one's happens to be.
        slack = 2 * ERROR_FACTOR * errors.clamp(min=float(errors.median()))
        return exact[start:], slack[start:]

    def check_greedy(self, prompt: list[int], output: list[int]) -> int:
        """Assert that each token is the exact model's choice wherever rounding can't change that.

        Returns:
            How many of the choices were that clear.
        """
        logits, slack = self.near_tie(prompt + output[:-1], len(prompt) - 1)
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        behind = best - chosen
        worst = int((behind - slack).argmax())
        assert behind[worst] <= slack[worst], (
            f"token {worst} of the answer to a prompt of {len(prompt)} tokens lies {behind[worst]:.4f} below "
            f"the best one; rounding explains {slack[worst]:.4f}"
        )
        return int((best - second > slack).sum())

    def check_same(self, prompt: list[int], output: list[int], other: list[int]) -> None:
        """Assert that two answers are equal, up to a choice that was a near-tie, if there is one."""
        assert len(output) == len(other)
        first = next((i for i, (a, b) in enumerate(zip(output, other, strict=True)) if a != b), None)
        if first is None:
            return
        logits, slack = self.near_tie(prompt + output[:first], len(prompt) - 1)
        gap = float((logits[-1, output[first]] - logits[-1, other[first]]).abs())
        assert gap <= slack[-1], (
            f"token {first} of the answer to a prompt of {len(prompt)} tokens differs, and was no near-tie: "
            f"{gap:.4f} apart, where rounding explains {slack[-1]:.4f}"
        )


def make_oracle(head_dim: int, dtype: torch.dtype, device: str, folder: Path) -> Oracle:
    """Random weights, with no norm at its default, and some tokens likelier than others.

    That makes most of the greedy choices clear: among 2,000 equal ones, most would be near-ties in 16 bits.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(attention: str) -> Any:
        config = LlamaConfig(**SHAPE, head_dim=head_dim, attn_implementation=attention)
        return LlamaForCausalLM(config).eval()

    generator = torch.Generator().manual_seed(head_dim)
    exact = model("eager")
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            if "lm_head" in name:
                parameter *= torch.exp(0.5 * torch.randn(len(parameter), 1, generator=generator))
            parameter.copy_(parameter.to(dtype))
    rounded = model("sdpa")
    rounded.load_state_dict(exact.state_dict())
    rounded.to(dtype).save_pretrained(folder)
    return Oracle(exact.to(device), rounded.to(device), folder)
