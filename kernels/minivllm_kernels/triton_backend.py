"""The Triton kernels behind the common interface, for CUDA. See ``interface.py`` for shapes."""

from __future__ import annotations

import torch

from minivllm_kernels import triton_attention, triton_elementwise, triton_sampling
from minivllm_kernels.reference import ReferenceBackend


class TritonBackend(ReferenceBackend):
    """Triton kernels, and torch's own matrix products (cuBLAS) and look-ups.

    Activations are bfloat16, float16 or float32; the KV cache may have another of these dtypes, or
    float8_e4m3fn.
    """

    name = "triton"
    is_capturable = True

    def rms_norm(
        self, x_TN: torch.Tensor, weight_N: torch.Tensor, eps: float, residual_TN: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return triton_elementwise.rms_norm(x_TN, weight_N, eps, residual_TN)

    def rope_and_write_kv(
        self,
        heads_TAD: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        k_cache_PKSD: torch.Tensor,
        v_cache_PKSD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        triton_elementwise.rope_and_write_kv(heads_TAD, cos_TF, sin_TF, k_cache_PKSD, v_cache_PKSD, slots_T)

    def paged_attention(
        self,
        q_THD: torch.Tensor,
        k_cache_PKSD: torch.Tensor,
        v_cache_PKSD: torch.Tensor,
        block_tables_BM: torch.Tensor,
        seq_lens_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        *,
        scale: float,
        out_THD: torch.Tensor,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        triton_attention.paged_attention(
            q_THD, k_cache_PKSD, v_cache_PKSD, block_tables_BM, seq_lens_B, query_start_B1,
            scale=scale, out_THD=out_THD, sliding_window=sliding_window, softcap=softcap,
        )  # fmt: skip

    def silu_and_mul(self, gate_up_TI2: torch.Tensor) -> torch.Tensor:
        return triton_elementwise.silu_and_mul(gate_up_TI2)

    def keep_likely(
        self,
        scores_LV: torch.Tensor,
        temperature_L: torch.Tensor,
        min_p_L: torch.Tensor,
        top_k_L: torch.Tensor,
        top_p_L: torch.Tensor,
    ) -> torch.Tensor:
        return triton_sampling.keep_likely(scores_LV, temperature_L, min_p_L, top_k_L, top_p_L)

    def draw(
        self,
        scores_LV: torch.Tensor,
        temperature_L: torch.Tensor | None = None,
        keys_L2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return triton_sampling.draw(scores_LV, temperature_L, keys_L2)
