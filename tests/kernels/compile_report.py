"""Compiles the Triton kernels for cards that needn't be here, and says what the compiler made of them.

``python -m tests.kernels.compile_report`` prints JSON, with ``--table`` a table. The kernels are compiled by
calling the functions that launch them, on CPU tensors, with a driver that has a target but no device: so
that types, alignments, tiles and constants are those of production. Another kernel is another call in
``CALLS``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

CAPABILITIES = (80, 89, 90, 100, 120)
NUM_PROCESSORS = 132  # an H100's
INSTRUCTIONS = {  # of tensor cores, and copies to shared memory that don't wait
    "HMMA": r"\bHMMA",
    "HGMMA": r"\bHGMMA",
    "UTCMMA": r"\bUTC\w*MMA",
    "LDGSTS": r"\bLDGSTS",
}


@dataclass(frozen=True)
class Case:
    """A call, its dtypes and head size, and the card to compile for."""

    call: str
    capability: int
    dtype: str
    cache_dtype: str
    head_dim: int


@dataclass(frozen=True)
class Row:
    """One kernel of a call."""

    case: Case
    kernel: str
    error: str = ""
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    num_warps: int = 0
    instructions: dict[str, int] | None = None


def attention(
    num_queries: int, num_seqs: int, num_blocks: int, **options: Any
) -> Callable[[torch.dtype, torch.dtype, int], None]:
    """A step of 32 query heads over 8 KV heads, as in Llama 3 8B."""

    def call(dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
        from minivllm_kernels.triton_attention import paged_attention

        num_tokens = num_queries * num_seqs
        cache = torch.empty(4, 8, 16, head_dim, dtype=cache_dtype)
        paged_attention(
            torch.empty(num_tokens, 48, head_dim, dtype=dtype)[:, :32],
            cache,
            cache,
            torch.empty(num_seqs, num_blocks, dtype=torch.int32),
            torch.empty(num_seqs, dtype=torch.int32),
            torch.empty(num_seqs + 1, dtype=torch.int32),
            scale=0.125,
            out_THD=torch.empty(num_tokens, 32, head_dim, dtype=dtype),
            **options,
        )

    return call


def layer(dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    """What a layer has beside attention and products, in the sizes of Llama 3 8B."""
    from minivllm_kernels.triton_elementwise import rms_norm, rope_and_write_kv, silu_and_mul

    num_tokens, cache = 128, torch.empty(4, 8, 16, head_dim, dtype=cache_dtype)
    x, angles = torch.empty(num_tokens, 4096, dtype=dtype), torch.empty(num_tokens, head_dim // 2)
    rms_norm(x, x[0], 1e-5, None)
    rms_norm(x, x[0], 1e-5, x.clone())
    silu_and_mul(torch.empty(num_tokens, 2 * 14336, dtype=dtype))
    heads = torch.empty(num_tokens, 48, head_dim, dtype=dtype)
    rope_and_write_kv(heads, angles, angles, cache, cache, torch.empty(num_tokens, dtype=torch.int64))


def sampling(dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    """Greedy and random draws from Llama 3's vocabulary, for few requests and for many, and its filters."""
    from minivllm_kernels.triton_sampling import draw, keep_likely

    for num_rows in (1, 128):
        scores, each = torch.empty(num_rows, 128_256, dtype=dtype), torch.empty(num_rows)
        draw(scores, None, None)
        draw(scores, each, torch.empty(num_rows, 2, dtype=torch.int32))
        keep_likely(scores, each, each, each, each)


CALLS: dict[str, Callable[[torch.dtype, torch.dtype, int], None]] = {
    "decode": attention(1, 128, 512),
    "decode, split": attention(1, 16, 512),
    "prefill": attention(512, 4, 512),
    "prefill, window": attention(512, 4, 512, sliding_window=4096),
    "decode, window, softcap": attention(1, 128, 512, sliding_window=4096, softcap=50.0),
    "layer": layer,
    "sampling, all": sampling,
}
"""What is compiled: functions of the activations' dtype, the cache's, and the head size."""


def all_cases() -> list[Case]:
    """Every call for every card; caches of 8 bits where cards convert them."""
    cases = [
        Case(call, capability, dtype, dtype, head_dim)
        for call, capability, dtype, head_dim in product(
            CALLS, CAPABILITIES, ("bfloat16", "float16"), (64, 128)
        )
        # What is rarer, once for each card.
        if "," not in call or (dtype, head_dim) == ("bfloat16", 128)
    ]
    for case in list(cases):
        if case.call in ("decode", "prefill", "layer") and case.capability >= 89 and case.dtype == "bfloat16":
            cases.append(replace(case, cache_dtype="float8_e4m3fn"))
    # The widest heads ask for the most shared memory.
    for call, capability in product(("decode", "prefill"), CAPABILITIES):
        cases.append(Case(call, capability, "bfloat16", "bfloat16", 256))
    return cases


class CompileOnlyDriver:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: Case) -> list[Row]:
    """The kernels that a call launches, instead of launching them."""
    from minivllm_kernels import triton_attention
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append((kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **options)))

    driver.set_active(CompileOnlyDriver(case.capability))
    limits = divmod(case.capability, 10), NUM_PROCESSORS
    triton_attention.device_limits = lambda device: limits  # type: ignore[assignment]
    JITFunction.run = compile_instead
    try:
        CALLS[case.call](getattr(torch, case.dtype), getattr(torch, case.cache_dtype), case.head_dim)
    except Exception as error:
        return [Row(case, kernel=case.call, error=repr(error)[:1000])]
    finally:
        JITFunction.run = run
    return [read_binary(case, name, kernel) for name, kernel in compiled]


def read_binary(case: Case, name: str, kernel: Any) -> Row:
    """Resources and instructions of the machine code, through the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def output(tool: str, *arguments: str) -> str:
        command = [tools / tool, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output("cuobjdump", "-res-usage", str(binary))))
        code = output("nvdisasm", str(binary))
    return Row(
        case,
        name,
        registers=int(usage["REG"]),
        spilled_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        instructions={name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
    )


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each kernel."""
    lines = [
        f"{'call':24} {'kernel':18} {'sm':>4} {'dtype':9} {'cache':14} {'D':>4} {'warps':>5} {'regs':>5} "
        f"{'spills':>6} {'shared':>7}  instructions"
    ]
    for row in rows:
        case, counts = row["case"], row["instructions"] or {}
        found = " ".join(f"{name}:{count}" for name, count in counts.items() if count)
        lines.append(
            f"{case['call']:24} {row['kernel']:18} {case['capability']:4} {case['dtype']:9} "
            f"{case['cache_dtype']:14} {case['head_dim']:4} {row['num_warps']:5} {row['registers']:5} "
            f"{row['spilled_bytes']:6} {row['shared_bytes']:7}  {found}{row['error']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        rows = [asdict(row) for rows in pool.map(compile_case, all_cases()) for row in rows]
    print(table(rows) if arguments.table else json.dumps(rows))


if __name__ == "__main__":
    main()
