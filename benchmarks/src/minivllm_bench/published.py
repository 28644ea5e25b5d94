"""Figures that others have published, with where they stand and what they were measured on.

Only what a page says itself is listed; ratios are quotients of its two figures where it gives both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minivllm_bench.findings import Findings

PAGED, CONTIGUOUS, ONE_SLOT, FOUR_SLOTS = "paged", "contiguous", "sequential-1", "sequential-4"


@dataclass(frozen=True, slots=True)
class Published:
    """One claim, and what answers it in a comparison."""

    claim: str
    source: str
    url: str | None
    """None where no page was found that measured it."""
    setting: str
    """Hardware, model, software."""
    here: Callable[[Findings], str | None]
    """The same question put to this engine; None: not measured."""


def _times_at(users: int, slots: str) -> Callable[[Findings], str | None]:
    def here(findings: Findings) -> str | None:
        ratio = findings.ratio(PAGED, slots, users)
        if ratio is None:
            return None
        ours, theirs = findings.throughput(PAGED, users), findings.throughput(slots, users)
        label = findings.label(slots)
        return f"{ratio:.1f} × at {users} users: {ours:.0f} against {theirs:.0f} tok/s ({label})"

    return here


def _times_at_peak(slots: str) -> Callable[[Findings], str | None]:
    def here(findings: Findings) -> str | None:
        ratio = findings.peak_ratio(PAGED, slots)
        if ratio is None:
            return None
        ours, theirs = findings.peak(PAGED), findings.peak(slots)
        label = findings.label(slots)
        return f"{ratio:.1f} × at their peaks: {ours:.0f} against {theirs:.0f} tok/s ({label})"

    return here


def _crossing(findings: Findings) -> str | None:
    words = [findings.crossing_words(PAGED, slots) for slots in (ONE_SLOT, FOUR_SLOTS)]
    known = "; ".join(part for part in words if part is not None)
    return f"{findings.label(PAGED)} is {known}" if known else None


def _knees(findings: Findings) -> str | None:
    parts = []
    for slots in (ONE_SLOT, FOUR_SLOTS):
        if len(findings.curve(slots)) < 2:
            continue
        knee = findings.knee(slots)
        flat = "" if knee is None else f"hardly grows beyond {knee} user{'s' * (knee > 1)}"
        parts.append(f"{findings.label(slots)} {flat or 'grows up to the last count'}")
    return "; ".join(parts) or None


def _sequences_at_once(findings: Findings) -> str | None:
    for users in reversed(findings.user_counts):
        paged, contiguous = findings.occupancy(PAGED, users), findings.occupancy(CONTIGUOUS, users)
        if paged is not None and contiguous is not None:
            return (
                f"of {users} users, paged memory ran {paged['running_mean']:.0f} at once on average, the "
                f"same memory {contiguous['running_mean']:.0f} where it is contiguous"
            )
    return None


PUBLISHED = (
    Published(
        "793 against 41 tok/s at their peaks: 19 ×",
        "Red Hat Developer, Ollama vs. vLLM: a deep dive into performance benchmarking, August 2025",
        "https://developers.redhat.com/articles/2025/08/08/ollama-vs-vllm-deep-dive-performance-benchmarking",
        "1 × A100 PCIe 40 GB; Llama 3.1 8B Instruct, not quantised; vLLM against Ollama tuned for parallel "
        "requests; 1 to 256 users",
        _times_at_peak(FOUR_SLOTS),
    ),
    Published(
        "8,033 against 484 tok/s, up to 128 requests at once: 16.6 ×",
        "joshua8.ai, Benchmarking LLM inference: vLLM vs SGLang vs Ollama on NVIDIA Blackwell",
        "https://joshua8.ai/llm-inference-benchmark",
        "1 × RTX PRO 6000 Blackwell Max-Q 96 GB; Llama 3.1 8B; vLLM in NVFP4 against Ollama in 4 bits; "
        "not all of Ollama's 128 requests succeeded",
        _times_at(128, ONE_SLOT),
    ),
    Published(
        "about 920 against about 155 tok/s with 50 users: 5.9 ×",
        "SitePoint, Ollama vs vLLM: performance benchmark 2026, as summarised at capitolioxa.com",
        "https://capitolioxa.com/article/4899",
        "GPU not in the summary; Llama 3.1 8B; vLLM in FP16 against Ollama in Q4_K_M",
        _times_at(50, ONE_SLOT),
    ),
    Published(
        "about 35 tok/s against 800 and more with 50 users: 23 ×",
        "often quoted; no page was found that says what it was measured on",
        None,
        "unknown",
        _times_at(50, ONE_SLOT),
    ),
    Published(
        "4 × at 16 requests at once; behind at 1, ahead from 2 to 3 on",
        "Michael Cizmar, vLLM beats Ollama in throughput by 4x at scale, March 2026",
        "https://michaelcizmar.com/blog/2026/03/vllm-vs-ollama",
        "1 × RTX 5090; Qwen3-VL-4B; vLLM in BF16 against Ollama in Q4_K_M with 6 parallel slots",
        _times_at(16, FOUR_SLOTS),
    ),
    Published(
        "ahead from 4 requests at once on, 3.2 × at 16",
        "CraftRigs, vLLM vs Ollama concurrency benchmark",
        "https://craftrigs.pages.dev/benchmarks/vllm-vs-ollama-concurrency-benchmark",
        "24 GB graphics cards; vLLM against Ollama with its queue",
        _crossing,
    ),
    Published(
        "Ollama is fine up to 4 users, then it collapses",
        "often said; those who give figures are listed above",
        None,
        "unknown",
        _knees,
    ),
    Published(
        "token states fill 20.4, 26.8 or 38.2% of contiguous KV memory, and 96.3% of paged memory",
        "Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, "
        "SOSP 2023, Figure 2",
        "https://arxiv.org/abs/2309.06180",
        "the experiments of its section 6.2, on A100s; Orca, rebuilt with three ways to reserve "
        "memory, against vLLM",
        _sequences_at_once,
    ),
    Published(
        "existing systems waste 60 to 80% of KV memory; under 4% with paging",
        "vLLM: Easy, Fast, and Cheap LLM Serving with PagedAttention, June 2023",
        "https://github.com/vllm-project/vllm-project.github.io/blob/main/_posts/2023-06-20-vllm.md",
        "the same work as above, in its authors' words",
        _sequences_at_once,
    ),
)
