"""What a model weighs: shapes of well-known ones, or that of any that can be loaded."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from minivllm.errors import ConfigError
from minivllm.models.config import ModelConfig, RopeConfig
from minivllm.weights.files import resolve_model
from minivllm.weights.loader import stored_bits

_BITS_WITH_SCALES = {4: 5.0, 8: 8.5}
"""Of a weight in memory: groups of 32 share a 16-bit scale, and in 4 bits a 16-bit minimum, too."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a step's cost depends on."""

    name: str
    config: ModelConfig
    num_mlp_matrices: int = 3
    """Per layer: 3 with a gate (SwiGLU), 2 without."""
    linear_bits: float = 16.0
    """Per weight of the layers' matrices, as they lie in memory, scales included."""
    head_bits: float = 16.0
    """Per weight of the embedding and of the matrix that makes logits."""

    @property
    def num_linear_params(self) -> int:
        """Weights of all layers' matrices: each token of a step is multiplied with all of them."""
        config = self.config
        attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
        mlp = self.num_mlp_matrices * config.hidden_size * config.intermediate_size
        return config.num_layers * (attention + mlp)

    @property
    def num_head_params(self) -> int:
        """Weights of the matrix that makes logits: only tokens that are sampled from see it."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def linear_bytes(self) -> float:
        """That each step reads."""
        return self.num_linear_params * self.linear_bits / 8

    @property
    def head_bytes(self) -> float:
        """That each step reads in which anything is sampled."""
        return self.num_head_params * self.head_bits / 8

    @property
    def weight_bytes(self) -> int:
        """In memory. Norms and biases are left out: less than a thousandth."""
        num_heads = 1 if self.config.tie_word_embeddings else 2
        return round(self.linear_bytes + num_heads * self.head_bytes)

    @property
    def attention_flops(self) -> int:
        """For one query and one key, over all layers: scores, then values, each multiplied and added."""
        return 4 * self.config.num_layers * self.config.num_heads * self.config.head_dim

    def kv_bytes(self, itemsize: int) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim * itemsize


def _config(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    heads: tuple[int, int],
    head_dim: int,
    context: int,
    *,
    is_tied: bool = False,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=is_tied,
        attention_bias=False,
        mlp_bias=False,
        dtype="bfloat16",
    )


# From each model's config.json on Hugging Face.
_CONFIGS = {
    "llama-3.1-8b": _config(128256, 4096, 14336, 32, (32, 8), 128, 131072),
    "llama-3-8b": _config(128256, 4096, 14336, 32, (32, 8), 128, 8192),
    "llama-3.1-70b": _config(128256, 8192, 28672, 80, (64, 8), 128, 131072),
    "llama-3.2-1b": _config(128256, 2048, 8192, 16, (32, 8), 64, 131072, is_tied=True),
    "llama-3.2-3b": _config(128256, 3072, 8192, 28, (24, 8), 128, 131072, is_tied=True),
    "llama-2-7b": _config(32000, 4096, 11008, 32, (32, 32), 128, 4096),
    "llama-2-13b": _config(32000, 5120, 13824, 40, (40, 40), 128, 4096),
    "mistral-7b": _config(32768, 4096, 14336, 32, (32, 8), 128, 32768),  # v0.3: no sliding window
    "opt-13b": _config(50272, 5120, 20480, 40, (40, 40), 128, 2048, is_tied=True),
    "smollm2-135m": _config(49152, 576, 1536, 30, (9, 3), 64, 8192, is_tied=True),
    "smollm2-1.7b": _config(49152, 2048, 8192, 24, (32, 32), 64, 8192, is_tied=True),
}
MODELS = {
    name: ModelShape(name=name, config=config, num_mlp_matrices=2 if name.startswith("opt") else 3)
    for name, config in _CONFIGS.items()
}
"""In 16 bits, by the names that ``--model`` takes."""


def find_model(name: str | None) -> ModelShape:
    """A model of the table by its name, or whatever ``minivllm serve --model`` takes; None: the embedded one.

    Raises:
        ConfigError: neither; lists the table.
        ModelLoadError: its configuration can't be read.
    """
    if name in MODELS:
        return MODELS[name]
    if name is not None and "/" not in name and not Path(name).exists():
        near = difflib.get_close_matches(name, MODELS, n=1)
        raise ConfigError(
            f"--model {name} is not known{f' (did you mean {near[0]}?)' if near else ''}; known are "
            f"{', '.join(MODELS)}, and whatever minivllm serve takes: folders, .gguf files, Hugging Face ids"
        )
    path = None if name is None else Path(name).expanduser()
    has_gguf = path is None or path.suffix == ".gguf" or any(path.glob("*.gguf"))
    files = resolve_model(name, load_format="auto" if has_gguf else "dummy")  # dummy: config.json is enough
    bits = [
        16.0 if (stored := stored_bits(files, weight)) is None else _BITS_WITH_SCALES[stored]
        for weight in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")
    ]
    return ModelShape(name=files.name, config=files.config, linear_bits=bits[0], head_bits=bits[1])
