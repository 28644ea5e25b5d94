"""A Llama-family model's shape, from ``config.json`` or GGUF metadata. No torch here: the server reads it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base and how its frequencies are stretched.

    ``kind`` is ``"default"``, ``"linear"`` (every frequency divided by ``factor``), ``"llama3"``
    (low frequencies divided by ``factor``, with a smooth ramp between two wavelengths; Llama 3.1)
    or ``"factors"`` (frequency i divided by ``factors[i]``: how GGUF files write llama3 scaling).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a Llama-architecture model that isn't a weight."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; ``num_heads`` is a multiple of it (grouped-query attention)."""
    head_dim: int
    max_position_embeddings: int
    """The context the model was made for, in tokens."""
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    """Bias in all four attention projections."""
    mlp_bias: bool
    """Bias in all three MLP projections."""
    dtype: str
    """Of the checkpoint: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Every id that ends a turn."""
