"""The C++ kernels (``kernels/csrc``) behind the common interface. See ``interface.py`` for shapes.

The C++ side gets addresses and numbers; whether tensors fit together is checked here. Activations are
float32; the KV cache may be float32, float16 or bfloat16, and weights packed (4 or 8 bits) or float32.
Products with float32 weights are torch's own.

With packed weights everything that a token goes through is computed from that token's own data in one
fixed order, so that its result is the same to the bit alone or in any batch.
"""

from __future__ import annotations

from typing import Any

import torch  # before the extension, whose OpenMP calls then end up in torch's runtime
import torch.nn.functional as F

from minivllm_kernels.interface import BLOCK_SIZE, KernelBackend, check_paged_attention
from minivllm_kernels.layers import DecoderWeights, KVPool, Weight, address
from minivllm_kernels.packed import PANEL, PackedWeight

try:
    from minivllm_kernels import _cpu as _extension  # type: ignore[attr-defined]  # compiled, or not there
except ImportError:  # not built
    _extension = None

_KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_HEAD_DIM = 1024  # elementwise.cpp's kMaxHeadDim
_NO_WINDOW = 2**62  # tokens


def instruction_sets() -> list[str]:
    """What the C++ kernels were built for and this CPU has, fastest first; empty if they weren't built."""
    names: list[str] = [] if _extension is None else _extension.instruction_sets()
    return names


class CppBackend(KernelBackend):
    """C++ kernels for one instruction set: ``"avx512"`` (with VNNI), ``"avx2"`` or ``"portable"``."""

    keeps_packed = True

    def __init__(self, name: str) -> None:
        if name not in instruction_sets():
            raise ValueError(f"no C++ kernels for {name!r} here; there are: {', '.join(instruction_sets())}")
        self.name = name
        function: Any = lambda kernel: getattr(_extension, f"{name}_{kernel}")  # noqa: E731
        self._linear = function("linear")
        self._rms_norm_linear = function("rms_norm_linear")
        self._embedding = function("embedding")
        self._rms_norm = function("rms_norm")
        self._silu_and_mul = function("silu_and_mul")
        self._rotary = function("rotary")
        self._rope_and_write_kv = function("rope_and_write_kv")
        self._paged_attention = function("paged_attention")
        self._decoder_layers = function("decoder_layers")
        self._draw = function("draw")
        self._keep_likely = function("keep_likely")
        self._peak_int8 = function("peak_int8")

    def linear(self, x_TN: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not isinstance(weight, PackedWeight):
            return F.linear(x_TN, weight, bias)
        x_TN = _rows("x_TN", x_TN, weight.columns)
        out = torch.empty(x_TN.shape[0], weight.rows)
        self._linear(
            x_TN.data_ptr(),
            *weight.arguments,
            address("bias", bias, (weight.rows,)),
            out.data_ptr(),
            x_TN.shape[0],
        )
        return out

    def rms_norm_linear(
        self,
        x_TN: torch.Tensor,
        residual_TN: torch.Tensor | None,
        norm_weight_N: torch.Tensor,
        eps: float,
        weight: Weight,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(weight, PackedWeight):
            return super().rms_norm_linear(x_TN, residual_TN, norm_weight_N, eps, weight, bias)
        x_TN = _rows("x_TN", x_TN, weight.columns)
        num_tokens = x_TN.shape[0]
        out = torch.empty(num_tokens, weight.rows)
        self._rms_norm_linear(
            x_TN.data_ptr(),
            address("residual_TN", residual_TN, tuple(x_TN.shape)),  # gets the sum
            address("norm_weight_N", norm_weight_N, (weight.columns,)),
            eps,
            *weight.arguments,
            address("bias", bias, (weight.rows,)),
            out.data_ptr(),
            num_tokens,
        )
        return out, x_TN if residual_TN is None else residual_TN

    def embedding(self, ids_T: torch.Tensor, weight: Weight) -> torch.Tensor:
        if not isinstance(weight, PackedWeight):
            return weight[ids_T]
        out = torch.empty(ids_T.shape[0], weight.columns)
        ids = address("ids_T", ids_T, (len(ids_T),), torch.int64)
        blocks, bits, _, columns = weight.arguments
        self._embedding(ids, blocks, bits, columns, out.data_ptr(), len(ids_T))
        return out

    def rms_norm(
        self, x_TN: torch.Tensor, weight_N: torch.Tensor, eps: float, residual_TN: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TN = _rows("x_TN", x_TN, x_TN.shape[-1])
        residual = address("residual_TN", residual_TN, tuple(x_TN.shape))
        sum_TN = torch.empty_like(x_TN) if residual else x_TN
        normed_TN = torch.empty_like(x_TN)
        self._rms_norm(
            x_TN.data_ptr(),
            residual,
            address("weight_N", weight_N, (x_TN.shape[1],)),
            eps,
            normed_TN.data_ptr(),
            sum_TN.data_ptr() if residual else 0,
            *x_TN.shape,
        )
        return normed_TN, sum_TN

    def silu_and_mul(self, gate_up_TI2: torch.Tensor) -> torch.Tensor:
        gate_up_TI2 = _rows("gate_up_TI2", gate_up_TI2, gate_up_TI2.shape[-1])
        out = torch.empty(gate_up_TI2.shape[0], gate_up_TI2.shape[1] // 2)
        self._silu_and_mul(gate_up_TI2.data_ptr(), out.data_ptr(), *out.shape)
        return out

    def rotary(
        self, frequencies_F: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_pairs = len(positions_T), len(frequencies_F)
        cos_TF, sin_TF = torch.empty(2, num_tokens, num_pairs)
        self._rotary(
            address("frequencies_F", frequencies_F, (num_pairs,)),
            address("positions_T", positions_T, (num_tokens,), torch.int64),
            cos_TF.data_ptr(),
            sin_TF.data_ptr(),
            num_tokens,
            num_pairs,
        )
        return cos_TF, sin_TF

    def rope_and_write_kv(
        self,
        heads_TAD: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        k_cache_PKSD: torch.Tensor,
        v_cache_PKSD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        num_tokens, num_heads, head_dim = heads_TAD.shape
        if head_dim > _MAX_HEAD_DIM:
            raise ValueError(f"heads_TAD: D must be at most {_MAX_HEAD_DIM}, got {head_dim}")
        angles_shape, cache_shape = (num_tokens, head_dim // 2), tuple(k_cache_PKSD.shape)
        self._rope_and_write_kv(
            address("heads_TAD", heads_TAD, (num_tokens, num_heads, head_dim)),
            address("cos_TF", cos_TF, angles_shape),
            address("sin_TF", sin_TF, angles_shape),
            address("k_cache_PKSD", k_cache_PKSD, cache_shape, k_cache_PKSD.dtype),
            address("v_cache_PKSD", v_cache_PKSD, cache_shape, k_cache_PKSD.dtype),
            _kv_type(k_cache_PKSD.dtype),
            address("slots_T", slots_T, (num_tokens,), torch.int64),
            num_tokens,
            num_heads,
            k_cache_PKSD.shape[1],
            head_dim,
        )

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
        check_paged_attention(
            q_THD,
            k_cache_PKSD,
            v_cache_PKSD,
            block_tables_BM,
            seq_lens_B,
            query_start_B1,
            out_THD,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        num_heads, head_dim = q_THD.shape[1:]
        num_seqs, num_kv_heads = len(seq_lens_B), k_cache_PKSD.shape[1]
        q_stride, out_stride = _token_stride("q_THD", q_THD), _token_stride("out_THD", out_THD)
        self._paged_attention(
            q_THD.data_ptr(),
            q_stride,
            address("k_cache_PKSD", k_cache_PKSD, tuple(k_cache_PKSD.shape), k_cache_PKSD.dtype),
            address("v_cache_PKSD", v_cache_PKSD, tuple(k_cache_PKSD.shape), k_cache_PKSD.dtype),
            _kv_type(k_cache_PKSD.dtype),
            *_tables(block_tables_BM, num_seqs),
            address("seq_lens_B", seq_lens_B, (num_seqs,), torch.int32),
            address("query_start_B1", query_start_B1, (num_seqs + 1,), torch.int32),
            num_seqs,
            num_heads,
            num_kv_heads,
            head_dim,
            scale,
            _NO_WINDOW if sliding_window is None else min(sliding_window, _NO_WINDOW),
            softcap or 0.0,
            out_THD.data_ptr(),
            out_stride,
        )

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
        # Gates and ups are computed side by side, in panels of their own.
        if not weights.layers or not weights.is_packed or weights.layers[0].down.shape[1] % PANEL:
            return super().decoder_layers(
                x_TN, weights, pool, frequencies_F, positions_T, slots_T, block_tables_BM, seq_lens_B,
                query_start_B1, eps=eps, scale=scale, sliding_window=sliding_window,
            )  # fmt: skip
        (cache_shape, kv_dtype), (hidden_size, qkv_rows, q_rows, inner_size) = pool.layout, weights.sizes
        _, num_kv_heads, block_size, head_dim = cache_shape
        x_TN = _rows("x_TN", x_TN, hidden_size)
        num_tokens, num_seqs = x_TN.shape[0], seq_lens_B.shape[0]
        if not (
            len(weights.layers) == len(pool.layers)
            and qkv_rows == q_rows + 2 * num_kv_heads * head_dim
            and q_rows % (num_kv_heads * head_dim) == 0
            and block_size == BLOCK_SIZE
            and head_dim <= _MAX_HEAD_DIM
        ):
            raise ValueError(
                f"decoder_layers: {len(weights.layers)} layers with qkv of {qkv_rows} rows and o of {q_rows} "
                f"columns and {len(pool.layers)} caches {tuple(cache_shape)} don't fit together"
            )
        self._decoder_layers(
            weights.addresses.buffer_info()[0],
            pool.addresses.buffer_info()[0],
            len(weights.layers),
            x_TN.data_ptr(),
            num_tokens,
            hidden_size,
            inner_size,
            q_rows // head_dim,
            num_kv_heads,
            head_dim,
            eps,
            address("frequencies_F", frequencies_F, (head_dim // 2,)),
            address("positions_T", positions_T, (num_tokens,), torch.int64),
            _kv_type(kv_dtype),
            address("slots_T", slots_T, (num_tokens,), torch.int64),
            *_tables(block_tables_BM, num_seqs),
            address("seq_lens_B", seq_lens_B, (num_seqs,), torch.int32),
            address("query_start_B1", query_start_B1, (num_seqs + 1,), torch.int32),
            num_seqs,
            scale,
            _NO_WINDOW if sliding_window is None else min(sliding_window, _NO_WINDOW),
        )
        return x_TN

    def keep_likely(
        self,
        scores_LV: torch.Tensor,
        temperature_L: torch.Tensor,
        min_p_L: torch.Tensor,
        top_k_L: torch.Tensor,
        top_p_L: torch.Tensor,
    ) -> torch.Tensor:
        scores_LV = _scores(scores_LV)
        num_rows, vocab_size = scores_LV.shape
        kept_LV = torch.empty(num_rows, vocab_size)
        self._keep_likely(
            scores_LV.data_ptr(),
            scores_LV.stride(0),
            address("temperature_L", temperature_L, (num_rows,)),
            address("min_p_L", min_p_L, (num_rows,)),
            address("top_k_L", top_k_L, (num_rows,)),
            address("top_p_L", top_p_L, (num_rows,)),
            kept_LV.data_ptr(),
            num_rows,
            vocab_size,
        )
        return kept_LV

    def draw(
        self,
        scores_LV: torch.Tensor,
        temperature_L: torch.Tensor | None = None,
        keys_L2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scores_LV = _scores(scores_LV)
        num_rows, vocab_size = scores_LV.shape
        if temperature_L is not None and keys_L2 is None:
            raise ValueError("keys_L2 must be given where temperature_L is")
        tokens_L = torch.empty(num_rows, dtype=torch.int64)
        self._draw(
            scores_LV.data_ptr(),
            scores_LV.stride(0),
            address("temperature_L", temperature_L, (num_rows,)),
            address("keys_L2", keys_L2, (num_rows, 2), torch.int32),
            tokens_L.data_ptr(),
            num_rows,
            vocab_size,
        )
        return tokens_L

    def peak_int8(self, rounds: int) -> int:
        """Run int8 multiply-adds from registers on every thread; returns how many. For benchmarks."""
        count = torch.zeros(1, dtype=torch.int64)
        self._peak_int8(rounds, count.data_ptr())
        return int(count)


def _rows(name: str, x: torch.Tensor, size: int) -> torch.Tensor:
    """``x`` with contiguous rows; refuses another dtype or size."""
    if x.dtype != torch.float32 or x.shape[1:] != (size,):
        raise ValueError(f"{name} must be float32 [T, {size}], got {x.dtype} {tuple(x.shape)}")
    return x.contiguous()


def _token_stride(name: str, x_THD: torch.Tensor) -> int:
    """Elements from one token to the next; within a token, heads must be one contiguous run of float32."""
    token, head, element = x_THD.stride()
    if x_THD.dtype != torch.float32 or head != x_THD.shape[2] or element != 1:
        raise ValueError(
            f"{name} must be float32 with contiguous heads, got {x_THD.dtype} with strides {x_THD.stride()}"
        )
    return token


def _scores(scores_LV: torch.Tensor) -> torch.Tensor:
    """float32, with contiguous rows."""
    scores_LV = scores_LV.float()
    return scores_LV if scores_LV.stride(1) == 1 else scores_LV.contiguous()


def _kv_type(dtype: torch.dtype) -> int:
    if dtype not in _KV_TYPES:
        raise ValueError(
            f"a KV cache must be of {', '.join(map(str, _KV_TYPES))} for the C++ kernels, got {dtype}"
        )
    return _KV_TYPES[dtype]


def _tables(block_tables_BM: torch.Tensor, num_seqs: int) -> tuple[int, int]:
    """Address and stride of block tables whose rows may be apart."""
    if (
        block_tables_BM.dtype != torch.int32
        or block_tables_BM.shape[:-1] != (num_seqs,)
        or block_tables_BM.stride(1) != 1
    ):
        raise ValueError(
            f"block_tables_BM must be int32 [{num_seqs}, M] with contiguous rows, "
            f"got {block_tables_BM.dtype} {tuple(block_tables_BM.shape)}"
        )
    return block_tables_BM.data_ptr(), block_tables_BM.stride(0)
