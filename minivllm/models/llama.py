"""The Llama architecture (Touvron et al. 2023; Dubey et al. 2024), for one flat batch of mixed sequences.

Shapes as in ``minivllm_kernels.interface``: T tokens of this step, N hidden size; L rows of logits,
V vocabulary.
"""

from __future__ import annotations

import torch

from minivllm.engine.batch import FlatBatch
from minivllm.models.attention import Attention, LayerCache
from minivllm.models.config import ModelConfig
from minivllm.models.layers import Linear, Placement, RMSNorm, RotaryEmbedding


class MLP:
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        size, bias = config.intermediate_size, config.mlp_bias
        self.kernels = placement.kernels
        self.gate_up_proj = Linear(config.hidden_size, size, size, bias=bias, placement=placement)
        self.down_proj = Linear(size, config.hidden_size, bias=bias, placement=placement)

    def __call__(self, x_TN: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.kernels.silu_and_mul(self.gate_up_proj(x_TN)))


class LlamaLayer:
    """Pre-norm attention, then pre-norm MLP; the sum so far travels beside as ``residual``."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.attention = Attention(config, placement)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.mlp = MLP(config, placement)

    def __call__(
        self,
        x_TN: torch.Tensor,
        residual_TN: torch.Tensor | None,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        batch: FlatBatch,
        cache: LayerCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TN, residual_TN = self.input_norm(x_TN, residual_TN)
        x_TN = self.attention(x_TN, cos_TD, sin_TD, batch, cache)
        x_TN, residual_TN = self.post_attention_norm(x_TN, residual_TN)
        return self.mlp(x_TN), residual_TN


class Llama:
    """Tokens in, logits out. Weights are uninitialised until ``weight_slots`` have been filled."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        self.config = config
        self.kernels = placement.kernels
        self.embedding = placement.empty(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, placement.device)
        self.layers = [LlamaLayer(config, placement) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.lm_head = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = torch.empty_like(self.embedding)

    def __call__(self, batch: FlatBatch, caches: list[LayerCache]) -> torch.Tensor:
        """One step. Writes this step's keys and values to ``caches``; returns logits [L, V]."""
        cos_TD, sin_TD = self.rotary(batch.positions_T)
        x_TN = self.embedding[batch.input_ids_T]
        residual_TN: torch.Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TN, residual_TN = layer(x_TN, residual_TN, cos_TD, sin_TD, batch, cache)
        # Only the last token of each sequence that gets a new one needs the large product.
        last_L = batch.logits_index_L
        x_LN, _ = self.norm(x_TN[last_L], None if residual_TN is None else residual_TN[last_L])
        return self.kernels.linear(x_LN, self.lm_head, None)

    def weight_slots(self) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor goes, by its Hugging Face name: views to copy into."""
        slots: dict[str, torch.Tensor] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm.weight,
        }
        if not self.config.tie_word_embeddings:
            slots["lm_head.weight"] = self.lm_head

        def add(prefix: str, linear: Linear, *names: str) -> None:
            for index, name in enumerate(names):
                slots[f"{prefix}.{name}.weight"] = linear.shard(index, "weight")
                if linear.bias is not None:
                    slots[f"{prefix}.{name}.bias"] = linear.shard(index, "bias")

        for number, layer in enumerate(self.layers):
            prefix = f"model.layers.{number}"
            slots[f"{prefix}.input_layernorm.weight"] = layer.input_norm.weight
            slots[f"{prefix}.post_attention_layernorm.weight"] = layer.post_attention_norm.weight
            add(f"{prefix}.self_attn", layer.attention.qkv_proj, "q_proj", "k_proj", "v_proj")
            add(f"{prefix}.self_attn", layer.attention.o_proj, "o_proj")
            add(f"{prefix}.mlp", layer.mlp.gate_up_proj, "gate_proj", "up_proj")
            add(f"{prefix}.mlp", layer.mlp.down_proj, "down_proj")
        return slots

    @property
    def num_weight_bytes(self) -> int:
        """Memory of all weights."""
        return sum(slot.numel() * slot.element_size() for slot in self.weight_slots().values())
