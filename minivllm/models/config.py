"""A Llama-family model's shape, from ``config.json`` or GGUF metadata.

No torch here: the server reads it too.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.errors import ModelLoadError
from minivllm.weights.fields import Fields
from minivllm.weights.gguf_roles import default_token_id, end_token_ids

if TYPE_CHECKING:
    from minivllm.weights.gguf import GGUFFile

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
"""What can be loaded: ``architectures`` and ``model_type`` of a config.json."""

# transformers' defaults, where a config doesn't say:
_RMS_NORM_EPS = 1e-6
_MISTRAL_SLIDING_WINDOW = 4096
_DTYPES = ("float32", "bfloat16", "float16")
_MAX_SIZE = 2**24  # of anything that is counted: far above any model, far below what would overflow
_MAX_LAYERS = 2**10
_MAX_CONTEXT = 2**30


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
    sliding_window: int | None = None
    """Tokens that a query sees, itself included; None: all tokens up to its own."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Every id that ends a turn."""

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        *,
        source: str = "config.json",
    ) -> ModelConfig:
        """From the contents of ``config.json`` and, where there is one, ``generation_config.json``.

        Raises:
            ModelLoadError: a field is missing, of the wrong type or out of range, or asks for what
                isn't supported; the message begins with ``source`` and names the field.
        """
        fields = Fields(config, source)
        architecture = _check_architecture(fields)
        hidden_size = fields.integer("hidden_size", 1, _MAX_SIZE)
        num_heads = fields.integer("num_attention_heads", 1, _MAX_SIZE)
        max_position_embeddings = fields.integer("max_position_embeddings", 1, _MAX_CONTEXT)
        vocab_size = fields.integer("vocab_size", 1, _MAX_SIZE)
        fields.choice("hidden_act", ("silu",), "silu")
        eos_token_ids = fields.token_ids("eos_token_id", vocab_size)
        if generation_config is not None:
            generation = Fields(generation_config, f"generation_config.json beside {source}")
            eos_token_ids = generation.token_ids("eos_token_id", vocab_size) + eos_token_ids
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", 1, _MAX_SIZE),
            num_layers=fields.integer("num_hidden_layers", 1, _MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(fields, "num_key_value_heads", num_heads),
            head_dim=_head_dim(fields, "head_dim", hidden_size, num_heads),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=_RMS_NORM_EPS
            if "rms_norm_eps" not in fields.values
            else fields.number("rms_norm_eps", 0.0, 1.0),
            rope=_rope_from_hf(fields, max_position_embeddings),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            attention_bias=fields.boolean("attention_bias", False),
            mlp_bias=fields.boolean("mlp_bias", False),
            # transformers 5 writes dtype, older versions torch_dtype
            dtype=fields.choice(
                "torch_dtype" if fields.get("dtype") is None else "dtype", _DTYPES, "float32"
            ),
            sliding_window=_sliding_window(fields) if architecture == "MistralForCausalLM" else None,
            bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        )

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """From a GGUF file's metadata, and what only its list of tensors tells.

        Raises:
            ModelLoadError: as :meth:`from_hf`.
        """
        fields = Fields(file.metadata, str(file.path))
        architecture = fields.string("general.architecture")
        if architecture != "llama":
            given = reprlib.repr(architecture)
            raise ModelLoadError(f"{file.path}: general.architecture must be llama, got {given}")
        if fields.integer("split.count", 0, 2**16, 0) > 1:
            raise ModelLoadError(
                f"{file.path}: one part of a split model; join the parts with llama-gguf-split --merge"
            )
        if fields.integer("llama.expert_count", 0, 2**16, 0) > 0:
            raise ModelLoadError(f"{file.path}: llama.expert_count is above 0: experts aren't supported")
        for name in ("token_embd.weight", "blk.0.attn_q.weight"):
            if name not in file.tensors:
                raise ModelLoadError(f"{file.path}: tensor {name} is missing")

        hidden_size = fields.integer("llama.embedding_length", 1, _MAX_SIZE)
        num_heads = fields.integer("llama.attention.head_count", 1, _MAX_SIZE)
        head_dim = _head_dim(fields, "llama.attention.key_length", hidden_size, num_heads)
        for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if fields.integer(name, 1, _MAX_SIZE, head_dim) != head_dim:
                raise ModelLoadError(
                    f"{file.path}: {name} must equal the head dimension, {head_dim}, got {fields.get(name)}"
                )
        vocab_size = file.tensors["token_embd.weight"].shape[0]
        eos_token_ids = [
            token_id
            for role in ("eos", "eot", "eom")  # end of sequence, of turn, of message
            for token_id in _token_ids_from_gguf(fields, role, vocab_size)
        ]
        eos_token_ids += [token_id for token_id in end_token_ids(file.metadata) if token_id < vocab_size]
        weight_type = file.tensors["blk.0.attn_q.weight"].type
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("llama.feed_forward_length", 1, _MAX_SIZE),
            num_layers=fields.integer("llama.block_count", 1, _MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(fields, "llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            max_position_embeddings=fields.integer("llama.context_length", 1, _MAX_CONTEXT),
            rms_norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon", 0.0, 1.0),
            rope=_rope_from_gguf(fields, file.rope_factors, head_dim),
            tie_word_embeddings="output.weight" not in file.tensors,
            attention_bias=any(name.endswith((".attn_q.bias", ".attn_output.bias")) for name in file.tensors),
            mlp_bias=any(name.endswith((".ffn_up.bias", ".ffn_down.bias")) for name in file.tensors),
            # Scales of quantised blocks are float16: that holds every value to within rounding.
            dtype={"F32": "float32", "BF16": "bfloat16"}.get(weight_type, "float16"),
            bos_token_id=next(iter(_token_ids_from_gguf(fields, "bos", vocab_size)), None),
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        )


def _check_architecture(fields: Fields) -> str:
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    if architectures is None:
        architectures = [name for name, known in ARCHITECTURES.items() if known == model_type]
    is_known = (
        isinstance(architectures, list)
        and len(architectures) == 1
        and isinstance(architectures[0], str)
        and architectures[0] in ARCHITECTURES
        and model_type in (None, ARCHITECTURES[architectures[0]])
    )
    if not is_known:
        raise ModelLoadError(
            f"{fields.source}: architectures {reprlib.repr(architectures)} with model_type "
            f"{reprlib.repr(model_type)} isn't supported; supported are {', '.join(ARCHITECTURES)}"
        )
    quantization = fields.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelLoadError(
            f"{fields.source}: quantization_config: checkpoints quantised with {reprlib.repr(method)} "
            f"aren't supported"
        )
    architecture: str = architectures[0]
    return architecture


def _sliding_window(fields: Fields) -> int | None:
    """Null is none; what isn't there is transformers' default."""
    if fields.values.get("sliding_window", _MISTRAL_SLIDING_WINDOW) is None:
        return None
    return fields.integer("sliding_window", 1, _MAX_CONTEXT, _MISTRAL_SLIDING_WINDOW)


def _num_kv_heads(fields: Fields, name: str, num_heads: int) -> int:
    num_kv_heads = fields.integer(name, 1, num_heads, num_heads)
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"{fields.source}: {name} must divide the number of query heads, {num_heads}, got {num_kv_heads}"
        )
    return num_kv_heads


def _head_dim(fields: Fields, name: str, hidden_size: int, num_heads: int) -> int:
    if fields.get(name) is None and hidden_size % num_heads:
        raise ModelLoadError(
            f"{fields.source}: {name} is missing, and {num_heads} heads can't share "
            f"a hidden size of {hidden_size} evenly"
        )
    head_dim = fields.integer(name, 2, _MAX_SIZE, hidden_size // num_heads)
    if head_dim % 2:
        raise ModelLoadError(
            f"{fields.source}: {name} must be even for rotary position embedding, got {head_dim}"
        )
    return head_dim


def _rope_from_hf(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Both spellings: ``rope_theta`` and ``rope_scaling``, or transformers 5's ``rope_parameters``."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    parameters = fields.get(name) or {}
    if not isinstance(parameters, dict):
        raise ModelLoadError(f"{fields.source}: {name} must be an object, got {reprlib.repr(parameters)}")
    # What the inner object lacks may stand beside it.
    beside = {key: fields.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = Fields({**beside, **parameters}, f"{fields.source}: {name}")
    kind = rope.string("rope_type", rope.string("type", "default"))
    theta = rope.number("rope_theta", 1.0, 1e12, RopeConfig.theta)
    if rope.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raise ModelLoadError(f"{rope.source}: partial_rotary_factor other than 1 isn't supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ("linear", "llama3"):
        raise ModelLoadError(
            f"{rope.source}: rope_type must be default, linear or llama3, got {reprlib.repr(kind)}"
        )
    factor = rope.number("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    low_freq_factor = rope.number("low_freq_factor", 1e-6, 1e6)
    high_freq_factor = rope.number("high_freq_factor", 1e-6, 1e6)
    if high_freq_factor <= low_freq_factor:
        raise ModelLoadError(
            f"{rope.source}: high_freq_factor must be above low_freq_factor, "
            f"got {high_freq_factor:g} and {low_freq_factor:g}"
        )
    # This one counts where it stands beside, even if the inner object has it too.
    where = rope if fields.get("original_max_position_embeddings") is None else fields
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original_max_position_embeddings=where.integer(
            "original_max_position_embeddings", 1, _MAX_CONTEXT, max_position_embeddings
        ),
    )


def _token_ids_from_gguf(fields: Fields, role: str, vocab_size: int) -> list[int]:
    token_ids = fields.token_ids(f"tokenizer.ggml.{role}_token_id", vocab_size)
    default = None if token_ids else default_token_id(fields.values, role)
    return token_ids if default is None or default >= vocab_size else [default]


def _rope_from_gguf(fields: Fields, factors: tuple[float, ...], head_dim: int) -> RopeConfig:
    """As llama.cpp reads them: a scaling factor without a type is linear, and 0 is no scaling."""
    theta = fields.number("llama.rope.freq_base", 1.0, 1e12, RopeConfig.theta)
    kind = fields.string("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ModelLoadError(
            f"{fields.source}: llama.rope.scaling.type must be none or linear, got {reprlib.repr(kind)}"
        )
    old_factor = fields.number("llama.rope.scale_linear", 0.0, 1e6, 1.0)
    factor = fields.number("llama.rope.scaling.factor", 0.0, 1e6, old_factor)
    is_linear = kind == "linear" and factor not in (0.0, 1.0)
    if not factors:
        return RopeConfig(theta=theta, kind="linear", factor=factor) if is_linear else RopeConfig(theta=theta)
    if len(factors) != head_dim // 2 or not all(math.isfinite(value) and value > 0 for value in factors):
        raise ModelLoadError(
            f"{fields.source}: rope_freqs.weight must be {head_dim // 2} positive numbers, "
            f"got {reprlib.repr(factors)}"
        )
    if is_linear:
        raise ModelLoadError(
            f"{fields.source}: rope_freqs.weight together with linear rope scaling isn't supported"
        )
    return RopeConfig(theta=theta, kind="factors", factors=factors)
