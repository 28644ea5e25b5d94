"""Tiny Llama models, written by other people's code: transformers, and the gguf package's writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

# Columns are multiples of 256, the block size of the K types.
TINY_METADATA: dict[str, Any] = {
    "llama.context_length": 128,
    "llama.embedding_length": 256,
    "llama.block_count": 2,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.tokens": [f"token {i}" for i in range(48)],
}
_NAMES = {  # GGUF → Hugging Face, as in llama.cpp's converter
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to the query and key rows of a Llama model."""
    halves = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def tiny_tensors(*, bias: bool = False, head: bool = True) -> dict[str, np.ndarray]:
    """Random float32 weights of the model that TINY_METADATA describes, by Hugging Face name."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (48, 256), "model.norm.weight": (256,)}
    if head:
        shapes["lm_head.weight"] = (48, 256)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in [
            ("self_attn.q_proj", 256, 256),
            ("self_attn.k_proj", 128, 256),
            ("self_attn.v_proj", 128, 256),
            ("self_attn.o_proj", 256, 256),
            ("mlp.gate_proj", 512, 256),
            ("mlp.up_proj", 512, 256),
            ("mlp.down_proj", 256, 512),
        ]:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes[f"{prefix}input_layernorm.weight"] = (256,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (256,)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def gguf_name(hf_name: str) -> str:
    """``model.layers.0.mlp.up_proj.weight`` → ``blk.0.ffn_up.weight``."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, suffix = hf_name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{ {hf: name for name, hf in _NAMES.items()}[rest] }.{suffix}"


def gguf_data(hf_name: str, values: np.ndarray) -> np.ndarray:
    """The values as a GGUF file orders them."""
    if ".q_proj." in hf_name:
        return permute(values, 4)
    return permute(values, 2) if ".k_proj." in hf_name else values


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]],
    *,
    architecture: str = "llama",
) -> Path:
    """Write a GGUF file; tensors are raw data (bytes of blocks where quantised) and their type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (data, tensor_type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_gguf(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    matrix_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """``tensors`` (Hugging Face names) as llama.cpp writes them; vectors are always F32."""
    data = {}
    for name, values in (tiny_tensors() if tensors is None else tensors).items():
        tensor_type = matrix_type if values.ndim == 2 else GGMLQuantizationType.F32
        data[gguf_name(name)] = (gguf.quantize(gguf_data(name, values), tensor_type), tensor_type)
    return write_gguf(path, TINY_METADATA | (metadata or {}), data)


def write_small_gguf(path: Path, metadata: dict[str, Any] | None = None) -> Path:
    """A file in 5 kB: every kind of tensor of a model of one layer and 32 columns."""
    shapes = {
        "token_embd.weight": (48, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.ffn_down.weight": (32, 64),
        "rope_freqs.weight": (4,),
    }
    data = {}
    for name, shape in shapes.items():
        tensor_type = GGMLQuantizationType.Q4_1 if len(shape) == 2 else GGMLQuantizationType.F32
        data[name] = (gguf.quantize(np.ones(shape, np.float32), tensor_type), tensor_type)
    sizes = {
        "llama.embedding_length": 32,
        "llama.block_count": 1,
        "llama.feed_forward_length": 64,
        "general.alignment": 32,
    }
    return write_gguf(path, TINY_METADATA | sizes | (metadata or {}), data)


def save_tiny_llama(folder: Path, *, max_shard_size: str = "1GB", **overrides: Any) -> Path:
    """Save a random LlamaForCausalLM, with its configuration changed by ``overrides``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = LlamaConfig(**settings | overrides)
    LlamaForCausalLM(config).to(config.dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
