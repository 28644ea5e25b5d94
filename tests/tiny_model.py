"""A Llama of a few thousand weights, in the folder layout of a checkpoint; made to be loaded as dummy."""

from __future__ import annotations

import json
from pathlib import Path

VOCAB_SIZE = 300
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}


def write_tiny_model(folder: Path) -> str:
    """Write the configuration; returns what to give to ``--model``, with ``--load-format dummy``."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)
