"""What a kernel backend can do. Every backend has these signatures; ``tests/kernels`` runs them all.

Shape legend, used as suffixes of tensor names:
    T   tokens of this step, over all sequences
    H   query heads
    K   key/value heads (H is a multiple of K: grouped-query attention)
    D   head dimension
    P   blocks in the pool
    S   slots in a block (BLOCK_SIZE)
    B   sequences of this step;  B1 = B + 1
    M   blocks in the longest block table
    N   features (hidden size, or a projection's rows)
    I   intermediate size of the MLP

The cache is ``[P, K, S, D]``: one head's share of a block is one contiguous run, good for a
tensor-core tile and for a CPU cache line alike.
"""

from __future__ import annotations

from typing import Protocol

import torch

BLOCK_SIZE = 16


class KernelBackend(Protocol):
    """One implementation of every kernel. Stateless: everything a call needs is an argument."""

    name: str

    def linear(self, x_TN: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias``; weight is [rows, N]. Returns [T, rows] in x's dtype."""

    def rms_norm(
        self, x_TN: torch.Tensor, weight_N: torch.Tensor, eps: float, residual_TN: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm (Zhang & Sennrich 2019) of ``x + residual``, computed in float32 or better.

        Returns:
            (normalised [T, N], ``x + residual`` [T, N]), both in x's dtype; without a residual the
            second is ``x`` itself.
        """

    def rope(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary position embedding (Su et al. 2021), rotating halves: pairs (i, i + D/2).

        cos and sin are float32 [T, D], both halves equal. Returns new q and k in their dtypes.
        """

    def write_kv(
        self,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_PKSD: torch.Tensor,
        v_cache_PKSD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        """Write this step's keys and values into the cache, which is mutated.

        slots_T is int64: block × S + offset in the block; no slot occurs twice.
        """

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
    ) -> None:
        """Causal attention of this step's tokens over their sequences' cached keys and values.

        Prefill, decode and mixed batches alike: sequence b's queries are
        ``q[query_start[b]:query_start[b+1]]``, its last ones; it has ``seq_lens[b]`` tokens in the
        cache, this step's included, in the blocks ``block_tables[b]`` (Kwon et al. 2023).

        Args:
            block_tables_BM, seq_lens_B, query_start_B1: int32. Table entries past a sequence's
                last block are never followed; cache slots past ``seq_lens`` have no influence,
                not even as NaN.
            scale: factor on ``q · k``, usually ``D ** -0.5``.
            out_THD: mutated, every element of it.
        """

    def silu_and_mul(self, gate_up_TI2: torch.Tensor) -> torch.Tensor:
        """SwiGLU's product (Shazeer 2020): ``silu(x[:, :I]) * x[:, I:]``. [T, 2I] → [T, I]."""


def check_paged_attention(
    q_THD: torch.Tensor,
    k_cache_PKSD: torch.Tensor,
    v_cache_PKSD: torch.Tensor,
    block_tables_BM: torch.Tensor,
    seq_lens_B: torch.Tensor,
    query_start_B1: torch.Tensor,
    out_THD: torch.Tensor,
) -> None:
    """Raise ValueError, naming the tensor, unless shapes and dtypes fit together."""
    _check_shape("q_THD", q_THD, (None, None, None))
    num_heads, head_dim = q_THD.shape[1:]
    _check_shape("k_cache_PKSD", k_cache_PKSD, (None, None, BLOCK_SIZE, head_dim))
    num_kv_heads = k_cache_PKSD.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"q_THD: H must be a multiple of the cache's K={num_kv_heads}, got {num_heads}")
    _check_shape("v_cache_PKSD", v_cache_PKSD, tuple(k_cache_PKSD.shape))
    _check_shape("seq_lens_B", seq_lens_B, (None,))
    num_seqs = seq_lens_B.shape[0]
    _check_shape("block_tables_BM", block_tables_BM, (num_seqs, None))
    _check_shape("query_start_B1", query_start_B1, (num_seqs + 1,))
    _check_shape("out_THD", out_THD, tuple(q_THD.shape))
    for name, tensor, dtype in (
        ("v_cache_PKSD", v_cache_PKSD, k_cache_PKSD.dtype),
        ("block_tables_BM", block_tables_BM, torch.int32),
        ("seq_lens_B", seq_lens_B, torch.int32),
        ("query_start_B1", query_start_B1, torch.int32),
        ("out_THD", out_THD, q_THD.dtype),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        want is None or want == have for want, have in zip(expected, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {expected}, got {shape}")


def get_backend(name: str = "auto") -> KernelBackend:
    """The backend called ``name``; ``"auto"`` is the fastest that this machine can run.

    Raises:
        ValueError: there is no such backend.
    """
    from minivllm_kernels.reference import ReferenceBackend

    if name in ("auto", "reference"):
        return ReferenceBackend()
    raise ValueError(f"no kernel backend {name!r}; there are: auto, reference")
