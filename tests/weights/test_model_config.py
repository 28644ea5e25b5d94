from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from minivllm.errors import ModelLoadError
from minivllm.models.config import ModelConfig, RopeConfig
from minivllm.weights.gguf import open_gguf
from tests.weights.tiny_models import (
    TINY_METADATA,
    gguf_data,
    gguf_name,
    tiny_tensors,
    write_gguf,
    write_tiny_gguf,
)

LLAMA: dict[str, Any] = {  # Llama 3.1's config.json, smaller
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [5, 6],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
}
PLAIN = {name: value for name, value in LLAMA.items() if name not in ("rope_scaling", "rope_theta")}


def frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Rotary frequencies as RopeConfig's docstring defines them."""
    frequency = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)
        share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        share = share.clamp(0, 1)
        return share * frequency + (1 - share) * frequency / rope.factor
    assert rope.kind == "default"
    return frequency


def llama_config(settings: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**copy.deepcopy(settings))  # a copy: it writes into the rope parameters it is given


def transformers_frequencies(settings: dict[str, Any]) -> torch.Tensor:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(llama_config(settings)).inv_freq.double()


# --- config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"num_key_value_heads": None},
    ],
)
def test_what_transformers_saves_is_read_back(tmp_path: Path, overrides: dict[str, Any]) -> None:
    settings = {name: value for name, value in LLAMA.items() if name != "torch_dtype"}
    oracle = llama_config(settings | overrides | {"dtype": "float16"})
    oracle.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config == ModelConfig(
        vocab_size=oracle.vocab_size,
        hidden_size=oracle.hidden_size,
        intermediate_size=oracle.intermediate_size,
        num_layers=oracle.num_hidden_layers,
        num_heads=oracle.num_attention_heads,
        num_kv_heads=oracle.num_key_value_heads,
        head_dim=oracle.head_dim,
        max_position_embeddings=oracle.max_position_embeddings,
        rms_norm_eps=oracle.rms_norm_eps,
        rope=RopeConfig(
            theta=500000.0,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
        tie_word_embeddings=oracle.tie_word_embeddings,
        attention_bias=oracle.attention_bias,
        mlp_bias=oracle.mlp_bias,
        dtype="float16",
        bos_token_id=1,
        eos_token_ids=(5, 6),
    )


LLAMA3_SCALING = LLAMA["rope_scaling"]
ROPE_SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 12345.0},
    "null scaling": {"rope_theta": 5e5, "rope_scaling": None},
    "old linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear without theta": {"rope_scaling": {"rope_type": "linear", "factor": 2}},
    "old llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
    "new default": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    "new without type": {"rope_parameters": {"rope_theta": 3e4}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 7e4}},
    "new llama3": {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5, "factor": 32.0}},
    "theta beside": {"rope_theta": 9e4, "rope_parameters": LLAMA3_SCALING},
    "both": {
        "rope_theta": 9e4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "original from context": {
        "rope_scaling": {k: v for k, v in LLAMA3_SCALING.items() if k != "original_max_position_embeddings"},
    },
    "original beside": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {k: v for k, v in LLAMA3_SCALING.items() if k != "original_max_position_embeddings"},
    },
    "original in both": {"original_max_position_embeddings": 64, "rope_parameters": LLAMA3_SCALING},
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
def test_rope_frequencies_are_those_of_transformers(spelling: str) -> None:
    settings = PLAIN | ROPE_SPELLINGS[spelling]
    config = ModelConfig.from_hf(settings)
    torch.testing.assert_close(
        frequencies(config.rope, config.head_dim), transformers_frequencies(settings), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su", "mrope"])
@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_refused_by_name(kind: str, where: str) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(
        ModelLoadError, match=f"{where}: rope_type must be default, linear or llama3, got '{kind}'"
    ):
        ModelConfig.from_hf(PLAIN | {where: rope})


def test_end_of_turn_ids_are_those_of_both_files() -> None:
    def ids(config: Any, generation: Any) -> tuple[int, ...]:
        return ModelConfig.from_hf(
            LLAMA | {"eos_token_id": config}, {"eos_token_id": generation}
        ).eos_token_ids

    assert ids(5, [7, 5]) == (7, 5)
    assert ids([5, 6], 7) == (7, 5, 6)
    assert ids(None, 0) == (0,)
    assert ids(3, None) == (3,)
    assert ids(None, None) == ()
    assert ModelConfig.from_hf(LLAMA, {}).eos_token_ids == (5, 6)
    assert ModelConfig.from_hf(LLAMA).eos_token_ids == (5, 6)
    with pytest.raises(ModelLoadError, match=r"generation_config\.json .*eos_token_id must be"):
        ids(1, [512])


def test_an_epsilon_that_is_left_out_is_that_of_transformers() -> None:
    without = {name: value for name, value in LLAMA.items() if name != "rms_norm_eps"}
    assert ModelConfig.from_hf(without).rms_norm_eps == llama_config(without).rms_norm_eps


@pytest.mark.parametrize(
    ("given", "dtype"),
    [({"torch_dtype": "float16"}, "float16"), ({"dtype": "bfloat16"}, "bfloat16"), ({}, "float32")],
)
def test_dtype_in_both_spellings(given: dict[str, str], dtype: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != "torch_dtype"}
    assert ModelConfig.from_hf(config | given).dtype == dtype


def test_mistral_is_a_llama_with_a_sliding_window() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    llama = ModelConfig.from_hf(LLAMA)
    assert llama.sliding_window is None
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}) == llama
    for field, window in (({}, 4096), ({"sliding_window": 4096}, 4096), ({"sliding_window": 7}, 7)):
        assert ModelConfig.from_hf(mistral | field) == dataclasses.replace(llama, sliding_window=window)
    assert ModelConfig.from_hf(LLAMA | {"sliding_window": 7}) == llama  # as transformers: not its field


@pytest.mark.parametrize("window", [0, -1, 4096.0, "4096", True])
def test_bad_sliding_windows_are_refused(window: Any) -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    with pytest.raises(ModelLoadError, match=r"sliding_window must be an integer from 1"):
        ModelConfig.from_hf(mistral | {"sliding_window": window})


@pytest.mark.parametrize(
    "given",
    [
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"},
        {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]},
        {"architectures": None, "model_type": "gpt2"},
        {"architectures": None, "model_type": None},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": []},
    ],
)
def test_other_architectures_are_refused_with_what_is_supported(given: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match="supported are LlamaForCausalLM, MistralForCausalLM"):
        ModelConfig.from_hf(LLAMA | given)


def test_one_of_architecture_and_model_type_is_enough() -> None:
    expected = ModelConfig.from_hf(LLAMA)
    assert ModelConfig.from_hf(LLAMA | {"architectures": None}) == expected
    assert ModelConfig.from_hf(LLAMA | {"model_type": None}) == expected


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "64"}, "hidden_size must be an integer from 1 to 16777216, got '64'"),
    ({"hidden_size": 64.0}, "hidden_size must be an integer"),
    ({"hidden_size": True}, "hidden_size must be an integer"),
    ({"intermediate_size": -1}, "intermediate_size must be an integer"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer from 1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1"),
    ({"vocab_size": 2**40}, "vocab_size must be an integer"),
    ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ({"num_attention_heads": 6}, "head_dim is missing, and 6 heads can't share a hidden size of 64 evenly"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide the number of query heads, 8, got 3"),
    ({"num_key_value_heads": 16}, "num_key_value_heads must be an integer from 1 to 8, got 16"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"head_dim": 0}, "head_dim must be an integer from 2"),
    ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
    ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 0 to 1, got nan"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number from 0 to 1"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
    ({"attention_bias": "no"}, "attention_bias must be true or false"),
    ({"torch_dtype": "int8"}, "torch_dtype must be float32 or bfloat16 or float16, got 'int8'"),
    ({"dtype": "float64"}, "dtype must be float32 or bfloat16 or float16, got 'float64'"),
    ({"eos_token_id": 512}, "eos_token_id must be token ids from 0 to 511, got 512"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id must be token ids"),
    ({"eos_token_id": [-1]}, "eos_token_id must be token ids"),
    ({"bos_token_id": 1.0}, "bos_token_id must be token ids"),
    ({"rope_theta": 0}, "rope_theta must be a number from 1 to 1e.12, got 0"),
    ({"rope_theta": float("inf")}, "rope_theta must be a number"),
    ({"rope_scaling": ["llama3"]}, "rope_scaling must be an object"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_scaling: rope_type must be a string, got 3"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number from 1 to"),
    ({"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}}, "high_freq_factor must be above"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor is missing"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised with 'awq'"),
]


@pytest.mark.parametrize(("given", "message"), BAD_FIELDS, ids=[str(given) for given, _ in BAD_FIELDS])
def test_bad_fields_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        ModelConfig.from_hf(LLAMA | given, source="some/config.json")
    assert str(caught.value).startswith("some/config.json")
    assert isinstance(caught.value, ValueError)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from(sorted(LLAMA)), value=json_values)
def test_any_json_is_a_config_or_a_model_load_error(name: str, value: Any) -> None:
    check_loads_or_is_refused(LLAMA | {name: value})


@given(name=st.sampled_from(sorted(LLAMA3_SCALING)), value=json_values)
def test_any_json_is_a_rope_or_a_model_load_error(name: str, value: Any) -> None:
    check_loads_or_is_refused(LLAMA | {"rope_scaling": LLAMA3_SCALING | {name: value}})


def check_loads_or_is_refused(settings: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_hf(settings)
    except ModelLoadError:
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert config.head_dim % 2 == 0
    assert frequencies(config.rope, config.head_dim).isfinite().all()


# --- GGUF -------------------------------------------------------------------------------------


def from_gguf(tmp_path: Path, metadata: dict[str, Any], **kwargs: Any) -> ModelConfig:
    return ModelConfig.from_gguf(open_gguf(write_tiny_gguf(tmp_path / "m.gguf", metadata=metadata, **kwargs)))


def test_gguf_metadata(tmp_path: Path) -> None:
    config = from_gguf(tmp_path, {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 2})
    assert config == ModelConfig(
        vocab_size=48,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=128,
        rms_norm_eps=float(np.float32(1e-5)),
        rope=RopeConfig(theta=50000.0),
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2, 4),
    )


NAMED_BY_NO_KEY = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]


@pytest.mark.parametrize(
    ("metadata", "eos_token_ids"),
    [
        # Older files name one of Llama 3's three; tokens past the embedding's 48 rows never come.
        ({"tokenizer.ggml.tokens": [*map(str, range(44)), *NAMED_BY_NO_KEY, "<|im_end|>"]}, (2, 45, 46, 47)),
        ({"tokenizer.ggml.tokens": ["a", "<|end|>", "<end_of_turn>"]}, (2, 1)),
        ({"tokenizer.ggml.tokens": "not a list"}, (2,)),
        ({"tokenizer.ggml.tokens": [1, 2]}, (2,)),
        # llama.cpp's converter leaves out what is its own default.
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.eos_token_id": 7}, (7,)),
    ],
)
def test_gguf_end_tokens_that_no_key_names(
    tmp_path: Path, metadata: dict[str, Any], eos_token_ids: tuple[int, ...]
) -> None:
    assert from_gguf(tmp_path, metadata).eos_token_ids == eos_token_ids


@pytest.mark.parametrize(
    ("metadata", "bos_token_id", "eos_token_ids"),
    [
        ({"tokenizer.ggml.model": "llama"}, 1, (2,)),
        ({"tokenizer.ggml.model": "gpt2"}, None, ()),
        ({}, None, ()),  # no vocabulary at all
    ],
)
def test_ids_that_a_gguf_file_leaves_out(
    tmp_path: Path, metadata: dict[str, Any], bos_token_id: int | None, eos_token_ids: tuple[int, ...]
) -> None:
    shape = {key: value for key, value in TINY_METADATA.items() if not key.startswith("tokenizer.")}
    float32 = GGMLQuantizationType.F32
    data = {gguf_name(name): (gguf_data(name, values), float32) for name, values in tiny_tensors().items()}
    config = ModelConfig.from_gguf(open_gguf(write_gguf(tmp_path / "m.gguf", shape | metadata, data)))
    assert (config.bos_token_id, config.eos_token_ids) == (bos_token_id, eos_token_ids)


def test_what_gguf_tells_by_its_tensors(tmp_path: Path) -> None:
    config = from_gguf(tmp_path, {}, tensors=tiny_tensors(bias=True, head=False))
    assert config.tie_word_embeddings
    assert config.attention_bias
    assert config.mlp_bias


@pytest.mark.parametrize(("stored", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("Q4_1", "float16")])
def test_gguf_dtype(tmp_path: Path, stored: str, dtype: str) -> None:
    assert from_gguf(tmp_path, {}, matrix_type=GGMLQuantizationType[stored]).dtype == dtype


def test_gguf_head_dim(tmp_path: Path) -> None:
    lengths = {f"llama.attention.{kind}_length": 32 for kind in ("key", "value")}
    assert from_gguf(tmp_path, lengths | {"llama.rope.dimension_count": 32}).head_dim == 32


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({}, RopeConfig(theta=50000.0)),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, RopeConfig(theta=50000.0)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            RopeConfig(theta=50000.0, kind="linear", factor=4.0),
        ),
        ({"llama.rope.scaling.factor": 2.0}, RopeConfig(theta=50000.0, kind="linear", factor=2.0)),
        ({"llama.rope.scale_linear": 2.0}, RopeConfig(theta=50000.0, kind="linear", factor=2.0)),
        ({"llama.rope.scaling.factor": 0.0}, RopeConfig(theta=50000.0)),
    ],
)
def test_gguf_rope(tmp_path: Path, metadata: dict[str, Any], rope: RopeConfig) -> None:
    assert from_gguf(tmp_path, metadata).rope == rope


def with_rope_factors(path: Path, factors: Any, metadata: dict[str, Any]) -> ModelConfig:
    float32 = GGMLQuantizationType.F32
    data = {gguf_name(name): (gguf_data(name, values), float32) for name, values in tiny_tensors().items()}
    data["rope_freqs.weight"] = (np.array(factors, np.float32), float32)
    return ModelConfig.from_gguf(open_gguf(write_gguf(path, TINY_METADATA | metadata, data)))


def test_gguf_rope_factors_are_llama3_scaling(tmp_path: Path) -> None:
    # llama.cpp's converter writes Llama 3.1's scaling as divisors of the plain frequencies.
    hf = {
        **PLAIN,
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_SCALING,
        "hidden_size": 256,
        "num_attention_heads": 4,
    }
    plain = transformers_frequencies(
        PLAIN | {"rope_theta": 5e5, "hidden_size": 256, "num_attention_heads": 4}
    )
    divisors = (plain / transformers_frequencies(hf)).tolist()
    assert max(divisors) == pytest.approx(8)
    rope = with_rope_factors(tmp_path / "rope.gguf", divisors, {}).rope
    assert rope.kind == "factors"
    assert rope.factors == pytest.approx(divisors)


@pytest.mark.parametrize(
    ("factors", "metadata", "message"),
    [
        ([1.0] * 31, {}, "rope_freqs.weight must be 32 positive numbers"),
        ([1.0] * 31 + [0.0], {}, "rope_freqs.weight must be 32 positive numbers"),
        ([1.0] * 31 + [math.nan], {}, "rope_freqs.weight must be 32 positive numbers"),
        ([1.0] * 32, {"llama.rope.scaling.factor": 2.0}, "together with linear rope scaling"),
    ],
)
def test_bad_gguf_rope_factors(tmp_path: Path, factors: list[float], metadata: Any, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        with_rope_factors(tmp_path / "rope.gguf", factors, metadata)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": "two"}, "llama.block_count must be an integer from 1 to 1024, got 'two'"),
        ({"llama.block_count": 0}, "llama.block_count must be an integer"),
        (
            {"llama.attention.head_count_kv": [2, 2]},
            r"head_count_kv must be an integer .*got \[2, 2\]",
        ),
        (
            {"llama.attention.head_count_kv": 3},
            "head_count_kv must divide the number of query heads",
        ),
        ({"llama.attention.value_length": 32}, "value_length must equal the head dimension, 64, got 32"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count must equal the head dimension"),
        ({"llama.rope.scaling.type": "yarn"}, "scaling.type must be none or linear, got 'yarn'"),
        ({"llama.rope.freq_base": math.inf}, "freq_base must be a number"),
        ({"llama.expert_count": 8}, "experts aren't supported"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"tokenizer.ggml.eos_token_id": 48}, "eos_token_id must be token ids from 0 to 47, got 48"),
    ],
)
def test_bad_gguf_metadata_is_named(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        from_gguf(tmp_path, metadata)
    assert str(tmp_path / "m.gguf") in str(caught.value)


def test_missing_gguf_metadata_and_tensors(tmp_path: Path) -> None:
    embedding = {"token_embd.weight": (np.ones((4, 4), np.float32), GGMLQuantizationType.F32)}
    query = {"blk.0.attn_q.weight": embedding["token_embd.weight"]}
    for name, tensors, message in [
        ("none", {}, "token_embd.weight is missing"),
        ("embedding", embedding, "blk.0.attn_q.weight is missing"),
        ("both", embedding | query, "llama.embedding_length is missing"),
    ]:
        with pytest.raises(ModelLoadError, match=message):
            ModelConfig.from_gguf(open_gguf(write_gguf(tmp_path / f"{name}.gguf", {}, tensors)))


def test_other_gguf_architectures_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {}, {}, architecture="qwen2")
    with pytest.raises(ModelLoadError, match=r"general\.architecture must be llama, got 'qwen2'"):
        ModelConfig.from_gguf(open_gguf(path))


def test_no_heavy_import(run_python: Any) -> None:
    heavy = "{'torch', 'gguf', 'huggingface_hub', 'transformers', 'safetensors'}"
    for module in ("minivllm.models.config", "minivllm.weights.files"):
        assert run_python(f"import sys, {module}; print({heavy} & sys.modules.keys())") == "set()\n"
