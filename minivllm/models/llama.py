"""The Llama architecture (Touvron et al. 2023; Dubey et al. 2024), for one flat batch of mixed sequences.

Shapes as in ``minivllm_kernels.interface``: T tokens of this step, N hidden size; L rows of logits,
V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from minivllm_kernels import DecoderWeights, KVPool, LayerWeights, PackedRows

from minivllm.models.config import ModelConfig
from minivllm.models.layers import (
    Linear,
    NormedLinear,
    Placement,
    WeightSlot,
    matrix_slot,
    rope_frequencies,
    slot_bytes,
)

if TYPE_CHECKING:
    from minivllm.engine.batch import FlatBatch


class LlamaLayer:
    """One layer's weights; what is computed with them is the kernels' ``decoder_layers``."""

    def __init__(self, prefix: str, config: ModelConfig, placement: Placement) -> None:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden_size, inner_size = config.hidden_size, config.intermediate_size
        self.qkv_proj = NormedLinear(
            f"{prefix}.input_layernorm",
            {f"{attention}.q_proj": q_size, f"{attention}.k_proj": kv_size, f"{attention}.v_proj": kv_size},
            hidden_size,
            bias=config.attention_bias,
            placement=placement,
        )
        self.o_proj = Linear(
            {f"{attention}.o_proj": hidden_size}, q_size, bias=config.attention_bias, placement=placement
        )
        self.gate_up_proj = NormedLinear(
            f"{prefix}.post_attention_layernorm",
            {f"{mlp}.gate_proj": inner_size, f"{mlp}.up_proj": inner_size},
            hidden_size,
            bias=config.mlp_bias,
            placement=placement,
        )
        self.down_proj = Linear(
            {f"{mlp}.down_proj": hidden_size}, inner_size, bias=config.mlp_bias, placement=placement
        )

    def weights(self) -> LayerWeights:
        """As the kernels take them."""
        qkv, o, gate_up, down = self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj
        return LayerWeights(
            attention_norm_N=qkv.norm_weight,
            qkv=qkv.weight,
            qkv_bias=qkv.bias,
            o=o.weight,
            o_bias=o.bias,
            mlp_norm_N=gate_up.norm_weight,
            gate_up=gate_up.weight,
            gate_up_bias=gate_up.bias,
            down=down.weight,
            down_bias=down.bias,
        )

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Where each of its tensors goes, by name."""
        slots: dict[str, WeightSlot] = {}
        for linear in (self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj):
            slots |= linear.weight_slots()
        return slots


class Llama:
    """Tokens in, logits out. Weights are uninitialised until ``weight_slots`` have been filled."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        self.config = config
        self.placement = placement
        self.kernels = placement.kernels
        shape = config.vocab_size, config.hidden_size
        self.embedding = placement.matrix(["model.embed_tokens.weight"], *shape)
        self.rope_frequencies = rope_frequencies(config.rope, config.head_dim).to(placement.device)
        self.layers = [
            LlamaLayer(f"model.layers.{number}", config, placement) for number in range(config.num_layers)
        ]
        self.decoder_weights = DecoderWeights([layer.weights() for layer in self.layers])
        self.norm_weight = placement.empty(config.hidden_size)
        self.lm_head = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = placement.matrix(["lm_head.weight"], *shape)

    def __call__(self, batch: FlatBatch, pool: KVPool) -> torch.Tensor:
        """One step. Writes this step's keys and values to ``pool``; returns logits [L, V]."""
        return self.logits(self.hidden(batch, pool), batch.logits_index_L)

    def hidden(self, batch: FlatBatch, pool: KVPool) -> torch.Tensor:
        """The layers alone: [T, N]. Writes this step's keys and values to ``pool``."""
        config = self.config
        return self.kernels.decoder_layers(
            self.kernels.embedding(batch.input_ids_T, self.embedding),
            self.decoder_weights,
            pool,
            self.rope_frequencies,
            batch.positions_T,
            batch.slots_T,
            batch.block_tables_BM,
            batch.seq_lens_B,
            batch.query_start_B1,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            sliding_window=config.sliding_window,
        )

    def logits(self, hidden_TN: torch.Tensor, index_L: torch.Tensor) -> torch.Tensor:
        """The last norm and the large product, for some of the step's tokens only: [L, V].

        Args:
            index_L: int64, ascending: as many as there are tokens are all of them.
        """
        hidden_LN = hidden_TN if len(index_L) == len(hidden_TN) else hidden_TN.index_select(0, index_L)
        logits_LV, _ = self.kernels.rms_norm_linear(
            hidden_LN, None, self.norm_weight, self.config.rms_norm_eps, self.lm_head
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
            slots |= layer.weight_slots()
        return slots

    @property
    def num_weight_bytes(self) -> int:
        """Memory of all weights."""
        return sum(slot_bytes(slot) for slot in self.weight_slots().values())

    @property
    def is_packed(self) -> bool:
        """Whether any of its matrices is kept in 4 or 8 bits."""
        return any(isinstance(slot, PackedRows) for slot in self.weight_slots().values())
