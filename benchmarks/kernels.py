"""How fast each CPU kernel is, beside the most that the same machine did in the same minute.

    python benchmarks/kernels.py [--only SUBSTRING] [--threads N] [--rounds 5] [--output FILE]

Ceilings take turns with the kernels, a few kernels after each, in several rounds, so that a clock that
drifts and neighbours that come and go meet both:

    copy    bytes read and written per second by a copy of 256 MiB
    fp32    torch's product of two large float32 matrices
    int8    the faster of torch's quantised linear and the instruction set's own multiply-add of bytes,
            from registers; a multiply-add is two operations

Shapes are the embedded model's. Weights and KV blocks come from memory rather than from the cache: each
call gets others, as each layer of a model does. Activations are the same ones each time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from minivllm.openmp import spin_briefly
from minivllm_bench import machine

spin_briefly()  # as the engine does, before torch is imported

import torch  # noqa: E402
from minivllm_kernels import BLOCK_SIZE, KernelBackend, get_backend  # noqa: E402
from minivllm_kernels.cpu import CppBackend  # noqa: E402
from minivllm_kernels.packed import PackedWeight, QuantizedRows  # noqa: E402

from minivllm.engine.huge_pages import empty_in_huge_pages  # noqa: E402

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 576, 9, 3, 64, 1536, 49152
ALL_HEADS = HEADS + 2 * KV_HEADS
WEIGHTS = {
    "qkv": (ALL_HEADS * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate-up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
    "head": (VOCABULARY, HIDDEN),
}
"""Rows and columns."""
LINEAR_TOKENS, HEAD_TOKENS, OTHER_TOKENS = (1, 8, 32, 50, 128, 512), 128, (1, 50, 512)
"""In a step; the head gets no more than its own."""
DECODES = {f"{n}x{length}": [(length, 1)] * n for n, length in ((1, 4000), (8, 1000), (50, 1000), (50, 100))}
PREFILLS = {"prefill": [(512, 512)], "mixed": [(1000, 1)] * 16 + [(1000, 256), (128, 128)]}
"""For each sequence: tokens in the cache, and how many of them are this step's."""
KV_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COPY_BYTES = 256 * 2**20
COLD_BYTES = 128 * 2**20
"""Weights of one kind, and the KV pool, are at least so large: too much for the cache."""
PRODUCT_SIZE = 1024
"""Rows and columns of the matrices that ceilings multiply."""
PEAK_PASSES = 1_000_000
TURN_SECONDS, TURN_CALLS = 0.02, 3
"""A turn takes at least so long, and so many calls."""
CASES_PER_CEILING = 10
"""Kernels that take their turns between one of the ceilings and the next."""
FOOTER = """
Share: of the ceiling named beside it, each turn's rate over the ceiling's just before, median over the
rounds. Times and rates are medians over the rounds, too; best is the best round. GB/s count weights, K and
V once each, as they are stored; for the small kernels, all that is read and written. Over 100 % is possible:
activations stay in the cache, reads alone can be faster than a copy, and where the int8 ceiling needs two
multiplications (AVX2), 4-bit weights need one of them. No kernel on all threads is faster than the empty
loop: where that takes long, something else wants the cores."""

Call = Callable[[], object]


@dataclass
class Ceiling:
    """The most that the machine does of something."""

    name: str
    unit: str
    """"GB/s" or "Gop/s"."""
    work: float
    """Bytes or operations of a call."""
    call: Call
    rates: list[float] = field(default_factory=list)
    """In ``unit``, by turn."""

    def figures(self) -> dict[str, Any]:
        """Over all turns."""
        return {"unit": self.unit, "median": statistics.median(self.rates), "best": max(self.rates)}


@dataclass
class Case:
    """One kernel with one set of arguments."""

    kernel: str
    tokens: int
    prepare: Callable[[], Call]
    """Makes the arguments, and what is timed."""
    work: Mapping[str, float]
    """Operations and bytes of a call, by the ceiling that they are measured against."""
    turns: list[tuple[float, int]] = field(default_factory=list)
    """(Seconds of a call, the turn of the ceilings just before)."""

    def row(self, ceilings: dict[str, Ceiling]) -> dict[str, Any]:
        """Microseconds of a call; by ceiling, the rate in its unit, and the share, of which 1 is all."""
        seconds = [turn_seconds for turn_seconds, _ in self.turns]
        median, rates = statistics.median(seconds), {}
        for name, work in self.work.items():
            shares = [work / 1e9 / s / ceilings[name].rates[index] for s, index in self.turns]
            rates[name] = {"rate": work / 1e9 / median, "share": statistics.median(shares)}
        times = {"median_us": 1e6 * median, "best_us": 1e6 * min(seconds)}
        return {"kernel": self.kernel, "tokens": self.tokens, **times, "rates": rates}


HEADER = f"{'kernel':<39} tokens  median µs    best µs   Gop/s        share    GB/s        share"


def line(row: dict[str, Any]) -> str:
    """The row of the table."""
    text = f"{row['kernel']:<39} {row['tokens']:>6} {row['median_us']:>10,.1f} {row['best_us']:>10,.1f}"
    for names in (("int8", "fp32"), ("copy",)):
        cells = [f"{r['rate']:7.1f} {r['share']:4.0%} of {n}" for n, r in row["rates"].items() if n in names]
        text += f" {''.join(cells):20}"
    return text.rstrip()


def seconds_per_call(call: Call) -> float:
    """Median over a turn, whose first call isn't counted."""
    call()
    seconds: list[float] = []
    end = time.perf_counter() + TURN_SECONDS
    while len(seconds) < TURN_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@torch.inference_mode()
def measure(ceilings: list[Ceiling], cases: list[Case], rounds: int) -> None:
    """Give all of them their turns. Mutates ceilings and cases."""
    calls = [(case, case.prepare()) for case in cases]
    for _ in range(rounds):
        for index, (case, call) in enumerate(calls):
            if index % CASES_PER_CEILING == 0:
                for ceiling in ceilings:
                    ceiling.rates.append(ceiling.work / 1e9 / seconds_per_call(ceiling.call))
            case.turns.append((seconds_per_call(call), len(ceilings[0].rates) - 1))


def make_ceilings(backend: KernelBackend) -> list[Ceiling]:
    """All that can be measured here; says which can't."""
    source = torch.ones(COPY_BYTES // 4)
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    ops = 2 * PRODUCT_SIZE**3
    ceilings = [
        Ceiling("copy", "GB/s", 2 * COPY_BYTES, partial(torch.empty_like(source).copy_, source)),
        Ceiling("fp32", "Gop/s", ops, partial(torch.mm, a, b)),
    ]
    for engine in ("fbgemm", "onednn"):
        try:
            ceilings.append(Ceiling(f"int8 {engine}", "Gop/s", ops, quantised_linear(engine, a, b)))
        except (AttributeError, RuntimeError):
            print(f"int8 {engine}: left out, torch doesn't have it here")
    if isinstance(backend, CppBackend):
        peak = partial(backend.peak_int8, PEAK_PASSES)
        ceilings.append(Ceiling("int8 registers", "Gop/s", 2 * peak(), peak))
    else:
        print("int8 registers: left out, only the C++ kernels have it")
    return ceilings


def quantised_linear(engine: str, x: torch.Tensor, weight: torch.Tensor) -> Call:
    """torch's product of u8 and s8 matrices, by one of its engines; RuntimeError where that isn't there."""
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quantised tensors being deprecated
        rounded = torch.quantize_per_tensor(weight, 0.02, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(rounded, None)
        x = torch.quantize_per_tensor(x, 0.02, 64, torch.quint8)
    return partial(torch.ops.quantized.linear, x, packed, 1.0, 64)


# Products

PRODUCTS: dict[str, Callable[[KernelBackend, torch.Tensor, PackedWeight], object]] = {
    "linear": lambda backend, x, weight: backend.linear(x, weight),
    "rms_norm_linear": lambda backend, x, weight: backend.rms_norm_linear(x, x, x[0], 1e-5, weight),
}


def product_cases(backend: KernelBackend) -> Iterator[Case]:
    """linear, and what normalises on the way."""
    for bits in (4, 8):
        for kernel, name, tokens in (
            *itertools.product(["linear"], WEIGHTS, LINEAR_TOKENS),
            *itertools.product(["rms_norm_linear"], ["qkv", "gate-up"], OTHER_TOKENS),
        ):
            if name != "head" or tokens <= HEAD_TOKENS:
                rows, columns = WEIGHTS[name]
                label = f"{kernel} {bits}-bit {name} {rows}x{columns}"
                num_bytes = PackedWeight(rows, columns, bits).num_bytes
                work = {"int8": 2 * tokens * rows * columns, "copy": num_bytes}
                yield Case(label, tokens, partial(product, backend, kernel, bits, name, tokens), work)


def product(backend: KernelBackend, kernel: str, bits: int, name: str, tokens: int) -> Call:
    weights, function = itertools.cycle(packed_weights(bits, name)), PRODUCTS[kernel]
    x = torch.randn(tokens, WEIGHTS[name][1])
    return lambda: function(backend, x, next(weights))


@cache
def packed_weights(bits: int, name: str) -> list[PackedWeight]:
    """Copies of a random one, larger than ``COLD_BYTES`` together."""
    rows, columns = WEIGHTS[name]
    values = torch.randint(0, 256, (rows, columns // 32, 4 * bits), dtype=torch.uint8)
    scales, mins = torch.rand(2, rows, columns // 32).half()
    if bits == 4:
        source = QuantizedRows(bits, columns, values, scales, mins)
    else:
        source = QuantizedRows(bits, columns, values.view(torch.int8), scales, None)
    first = PackedWeight(rows, columns, bits)
    first.write(0, source)
    copies = [PackedWeight(rows, columns, bits) for _ in range(COLD_BYTES // first.num_bytes)]
    for weight in copies:
        weight.blocks.copy_(first.blocks)
    return [first, *copies]


# Small kernels


@cache
def kv_pool(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random K and V caches [P, K, S, D], of ``COLD_BYTES`` together, in the memory that the engine takes."""
    num_blocks = COLD_BYTES // (2 * KV_HEADS * BLOCK_SIZE * HEAD_DIM * dtype.itemsize)
    k, v = empty_in_huge_pages(2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=dtype).normal_()
    return k, v


def draws(num_values: int, size: int) -> torch.Tensor:
    """Values below ``num_values``, none of them twice: int64 [draws, size], at most 4,096 draws."""
    num_draws = min(4096, num_values // size)
    return torch.randperm(num_values)[: num_draws * size].view(num_draws, size)


def small_cases(backend: KernelBackend) -> Iterator[Case]:
    """What goes over the activations once."""

    def rms_norm(tokens: int) -> Call:
        x, residual = torch.randn(2, tokens, HIDDEN)
        return partial(backend.rms_norm, x, torch.ones(HIDDEN), 1e-5, residual)

    def silu_and_mul(tokens: int) -> Call:
        return partial(backend.silu_and_mul, torch.randn(tokens, 2 * FFN))

    def embedding(tokens: int) -> Call:
        weight, ids = packed_weights(8, "head")[0], itertools.cycle(draws(VOCABULARY, tokens))
        return lambda: backend.embedding(next(ids), weight)

    def rope_and_write_kv(dtype: torch.dtype, tokens: int) -> Call:
        k, v = kv_pool(dtype)
        heads, angles = torch.randn(tokens, ALL_HEADS, HEAD_DIM), torch.rand(tokens, HEAD_DIM // 2)
        cos, sin = angles.cos(), angles.sin()
        slots = itertools.cycle(draws(len(k) * BLOCK_SIZE, tokens))
        return lambda: backend.rope_and_write_kv(heads, cos, sin, k, v, next(slots))

    embedding_bytes = PackedWeight(*WEIGHTS["head"], 8).num_bytes / VOCABULARY + HIDDEN * 4
    rope_bytes = (ALL_HEADS + HEADS + 2) * HEAD_DIM * 4  # heads, rotated queries, cos and sin
    kernels: dict[str, tuple[Callable[[int], Call], float]] = {  # and bytes of a token
        "rms_norm": (rms_norm, 4 * HIDDEN * 4),
        "silu_and_mul": (silu_and_mul, 3 * FFN * 4),
        "embedding 8-bit": (embedding, embedding_bytes),
    }
    for name, dtype in KV_DTYPES.items():
        written = 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
        kernels[f"rope_and_write_kv {name}"] = partial(rope_and_write_kv, dtype), rope_bytes + written
    for (name, (prepare, num_bytes)), tokens in itertools.product(kernels.items(), OTHER_TOKENS):
        yield Case(name, tokens, partial(prepare, tokens), {"copy": tokens * num_bytes})


# Attention


def attention_cases(backend: KernelBackend) -> Iterator[Case]:
    """Decodes count bytes of K and V; the rest, 4 D operations for each query head and visible key."""
    for (name, sequences), (kv, dtype) in itertools.product((DECODES | PREFILLS).items(), KV_DTYPES.items()):
        if name in DECODES:
            num_tokens = sum(length for length, _ in sequences)
            work = {"copy": 2 * num_tokens * KV_HEADS * HEAD_DIM * dtype.itemsize}
        else:
            visible = sum(sum(range(length - queries + 1, length + 1)) for length, queries in sequences)
            work = {"fp32": 4 * visible * HEADS * HEAD_DIM}
        prepare = partial(attention, backend, sequences, dtype)
        yield Case(f"paged_attention {kv} {name}", sum(n for _, n in sequences), prepare, work)


def attention(backend: KernelBackend, sequences: list[tuple[int, int]], dtype: torch.dtype) -> Call:
    """The sequences' blocks lie anywhere in the pool; each call gets others."""
    k, v = kv_pool(dtype)
    ends = [*itertools.accumulate(-(-length // BLOCK_SIZE) for length, _ in sequences)]
    most = max(end - start for start, end in zip([0, *ends], ends, strict=False))
    # Where in a draw each table's entries are; those past a sequence's last block are never followed.
    index_BM = (torch.tensor([0, *ends[:-1]])[:, None] + torch.arange(most)).clamp(max=ends[-1] - 1)
    tables = itertools.cycle(draws(len(k), ends[-1])[:, index_BM].int())
    seq_lens = torch.tensor([length for length, _ in sequences], dtype=torch.int32)
    starts = [0, *itertools.accumulate(queries for _, queries in sequences)]
    q, query_start = torch.randn(starts[-1], HEADS, HEAD_DIM), torch.tensor(starts, dtype=torch.int32)
    attend = partial(backend.paged_attention, q, k, v, scale=HEAD_DIM**-0.5, out_THD=torch.empty_like(q))
    return lambda: attend(next(tables), seq_lens, query_start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the CPU kernels, beside the machine's.")
    parser.add_argument("--threads", type=int, help="that compute (default: one per core)")
    parser.add_argument("--backend", default="auto", help="kernels to measure (default: auto)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these (default: 5)")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="kernels whose name contains it")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file, too")
    args = parser.parse_args()
    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        parser.error(f"--rounds and --threads must be at least 1, got {args.rounds} and {args.threads}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        backend = get_backend(args.backend)
    except ValueError as error:
        parser.error(f"--backend: {error}")
    cases = [*product_cases(backend), *small_cases(backend), *attention_cases(backend)]
    cases = [case for case in cases if args.only in case.kernel]
    if not cases:
        parser.error(f"--only: no kernel's name contains {args.only!r}")
    if isinstance(backend, CppBackend):
        cases.insert(0, Case("(empty loop on all threads)", 0, lambda: partial(backend.peak_int8, 0), {}))

    busy = machine.warn_if_busy()
    torch.manual_seed(0)
    ceilings = make_ceilings(backend)
    measure(ceilings, cases, args.rounds)

    print(f"{backend.name} kernels, {torch.get_num_threads()} threads, {args.rounds} rounds\n")
    figures = {ceiling.name: ceiling.figures() for ceiling in ceilings}
    for name, values in figures.items():
        print(f"{name:<15} median {values['median']:6.1f}  best {values['best']:6.1f}  {values['unit']}")
    by_name = {ceiling.name: ceiling for ceiling in ceilings}
    products = [ceiling for ceiling in ceilings if ceiling.name.startswith("int8")] or [by_name["fp32"]]
    by_name["int8"] = max(products, key=lambda ceiling: statistics.median(ceiling.rates))
    print(f"int8 below is {by_name['int8'].name}\n\n{HEADER}")
    rows = [case.row(by_name) for case in cases]
    print(*map(line, rows), FOOTER, sep="\n")
    if args.output is not None:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine.describe(),
            "busy processes": busy,
            "commit": machine.revision(Path(__file__).parent),
            "backend": backend.name,
            "threads": torch.get_num_threads(),
            "rounds": args.rounds,
            "ceilings": figures,
            "int8_ceiling": by_name["int8"].name,
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
