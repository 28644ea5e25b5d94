"""What a kernel backend can do. Every backend has these signatures; ``tests/kernels`` runs them all.

Shape legend, used as suffixes of tensor names:
    T   tokens of this step, over all sequences
    H   query heads
    K   key/value heads (H is a multiple of K: grouped-query attention);  A = H + 2K
    D   head dimension
    F   its rotated pairs: D / 2
    P   blocks in the pool
    S   slots in a block (BLOCK_SIZE)
    B   sequences of this step;  B1 = B + 1
    M   blocks in the longest block table
    N   features (hidden size, or a projection's rows)
    I   intermediate size of the MLP
    L   sequences that get a token
    V   vocabulary

The cache is ``[P, K, S, D]``: one head's share of a block is one contiguous run, good for a
tensor-core tile and for a CPU cache line alike.
"""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from importlib.util import find_spec
from typing import Protocol

import torch

from minivllm_kernels.layers import DecoderWeights, KVPool, Weight

BLOCK_SIZE = 16


class KernelBackend(Protocol):
    """One implementation of every kernel. Stateless: everything a call needs is an argument."""

    name: str
    keeps_packed: bool = False
    """Whether it multiplies with packed weights as they are; otherwise each use expands them."""
    is_capturable: bool = False
    """Whether a CUDA graph can record it: no call waits for the device, or copies to it."""

    @abstractmethod
    def linear(self, x_TN: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias``; weight is [rows, N]. Returns [T, rows] in x's dtype.

        With a packed weight, a backend may round x to 8 bits, one scale for each token and group of
        32 features; then a token's result is the same to the bit whatever other tokens there are.
        """

    def rms_norm_linear(
        self,
        x_TN: torch.Tensor,
        residual_TN: torch.Tensor | None,
        norm_weight_N: torch.Tensor,
        eps: float,
        weight: Weight,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`rms_norm`, then :meth:`linear`. Returns ([T, rows], ``x + residual`` [T, N]).

        ``residual`` may be overwritten with the sum: whoever calls goes on with what is returned.
        """
        normed_TN, sum_TN = self.rms_norm(x_TN, norm_weight_N, eps, residual_TN)
        return self.linear(normed_TN, weight, bias), sum_TN

    def decoder_layers(
        self,
        x_TN: torch.Tensor,
        weights: DecoderWeights,
        pool: KVPool,
        frequencies_F: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        block_tables_BM: torch.Tensor,
        seq_lens_B: torch.Tensor,
        query_start_B1: torch.Tensor,
        *,
        eps: float,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """All layers of a Llama: attention, then a gated MLP, each preceded by an RMSNorm.

        The arguments are those of :meth:`rms_norm`, :meth:`rotary`, :meth:`rope_and_write_kv` and
        :meth:`paged_attention`.

        Returns:
            The last layer's output and the residual, added up: [T, N]. ``x`` may be overwritten; ``pool`` is
            mutated at ``slots``.
        """
        cos_TF, sin_TF = self.rotary(frequencies_F, positions_T)
        residual_TN: torch.Tensor | None = None
        for layer, cache in zip(weights.layers, pool.layers, strict=True):
            heads, residual_TN = self.rms_norm_linear(
                x_TN, residual_TN, layer.attention_norm_N, eps, layer.qkv, layer.qkv_bias
            )
            num_tokens, num_kv_heads, head_dim = x_TN.shape[0], cache.k_PKSD.shape[1], cache.k_PKSD.shape[3]
            heads_TAD = heads.view(num_tokens, -1, head_dim)
            q_THD = heads_TAD[:, : heads_TAD.shape[1] - 2 * num_kv_heads]
            self.rope_and_write_kv(heads_TAD, cos_TF, sin_TF, cache.k_PKSD, cache.v_PKSD, slots_T)
            out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
            self.paged_attention(
                q_THD,
                cache.k_PKSD,
                cache.v_PKSD,
                block_tables_BM,
                seq_lens_B,
                query_start_B1,
                scale=scale,
                out_THD=out_THD,
                sliding_window=sliding_window,
            )
            x_TN = self.linear(out_THD.flatten(1), layer.o, layer.o_bias)

            gate_up_TI2, residual_TN = self.rms_norm_linear(
                x_TN, residual_TN, layer.mlp_norm_N, eps, layer.gate_up, layer.gate_up_bias
            )
            x_TN = self.linear(self.silu_and_mul(gate_up_TI2), layer.down, layer.down_bias)
        return x_TN if residual_TN is None else x_TN + residual_TN

    @abstractmethod
    def embedding(self, ids_T: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Rows ``ids`` (int64) of the weight. Returns [T, N]."""

    @abstractmethod
    def rms_norm(
        self, x_TN: torch.Tensor, weight_N: torch.Tensor, eps: float, residual_TN: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm (Zhang & Sennrich 2019) of ``x + residual``, computed in float32 or better.

        Returns:
            (normalised [T, N], ``x + residual`` [T, N]), both in x's dtype; without a residual the
            second is ``x`` itself.
        """

    def rotary(
        self, frequencies_F: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By what angles a step's tokens are turned, the same in every layer: (cos, sin), float32 [T, F].

        Args:
            frequencies_F: float32: each pair's angle for one position.
            positions_T: int64.
        """
        angles_TF = positions_T.float()[:, None] * frequencies_F
        return angles_TF.cos(), angles_TF.sin()

    @abstractmethod
    def rope_and_write_kv(
        self,
        heads_TAD: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        k_cache_PKSD: torch.Tensor,
        v_cache_PKSD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        """Rotate queries and keys by their positions; write keys and values to the cache.

        Rotary position embedding (Su et al. 2021), rotating halves: pairs (i, i + F).

        Args:
            heads_TAD: A = H + 2K: queries, keys, values, as one product gives them. Mutated: the
                queries are rotated in place. The cache gets rotated keys, and values, in its own dtype.
            cos_TF, sin_TF: of :meth:`rotary`.
            k_cache_PKSD, v_cache_PKSD: mutated at ``slots`` and nowhere else. With float8_e4m3fn, what is
                beyond its ±448 becomes ±448; not every backend has this dtype.
            slots_T: int64: block × S + offset in the block; no slot occurs twice.
        """

    @abstractmethod
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
        """Causal attention of this step's tokens over their sequences' cached keys and values.

        Prefill, decode and mixed batches alike: sequence b's queries are
        ``q[query_start[b]:query_start[b+1]]``, its last ones, at least one; it has ``seq_lens[b]`` tokens
        in the cache, this step's included, in the blocks ``block_tables[b]`` (Kwon et al. 2023).

        Args:
            block_tables_BM, seq_lens_B, query_start_B1: int32. Table entries past a sequence's
                last block are never followed; cache slots past ``seq_lens`` have no influence,
                not even as NaN.
            scale: factor on ``q · k``, usually ``D ** -0.5``.
            out_THD: mutated, every element of it.
            sliding_window: a query sees itself and the ``sliding_window - 1`` tokens before it (Mistral 7B,
                Jiang et al. 2023). None: all tokens before it.
            softcap: a score s becomes ``softcap * tanh(s / softcap)`` before the softmax (Gemma 2, 2024).

        Raises:
            ValueError: tensors don't fit together, or this backend has no code for their dtypes.
        """

    @abstractmethod
    def silu_and_mul(self, gate_up_TI2: torch.Tensor) -> torch.Tensor:
        """SwiGLU's product (Shazeer 2020): ``silu(x[:, :I]) * x[:, I:]``. [T, 2I] → [T, I]."""

    @abstractmethod
    def keep_likely(
        self,
        scores_LV: torch.Tensor,
        temperature_L: torch.Tensor,
        min_p_L: torch.Tensor,
        top_k_L: torch.Tensor,
        top_p_L: torch.Tensor,
    ) -> torch.Tensor:
        """Minus infinity for the tokens that min-p, then top-k, then top-p drop (Holtzman et al. 2020).

        A token's probability is that of ``scores / temperature``. Min-p keeps what is at least ``min_p``
        times as likely as the likeliest token, top-k the ``top_k`` likeliest of these, top-p the fewest of
        those that have ``top_p`` of their mass. The likeliest token always stays; of equal ones, those
        that come first. NaN is minus infinity.

        Args:
            scores_LV: any floating dtype; not mutated. As in all that follows, a row's result is the same
                to the bit whatever the other rows are.
            temperature_L: float32. Where it is 0 everything is kept.
            min_p_L, top_k_L, top_p_L: float32. 0, V (or more) and 1 keep everything.

        Returns:
            float32 [L, V], a new tensor.
        """

    @abstractmethod
    def draw(
        self,
        scores_LV: torch.Tensor,
        temperature_L: torch.Tensor | None = None,
        keys_L2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Where ``scores + temperature × noise`` is largest, and the first such place: int64 [L].

        The Gumbel-max trick (Maddison et al. 2014): that is a draw from softmax(scores / temperature). The
        noise is a hash of key and token, the same on every backend but for rounding.

        Args:
            scores_LV: any floating dtype; not mutated. NaN is minus infinity, and a row of nothing else
                gives token 0.
            temperature_L: float32, finite; 0 is greedy. None: all of them are.
            keys_L2: int32, independent for each draw; not looked at where the temperature is 0.
        """


def check_paged_attention(
    q_THD: torch.Tensor,
    k_cache_PKSD: torch.Tensor,
    v_cache_PKSD: torch.Tensor,
    block_tables_BM: torch.Tensor,
    seq_lens_B: torch.Tensor,
    query_start_B1: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """Raise ValueError, naming the argument, unless shapes and dtypes fit together."""
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, or None for none, got {sliding_window}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None for none, got {softcap}")
    q_shape, cache_shape = q_THD.shape, k_cache_PKSD.shape
    num_seqs = seq_lens_B.shape[0] if seq_lens_B.ndim == 1 else -1
    # Every layer of every step comes by here: one expression, and a name for the fault only if there is one.
    if not (
        len(q_shape) == 3
        and len(cache_shape) == 4
        and cache_shape[2] == BLOCK_SIZE
        and cache_shape[3] == q_shape[2]
        and q_shape[1] % cache_shape[1] == 0
        and v_cache_PKSD.shape == cache_shape
        and out_THD.shape == q_shape
        and block_tables_BM.ndim == 2
        and block_tables_BM.shape[0] == num_seqs
        and query_start_B1.ndim == 1
        and query_start_B1.shape[0] == num_seqs + 1
        and v_cache_PKSD.dtype == k_cache_PKSD.dtype
        and out_THD.dtype == q_THD.dtype
        and block_tables_BM.dtype == seq_lens_B.dtype == query_start_B1.dtype == torch.int32
    ):
        _name_the_fault(
            q_THD, k_cache_PKSD, v_cache_PKSD, block_tables_BM, seq_lens_B, query_start_B1, out_THD
        )


def _name_the_fault(
    q_THD: torch.Tensor,
    k_cache_PKSD: torch.Tensor,
    v_cache_PKSD: torch.Tensor,
    block_tables_BM: torch.Tensor,
    seq_lens_B: torch.Tensor,
    query_start_B1: torch.Tensor,
    out_THD: torch.Tensor,
) -> None:
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
    raise AssertionError("check_paged_attention and this don't agree")


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        want is None or want == have for want, have in zip(expected, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {expected}, got {shape}")


def get_backend(name: str = "auto", device_type: str = "cpu") -> KernelBackend:
    """The backend called ``name``; ``"auto"`` is the fastest on this machine's devices of that type.

    Raises:
        ValueError: there is no such backend, or this machine can't run it.
    """
    names = available_backends(device_type)
    if name != "auto" and name not in names:
        raise ValueError(
            f"no kernel backend {name!r} for {device_type} on this machine; "
            f"there are: auto, {', '.join(names)}"
        )
    return _make(names[0] if name == "auto" else name)


def available_backends(device_type: str = "cpu") -> list[str]:
    """Names of the backends that this machine can run on ``"cpu"`` or ``"cuda"``, the fastest first.

    ``reference`` always can; ``avx512``, ``avx2`` and ``portable`` are the C++ kernels, if they were
    built, for the instruction sets that the CPU has. ``triton`` is for CUDA, if it is installed; on CPUs
    there is only its interpreter, which TRITON_INTERPRET=1 switches on, for tests.
    """
    if device_type == "cuda":
        return ["triton", "reference"] if _has_triton() else ["reference"]
    from minivllm_kernels.cpu import instruction_sets

    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()
    return [*instruction_sets(), "reference", *(["triton"] if is_interpreted else [])]


def _has_triton() -> bool:
    """Without importing it."""
    return find_spec("triton") is not None


def _make(name: str) -> KernelBackend:
    if name == "reference":
        from minivllm_kernels.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "triton":
        from minivllm_kernels.triton_backend import TritonBackend

        return TritonBackend()
    from minivllm_kernels.cpu import CppBackend

    return CppBackend(name)
