"""Random-weight models of Llama's many shapes against transformers, at every position of every prompt."""

from __future__ import annotations

import dataclasses
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minivllm_kernels import KVPool, LayerCache, get_backend
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from minivllm.config import BLOCK_SIZE
from minivllm.engine.batch import FlatBatch
from minivllm.engine.scheduler import ScheduledBatch, ScheduledRequest
from minivllm.models.config import ModelConfig, RopeConfig
from minivllm.models.layers import Placement, rope_frequencies
from minivllm.models.llama import Llama
from minivllm.request import Request, SamplingParams

CPU = torch.device("cpu")
TOLERANCE = 1e-4

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,  # the prompts are longer
}
# Name → what differs from a model with 8 query heads, 2 KV heads and a hidden size of 64.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama 3.1, 4:1": {"rope_parameters": LLAMA3_ROPE},
    "llama 3.1, 8:1": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama 3.1, all kinds of bias": {
        "rope_parameters": LLAMA3_ROPE,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama 3.1, odd head_dim": {"rope_parameters": LLAMA3_ROPE, "head_dim": 20},
    "3:1, as SmolLM2": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 72,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "1:1, as Llama 2": {"num_key_value_heads": 8, "rms_norm_eps": 1e-2},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "wide head_dim, attention bias": {
        "head_dim": 34,
        "hidden_size": 48,
        "attention_bias": True,
        "num_key_value_heads": 4,
    },
    "mlp bias, one layer": {"mlp_bias": True, "num_hidden_layers": 1},
    "mistral": {"sliding_window": 24, "head_dim": 8},  # prompts of 70 and 200 tokens are longer
}


def make_oracle(variant: str) -> LlamaForCausalLM | MistralForCausalLM:
    settings = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 384,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        **VARIANTS[variant],
    }
    torch.manual_seed(0)
    oracle = (
        MistralForCausalLM(MistralConfig(**settings))
        if variant == "mistral"
        else LlamaForCausalLM(LlamaConfig(**settings))
    ).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            # Large enough that attention is far from uniform, and no norm or bias is at its default.
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return oracle


def rope_config(config: LlamaConfig) -> RopeConfig:
    parameters = dict(config.rope_parameters)
    kind, theta = parameters.pop("rope_type"), parameters.pop("rope_theta")
    return RopeConfig(kind=kind, theta=theta, **parameters)


def model_config(config: LlamaConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope=rope_config(config),
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        dtype="float32",
        sliding_window=getattr(config, "sliding_window", None),
    )


def make_model(config: ModelConfig) -> Llama:
    model = Llama(config, Placement(CPU, torch.float32, get_backend("reference")))
    for slot in model.weight_slots().values():
        slot.fill_(torch.nan)  # whatever isn't loaded shows
    return model


@pytest.fixture(params=VARIANTS)
def oracle(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return make_oracle(request.param)


@pytest.fixture
def model(oracle: LlamaForCausalLM) -> Llama:
    model = make_model(model_config(oracle.config))
    state = oracle.state_dict()
    for name, slot in model.weight_slots().items():
        assert slot.shape == state[name].shape
        slot.copy_(state[name])
    return model


class PagedModel:
    """A model with sequences in a poisoned KV pool, their blocks in random order. Logits are on the CPU."""

    def __init__(self, model: Llama, prompts: list[list[int]]) -> None:
        self.model = model
        num_blocks = [-(-len(prompt) // BLOCK_SIZE) for prompt in prompts]
        pool_size = sum(num_blocks) + 3
        blocks = np.random.default_rng(1).permutation(pool_size).tolist()
        config = model.config
        shape = (pool_size, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        placement = model.placement
        poison = torch.full(shape, torch.nan, dtype=placement.dtype, device=placement.device)
        self.pool = KVPool([LayerCache(poison.clone(), poison.clone()) for _ in range(config.num_layers)])
        self.requests = []
        self.logits = [torch.full((len(prompt), config.vocab_size), torch.nan) for prompt in prompts]
        for prompt, count in zip(prompts, num_blocks, strict=True):
            request = Request("r", prompt, SamplingParams(), seed=0, max_total_tokens=len(prompt))
            request.block_table = array("i", [blocks.pop() for _ in range(count)])
            self.requests.append(request)

    def step(self, num_tokens: list[int]) -> None:
        """Compute so many more tokens of each sequence, 0 for those that sit this step out."""
        items = [
            ScheduledRequest(request, count)
            for request, count in zip(self.requests, num_tokens, strict=True)
            if count
        ]
        device = self.model.placement.device
        batch = FlatBatch.build(ScheduledBatch(items), device)
        every_token = torch.arange(len(batch.input_ids_T), device=device)
        with torch.inference_mode():
            logits = self.model(dataclasses.replace(batch, logits_index_L=every_token), self.pool)
            sampled = self.model(batch, self.pool)  # writes the same keys and values again
        if self.model.placement.dtype == torch.float32:
            torch.testing.assert_close(sampled, logits[batch.logits_index_L], rtol=1e-4, atol=1e-4)
        start = 0
        for request, count, rows in zip(self.requests, num_tokens, self.logits, strict=True):
            rows[request.num_computed_tokens : request.num_computed_tokens + count] = logits[
                start : start + count
            ]
            request.num_computed_tokens += count
            start += count

    def check_against(self, oracle: LlamaForCausalLM) -> None:
        for request, logits in zip(self.requests, self.logits, strict=True):
            assert request.num_uncomputed_tokens == 0
            with torch.no_grad():
                want = oracle(torch.tensor([request.token_ids])).logits[0].double()
            errors = (logits.double() - want).norm(dim=-1) / want.norm(dim=-1)
            assert not errors.isnan().any()
            worst = int(errors.argmax())
            assert errors[worst] <= TOLERANCE, f"relative error {errors[worst]:.1e} at position {worst}"


def random_prompts(vocab_size: int, lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


LENGTHS = [1, 16, 17, 70, 200]


@pytest.fixture
def paged(model: Llama) -> PagedModel:
    return PagedModel(model, random_prompts(model.config.vocab_size, LENGTHS))


def test_prefilled_whole(oracle: LlamaForCausalLM, paged: PagedModel) -> None:
    paged.step(LENGTHS)
    paged.check_against(oracle)


def test_prefilled_in_chunks(oracle: LlamaForCausalLM, paged: PagedModel) -> None:
    sizes = [37, 5, 16, 1, 33]  # each sequence with its own, so that they are at different places
    step = 0
    while any(remaining := [request.num_uncomputed_tokens for request in paged.requests]):
        paged.step([min(left, sizes[(row + step) % 5]) for row, left in enumerate(remaining)])
        step += 1
    paged.check_against(oracle)


def test_decoded_one_by_one(oracle: LlamaForCausalLM, paged: PagedModel) -> None:
    while any(remaining := [request.num_uncomputed_tokens for request in paged.requests]):
        paged.step([min(left, 1) for left in remaining])
    paged.check_against(oracle)


def test_prefills_and_decodes_in_one_batch(oracle: LlamaForCausalLM, paged: PagedModel) -> None:
    """Each sequence is prefilled up to some place and decoded from there, all at different times."""
    prefills = [1, 9, 17, 40, 150]
    step = 0
    while any(remaining := [request.num_uncomputed_tokens for request in paged.requests]):
        num_tokens = []
        for row, left in enumerate(remaining):
            has_started = paged.requests[row].num_computed_tokens > 0
            wanted = 1 if has_started else prefills[row] if step >= row else 0
            num_tokens.append(min(left, wanted))
        paged.step(num_tokens)
        step += 1
    paged.check_against(oracle)


def test_weight_names_are_those_of_a_saved_checkpoint(oracle: LlamaForCausalLM, tmp_path: Path) -> None:
    oracle.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as checkpoint:
        shapes = {name: tuple(checkpoint.get_slice(name).get_shape()) for name in checkpoint.keys()}  # noqa: SIM118
    slots = make_model(model_config(oracle.config)).weight_slots()
    assert {name: tuple(slot.shape) for name, slot in slots.items()} == shapes


def test_weight_slots_do_not_overlap_and_cover_every_parameter(oracle: LlamaForCausalLM) -> None:
    model = make_model(model_config(oracle.config))
    slots = model.weight_slots()
    for number, slot in enumerate(slots.values()):
        slot.fill_(float(number))
    for number, slot in enumerate(slots.values()):
        assert (slot == number).all()
    assert model.num_weight_bytes == sum(4 * p.numel() for p in oracle.parameters())


@pytest.mark.parametrize("head_dim", [16, 20, 64, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        {**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
        {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": 8192},  # Llama 3.2
    ],
    ids=str,
)
def test_rope_frequencies_at_real_scales(parameters: dict[str, Any], head_dim: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=head_dim * 8,
        num_attention_heads=8,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    want = LlamaRotaryEmbedding(config)
    have = rope_frequencies(rope_config(config), head_dim)
    torch.testing.assert_close(have, want.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 100, 8191, 8192, 131071])
    cos, sin = get_backend().rotary(have, positions)
    want_cos, want_sin = (angles[0, :, : head_dim // 2] for angles in want(torch.empty(1), positions[None]))
    torch.testing.assert_close(cos, want_cos, rtol=0, atol=0.02)  # 1e-7 of an angle of 131071
    torch.testing.assert_close(sin, want_sin, rtol=0, atol=0.02)


def test_rope_factors_are_what_gguf_files_hold() -> None:
    """Dividing by a factor per frequency gives llama3 scaling, as GGUF files write it."""
    llama3 = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_position_embeddings=8192)
    plain = rope_frequencies(RopeConfig(theta=500000.0), 64)
    scaled = rope_frequencies(llama3, 64)
    factors = tuple((plain / scaled).tolist())
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)
    by_factors = rope_frequencies(RopeConfig(theta=500000.0, kind="factors", factors=factors), 64)
    torch.testing.assert_close(by_factors, scaled, rtol=1e-6, atol=0)
