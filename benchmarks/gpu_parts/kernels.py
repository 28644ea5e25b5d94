"""Each kernel beside the copy bandwidth of the same process, and prefill beside torch's own attention.

Query heads, KV heads and head dimension are the model's. Block tables are random, and calls take turns
over different tables and inputs, so that what they read comes from memory and not from the cache;
where one call touches little (a token or two), 64 inputs fit into the cache all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from minivllm_kernels import BLOCK_SIZE, KernelBackend, get_backend
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_parts.ceilings import copy_bandwidth
from benchmarks.gpu_parts.setting import Row, Setting, skipped
from benchmarks.gpu_parts.timing import Call, time_calls

MAX_INPUTS = 64
POOL_SHARE = 0.6
"""Of the free memory, at most, for keys and values."""


def backend_for(device: str) -> KernelBackend:
    """What is measured: Triton's kernels on CUDA, and whatever is fastest on a CPU."""
    return get_backend("triton" if device == "cuda" else "auto")


class Bench:
    """The backend, and the shape of the model's attention."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.sizes = setting, setting.sizes
        self.device = torch.device(setting.device)
        self.dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
        self.backend = backend_for(setting.device)
        model = setting.sizes.model
        self.num_heads, self.num_kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
        self.head_dim = model["head_dim"]
        self.scale = self.head_dim**-0.5
        self.bandwidth = copy_bandwidth(setting)
        self.cache_bytes = (
            torch.cuda.get_device_properties(self.device).L2_cache_size if setting.device == "cuda" else 2**20
        )

    @property
    def block_bytes(self) -> int:
        """Of one block's keys and values."""
        num_values: int = 2 * self.num_kv_heads * BLOCK_SIZE * self.head_dim
        return num_values * self.dtype.itemsize

    def random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()

    def num_inputs(self, num_bytes: int) -> int:
        """How many inputs of so many bytes are more than the cache holds; at least 2, at most 64."""
        return max(2, min(MAX_INPUTS, -(-5 * self.cache_bytes // (2 * num_bytes))))

    def row(self, calls: list[Call], num_bytes: int, *, as_graph: bool = True) -> Row:
        """Time of a call, and its rate in bytes per second against the copy's."""
        timing = time_calls(calls, self.device, self.sizes.measure_seconds, as_graph=as_graph)
        rate = num_bytes / timing.median
        return {
            "us": timing.median * 1e6,
            "best_us": timing.best * 1e6,
            "gb_per_s": rate / 1e9,
            "share_of_copy": rate / self.bandwidth,
            "method": timing.method,
        }


@torch.inference_mode()
def kernels(setting: Setting) -> Iterator[tuple[str, Row]]:
    """Decode attention, prefill attention, and what goes over the activations once."""
    torch.manual_seed(0)
    bench = Bench(setting)
    yield "backend", {"name": bench.backend.name, "copy_gb_per_s": bench.bandwidth / 1e9}
    yield from small_kernels(bench)
    yield from prefill_attention(bench)
    yield from decode_attention(bench)


def decode_attention(bench: Bench) -> Iterator[tuple[str, Row]]:
    """One query for each sequence; counted are the keys and values that it reads, once each."""
    sizes = bench.sizes
    cases = sorted(itertools.product(sizes.decode_contexts, sizes.decode_batches))
    most = max(batch * -(-context // BLOCK_SIZE) for context, batch in cases)
    if bench.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(bench.device)
        most = min(most, int(POOL_SHARE * free) // bench.block_bytes)
    shape = (most, bench.num_kv_heads, BLOCK_SIZE, bench.head_dim)
    k, v = bench.random(*shape), bench.random(*shape)
    for context, batch in cases:
        name, blocks = f"decode {batch} x {context}", -(-context // BLOCK_SIZE)
        if batch * blocks > most:
            yield skipped(name, f"{batch * blocks} blocks of keys and values, memory has room for {most}")
            continue
        num_bytes = 2 * batch * context * bench.num_kv_heads * bench.head_dim * bench.dtype.itemsize
        seq_lens = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
        query_start = torch.arange(batch + 1, dtype=torch.int32, device=bench.device)
        calls: list[Call] = []
        for _ in range(bench.num_inputs(num_bytes)):
            table = torch.randperm(most, device=bench.device)[: batch * blocks].view(batch, blocks).int()
            q = bench.random(batch, bench.num_heads, bench.head_dim)
            attend = partial(bench.backend.paged_attention, q, k, v, table, seq_lens, query_start)
            calls.append(partial(attend, scale=bench.scale, out_THD=torch.empty_like(q)))
        yield "decode attention", {"batch": batch, "context": context, **bench.row(calls, num_bytes)}


def prefill_attention(bench: Bench) -> Iterator[tuple[str, Row]]:
    """One sequence that is all new, against scaled_dot_product_attention's flash kernel without paging."""
    for tokens in bench.sizes.prefills:
        blocks = -(-tokens // BLOCK_SIZE)
        shape = (2 * blocks, bench.num_kv_heads, BLOCK_SIZE, bench.head_dim)
        k, v = bench.random(*shape), bench.random(*shape)
        q = bench.random(tokens, bench.num_heads, bench.head_dim)
        tables = torch.randperm(2 * blocks, device=bench.device).view(2, 1, blocks).int()
        seq_lens = torch.tensor([tokens], dtype=torch.int32, device=bench.device)
        query_start = torch.tensor([0, tokens], dtype=torch.int32, device=bench.device)
        attend = partial(bench.backend.paged_attention, q, k, v)
        rest = {"scale": bench.scale, "out_THD": torch.empty_like(q)}
        calls: list[Call] = [partial(attend, table, seq_lens, query_start, **rest) for table in tables]
        seconds = bench.sizes.measure_seconds
        ours = time_calls(calls, bench.device, seconds, as_graph=False)
        flops = 2 * tokens * (tokens + 1) * bench.num_heads * bench.head_dim
        row = {
            "tokens": tokens,
            "us": ours.median * 1e6,
            "tflop_per_s": flops / ours.median / 1e12,
            "method": ours.method,
        }
        try:
            call, how = sdpa_call(bench, tokens)
            theirs = time_calls([call], bench.device, seconds, as_graph=False)
            row |= {
                "torch": how,
                "torch_us": theirs.median * 1e6,
                "torch_tflop_per_s": flops / theirs.median / 1e12,
                "speed_relative_to_torch": theirs.median / ours.median,
            }
        except RuntimeError as error:
            row["torch"] = f"failed: {error}"
        yield "prefill attention", row


def sdpa_call(bench: Bench, tokens: int) -> tuple[Call, str]:
    """torch's attention of the same size, causal, and how it gets the KV heads to each query head."""
    q_1HTD = bench.random(1, bench.num_heads, tokens, bench.head_dim)
    k_1KTD, v_1KTD = (bench.random(1, bench.num_kv_heads, tokens, bench.head_dim) for _ in "kv")
    which = [SDPBackend.FLASH_ATTENTION] if bench.device.type == "cuda" else [SDPBackend.MATH]

    def attend(k: torch.Tensor, v: torch.Tensor, enable_gqa: bool) -> torch.Tensor:
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(q_1HTD, k, v, is_causal=True, enable_gqa=enable_gqa)

    try:
        attend(k_1KTD, v_1KTD, True)
        return partial(attend, k_1KTD, v_1KTD, True), f"{which[0].name}, grouped"
    except RuntimeError:  # this kernel wants as many KV heads as query heads
        group = bench.num_heads // bench.num_kv_heads
        k, v = k_1KTD.repeat_interleave(group, 1), v_1KTD.repeat_interleave(group, 1)
        return partial(attend, k, v, False), f"{which[0].name}, KV heads repeated beforehand"


def small_kernels(bench: Bench) -> Iterator[tuple[str, Row]]:
    """Bytes counted are all that is read and written."""
    model, size = bench.sizes.model, bench.dtype.itemsize
    hidden, ffn = model["hidden_size"], model["intermediate_size"]
    num_heads, num_kv_heads, head_dim = bench.num_heads, bench.num_kv_heads, bench.head_dim
    norm_weight = bench.random(hidden)

    def rms_norm(tokens: int) -> Call:
        return partial(
            bench.backend.rms_norm,
            bench.random(tokens, hidden),
            norm_weight,
            1e-5,
            bench.random(tokens, hidden),
        )

    def silu_and_mul(tokens: int) -> Call:
        return partial(bench.backend.silu_and_mul, bench.random(tokens, 2 * ffn))

    def rope_and_write_kv(tokens: int) -> Call:
        heads = bench.random(tokens, num_heads + 2 * num_kv_heads, head_dim)
        angles = torch.rand(tokens, head_dim // 2, device=bench.device)
        blocks = -(-tokens // BLOCK_SIZE) + 1
        k, v = bench.random(2, blocks, num_kv_heads, BLOCK_SIZE, head_dim)
        slots = torch.randperm(blocks * BLOCK_SIZE, device=bench.device)[:tokens]
        return partial(bench.backend.rope_and_write_kv, heads, angles.cos(), angles.sin(), k, v, slots)

    rope_bytes = (2 * num_heads + 4 * num_kv_heads) * head_dim * size + head_dim * 4
    for name, make, token_bytes in (
        ("rms_norm", rms_norm, 4 * hidden * size),
        ("rope_and_write_kv", rope_and_write_kv, rope_bytes),
        ("silu_and_mul", silu_and_mul, 3 * ffn * size),
    ):
        for tokens in bench.sizes.small_kernel_tokens:
            num_bytes = tokens * token_bytes
            calls = [make(tokens) for _ in range(bench.num_inputs(num_bytes))]
            yield "small kernels", {"kernel": name, "tokens": tokens, **bench.row(calls, num_bytes)}
