"""The Llama architecture (Touvron et al. 2023; Dubey et al. 2024), for one flat batch of mixed sequences.

Shapes as in ``minivllm_kernels.interface``: T tokens of this step, N hidden size; L rows of logits,
V vocabulary.
"""

from __future__ import annotations

import torch
from minivllm_kernels import PackedRows

from minivllm.engine.batch import FlatBatch
from minivllm.models.attention import Attention, LayerCache
from minivllm.models.config import ModelConfig
from minivllm.models.layers import (
    Linear,
    NormedLinear,
    Placement,
    RotaryEmbedding,
    WeightSlot,
    matrix_slot,
    slot_bytes,
)

Hidden = tuple[torch.Tensor, torch.Tensor | None]
"""What the layers leave: the last one's output and the residual, each [T, N], to be added."""


class MLP:
    """Norm, then SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, prefix: str, config: ModelConfig, placement: Placement) -> None:
        size, name, bias = config.intermediate_size, f"{prefix}.mlp", config.mlp_bias
        self.kernels = placement.kernels
        self.gate_up_proj = NormedLinear(
            f"{prefix}.post_attention_layernorm",
            {f"{name}.gate_proj": size, f"{name}.up_proj": size},
            config.hidden_size,
            eps=config.rms_norm_eps,
            bias=bias,
            placement=placement,
        )
        self.down_proj = Linear(
            {f"{name}.down_proj": config.hidden_size}, size, bias=bias, placement=placement
        )

    def __call__(self, x_TN: torch.Tensor, residual_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, down = self.gate_up_proj, self.down_proj
        return self.kernels.mlp_layer(
            x_TN,
            residual_TN,
            gate_up.norm_weight,
            gate_up.eps,
            gate_up.weight,
            gate_up.bias,
            down.weight,
            down.bias,
        )


class LlamaLayer:
    """Attention, then MLP, each after a norm; the sum so far travels beside as ``residual``."""

    def __init__(self, prefix: str, config: ModelConfig, placement: Placement) -> None:
        self.attention = Attention(prefix, config, placement)
        self.mlp = MLP(prefix, config, placement)

    def __call__(
        self,
        x_TN: torch.Tensor,
        residual_TN: torch.Tensor | None,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        batch: FlatBatch,
        cache: LayerCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TN, residual_TN = self.attention(x_TN, residual_TN, cos_TD, sin_TD, batch, cache)
        return self.mlp(x_TN, residual_TN)


class Llama:
    """Tokens in, logits out. Weights are uninitialised until ``weight_slots`` have been filled."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        self.config = config
        self.placement = placement
        self.kernels = placement.kernels
        shape = config.vocab_size, config.hidden_size
        self.embedding = placement.matrix(["model.embed_tokens.weight"], *shape)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, placement.device)
        self.layers = [
            LlamaLayer(f"model.layers.{number}", config, placement) for number in range(config.num_layers)
        ]
        self.norm_weight = placement.empty(config.hidden_size)
        self.lm_head = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = placement.matrix(["lm_head.weight"], *shape)

    def __call__(self, batch: FlatBatch, caches: list[LayerCache]) -> torch.Tensor:
        """One step. Writes this step's keys and values to ``caches``; returns logits [L, V]."""
        return self.logits(self.hidden(batch, caches), batch.logits_index_L)

    def hidden(self, batch: FlatBatch, caches: list[LayerCache]) -> Hidden:
        """The layers alone. Writes this step's keys and values to ``caches``."""
        cos_TD, sin_TD = self.rotary(batch.positions_T)
        x_TN = self.kernels.embedding(batch.input_ids_T, self.embedding)
        residual_TN: torch.Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TN, residual_TN = layer(x_TN, residual_TN, cos_TD, sin_TD, batch, cache)
        return x_TN, residual_TN

    def logits(self, hidden: Hidden, index_L: torch.Tensor) -> torch.Tensor:
        """The last norm and the large product, for some of the step's tokens only: [L, V]."""
        x_TN, residual_TN = hidden
        logits_LV, _ = self.kernels.rms_norm_linear(
            x_TN[index_L],
            None if residual_TN is None else residual_TN[index_L],
            self.norm_weight,
            self.config.rms_norm_eps,
            self.lm_head,
        )
        return logits_LV

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Where each checkpoint tensor goes, by its Hugging Face name."""
        vocab_size = self.config.vocab_size
        slots: dict[str, WeightSlot] = {
            "model.embed_tokens.weight": matrix_slot(self.embedding, 0, vocab_size),
            "model.norm.weight": self.norm_weight,
        }
        if not self.config.tie_word_embeddings:
            slots["lm_head.weight"] = matrix_slot(self.lm_head, 0, vocab_size)
        for layer in self.layers:
            attention, mlp = layer.attention, layer.mlp
            for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
                slots |= linear.weight_slots()
        return slots

    @property
    def num_weight_bytes(self) -> int:
        """Memory of all weights."""
        return sum(slot_bytes(slot) for slot in self.weight_slots().values())

    @property
    def is_packed(self) -> bool:
        """Whether any of its matrices is kept in 4 or 8 bits."""
        return any(isinstance(slot, PackedRows) for slot in self.weight_slots().values())
