"""Every setting of the engine and the server, with its flag, default, unit and limits.

One dataclass per part. A field's metadata is its command-line flag: ``cli.py`` makes the parser
from it, so that a setting is written down once. Values are checked in ``__post_init__`` and raise
:class:`ConfigError`, naming the limit and the given value.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from minivllm.errors import ConfigError

BLOCK_SIZE = 16
"""Tokens of keys and values in one block: small enough to waste little, large enough for a kernel tile."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {unit + "i": 1024**power for power, unit in enumerate("kmgt", start=1)}


def parse_size(text: str) -> int:
    """Bytes in ``"64MB"`` (10^6), ``"2GiB"`` (2^30), ``"1.5G"`` or ``"4096"``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"a size is a number and a unit such as 64MB, 2GiB or 4096, got {text!r}")
    num_bytes = float(match[1]) * _UNITS[match[2] or ""]
    if num_bytes >= 2**63:
        raise ConfigError(f"a size must be below 8 EiB, got {text[:80]!r}")
    return int(num_bytes)


def format_size(num_bytes: int) -> str:
    """``num_bytes`` for people: ``"1.50 GiB"``."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    is_size: bool = False,
    is_secret: bool = False,
) -> Any:  # Any, as dataclasses.field: the annotation beside it is the type
    """A dataclass field that is also a flag. ``help`` ends up in ``--help``, with its unit.

    A field of type ``tuple[str, ...]`` is a flag that takes several values and may be repeated. A secret
    doesn't show in the ``repr``.
    """
    metadata = {"help": help, "choices": choices, "is_size": is_size}
    return field(default=default, repr=not is_secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine needs to start. Raises :class:`ConfigError` for impossible values."""

    model: str | None = option(
        None,
        "a folder with config.json and safetensors, a .gguf file, or a Hugging Face id such as "
        "meta-llama/Llama-3.1-8B-Instruct (default: the embedded SmolLM2-135M-Instruct)",
    )
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id (default: main)")
    load_format: str = option(
        "auto",
        "where weights come from; dummy: random ones, from a config.json alone",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    device: str = option(
        "auto", "where the model runs; auto: cuda if there is one", choices=("auto", "cpu", "cuda")
    )
    dtype: str = option(
        "auto",
        "of weights and activations; auto: the checkpoint's on cuda, float32 on cpu",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = option(
        "auto",
        "of weights in memory; auto: on cpu a quantised GGUF keeps its 4 or 8 bits, all else is none; "
        "int8: 8 bits, cpu only; none: expanded to --dtype",
        choices=("auto", "none", "int8"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "of the KV cache; auto: float16 beside quantised weights, else --dtype; fp8: 8 bits (e4m3), "
        "cuda from compute capability 8.9 on",
        choices=("auto", "float32", "bfloat16", "float16", "fp8"),
    )
    cpu_threads: int | None = option(None, "threads that compute on cpu (default: one per core)")
    enforce_eager: bool = option(
        False, "no CUDA graphs: start sooner, and decode more slowly, above all few sequences"
    )
    seed: int | None = option(
        None, "of the random streams of requests that bring no seed (default: from the system)"
    )
    max_model_len: int | None = option(
        None, "most tokens in a sequence, prompt and answer (default: the model's context, or what fits)"
    )
    max_num_seqs: int = option(256, "most sequences that run at once")
    max_num_batched_tokens: int | None = option(
        None, "most tokens in one step; longer prompts are chunked (default: 512 on cpu, 4096 on cuda)"
    )
    kv_cache_memory: int | None = option(
        None,
        "memory for KV blocks, such as 64MB or 2GiB (default: 1GiB on cpu; on cuda what "
        "--gpu-memory-utilization leaves)",
        is_size=True,
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory for weights, workspace and KV blocks together"
    )
    kv_allocation: str = option(
        "paged",
        "paged: 16-token blocks as a sequence grows; "
        "contiguous: one run of --max-model-len tokens at admission",
        choices=("paged", "contiguous"),
    )
    scheduler: str = option(
        "continuous",
        "continuous: sequences join and leave at every step; sequential: at most --num-parallel run",
        choices=("continuous", "sequential"),
    )
    num_parallel: int | None = option(
        None, "sequences that the sequential scheduler runs at once (default: 1)"
    )
    fairness: str = option(
        "none",
        "who of those that wait is next; none: first come, first served; keys: the API key that has been "
        "served least",
        choices=("none", "keys"),
    )
    enable_prefix_caching: bool | None = option(
        None, "keep finished blocks and reuse them for prompts that begin alike (default: on when paged)"
    )
    trace: str | None = option(
        None,
        "a file to write every step to, as Chrome trace events: ui.perfetto.dev shows it, minivllm trace "
        "summary explains it; what it held is kept as FILE.old (default: none)",
    )

    debug_routes: bool = option(
        False,
        "GET /debug/steps and /debug/requests/ID: what the engine did in its last 1,000 steps, everybody's "
        "requests included",
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_parallel",
            "cpu_threads",
        ):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("kv_cache_memory", self.kv_cache_memory, 1)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.num_parallel is not None and self.scheduler == "continuous":
            raise ConfigError(
                f"--num-parallel {self.num_parallel} needs --scheduler sequential: "
                "the continuous scheduler runs up to --max-num-seqs"
            )
        if self.kv_allocation == "contiguous" and self.enable_prefix_caching:
            raise ConfigError(
                "--enable-prefix-caching needs --kv-allocation paged: a contiguous run can't share blocks"
            )

    @property
    def num_slots(self) -> int:
        """Sequences that the sequential scheduler runs at once."""
        return 1 if self.num_parallel is None else self.num_parallel

    @property
    def use_prefix_cache(self) -> bool:
        """Whether blocks are kept for prompts that begin alike."""
        return self.kv_allocation == "paged" and self.enable_prefix_caching is not False


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the HTTP server needs to start. Raises :class:`ConfigError` for impossible values."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, "TCP port to listen on; 0 for any free one")
    served_model_name: str | None = option(None, "the name clients ask for (default: --model as given)")
    chat_template: str | None = option(None, "a file with a Jinja chat template (default: the model's own)")
    tool_call_parser: str = option(
        "auto",
        "how the model writes tool calls; auto: as its chat template says",
        choices=("auto", "llama3_json", "pythonic", "hermes", "none"),
    )
    reasoning_parser: str = option(
        "auto",
        "think: what an answer has in <think>…</think> is its reasoning_content; auto: if the chat template "
        "has those tags",
        choices=("auto", "think", "none"),
    )
    api_key: tuple[str, ...] = option(
        (),
        "keys, of which a request to any path but /health, /ping and /ready must bring one, as "
        "Authorization: Bearer KEY; process lists show them, and neither --api-key-file nor the environment "
        "variable MINIVLLM_API_KEY (one, or several with commas between)",
        is_secret=True,
    )
    api_key_file: str | None = option(
        None, "a file with more keys, one a line; # begins a comment (default: none)"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "web pages that browsers may let use this server, such as https://chat.example.com, or * for all"
    )
    allowed_methods: tuple[str, ...] = option(("*",), "methods that those pages may use")
    allowed_headers: tuple[str, ...] = option(("*",), "request headers that those pages may set")
    allow_credentials: bool = option(False, "whether those pages may send cookies and client certificates")
    ssl_certfile: str | None = option(
        None, "a PEM file with the server's certificate chain: serve HTTPS (default: plain HTTP)"
    )
    ssl_keyfile: str | None = option(
        None, "a PEM file with the certificate's private key (default: it is in --ssl-certfile)"
    )
    ssl_ca_certs: str | None = option(
        None,
        "a PEM file with authorities: clients must present a certificate that one of them signed "
        "(default: clients need none)",
    )
    ignore_unknown_fields: bool = option(
        False, "drop fields of requests that this server doesn't know or support, instead of refusing them"
    )
    metrics_prefix: str = option(
        "minivllm", "what the names at /metrics begin with; vllm: for dashboards made for vLLM"
    )
    request_log: str | None = option(
        None,
        "a file that gets a line of JSON for each request, - for standard output; it may be moved away while "
        "the server runs (default: none)",
    )
    log_prompts: bool = option(False, "whether those lines have the prompts, too")
    otlp_endpoint: str | None = option(
        None,
        "where OpenTelemetry spans of requests go, such as http://localhost:4318; needs minivllm[otel] "
        "(default: nowhere)",
    )
    max_body_size: int = option(8 * 2**20, "largest request body, such as 8MiB", is_size=True)
    max_header_size: int = option(64 * 2**10, "largest request head, such as 64KiB", is_size=True)
    max_header_count: int = option(128, "most header lines in a request")
    max_tokens_per_request: int | None = option(
        None, "most tokens that one request may sample: prompts x n x max_tokens (default: no limit)"
    )
    max_waiting_requests: int | None = option(
        None, "most requests that wait for the engine; more get 503 and Retry-After (default: no limit)"
    )
    max_waiting_tokens: int | None = option(
        None, "most tokens that the prompts of waiting requests have together (default: no limit)"
    )
    key_tokens_per_minute: int | None = option(
        None, "tokens, of prompts and answers, that each API key may use in a minute (default: no limit)"
    )
    shutdown_timeout: float = option(30.0, "seconds that running requests get to finish after SIGTERM")
    engine_stall_timeout: float = option(
        120.0, "seconds without a step, while there is work, after which the engine is killed and restarted"
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}")
        if self.served_model_name == "":
            raise ConfigError("--served-model-name must be a name, got none")
        self._check_origins()
        if re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_prefix) is None:
            raise ConfigError(
                f"--metrics-prefix must be letters, digits and underscores, got {self.metrics_prefix!r}"
            )
        if self.log_prompts and self.request_log is None:
            raise ConfigError("--log-prompts needs --request-log")
        if self.otlp_endpoint is not None and not re.match(r"https?://[^/]", self.otlp_endpoint):
            raise ConfigError(
                f"--otlp-endpoint must be a URL such as http://localhost:4318, got {self.otlp_endpoint!r}"
            )
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_ca_certs"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{flag(name)} needs --ssl-certfile")
        for name in (
            "max_body_size",
            "max_header_size",
            "max_header_count",
            "max_tokens_per_request",
            "max_waiting_requests",
            "max_waiting_tokens",
            "key_tokens_per_minute",
        ):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("shutdown_timeout", self.shutdown_timeout, 0)
        _check_at_least("engine_stall_timeout", self.engine_stall_timeout, 0.1)

    def _check_origins(self) -> None:
        for origin in self.allowed_origins:
            if origin != "*" and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#,\s]+", origin) is None:
                raise ConfigError(
                    "--allowed-origins takes * or origins such as https://chat.example.com:8443, "
                    f"without a path and with spaces between several, got {origin!r}"
                )
        if self.allow_credentials and not self.allowed_origins:
            raise ConfigError("--allow-credentials needs --allowed-origins")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("--allow-credentials needs --allowed-origins by name, not *")


PRESETS: dict[str, dict[str, Any]] = {
    "ollama": {"scheduler": "sequential", "kv_allocation": "contiguous"},
}
"""``--preset``: defaults for several settings at once; a flag given beside it wins."""


def flag(name: str) -> str:
    """The command-line spelling of a setting: ``max_num_seqs`` → ``--max-num-seqs``."""
    return "--" + name.replace("_", "-")


_KINDS = {int: "an integer", float: "a number", str: "text", bool: "True or False", tuple: "a tuple of text"}


def _check_fields(config: Any) -> None:
    """What a field's own declaration asks for: its type, and one of its choices.

    Mutates: a path becomes text, and a size may be text, as on the command line.
    """
    hints = get_type_hints(type(config))
    for item in fields(config):
        value, hint, choices = getattr(config, item.name), hints[item.name], item.metadata["choices"]
        kinds = (tuple,) if get_origin(hint) is tuple else get_args(hint) or (hint,)
        if isinstance(value, os.PathLike) and str in kinds:
            value = os.fspath(value)
        if isinstance(value, str) and item.metadata["is_size"]:
            value = parse_size(value)
        object.__setattr__(config, item.name, value)
        allowed = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(_KINDS.get(kind, "None") for kind in kinds)
            given = repr(value) if item.repr else type(value).__name__  # a secret stays one
            raise ConfigError(f"{flag(item.name)} must be {wanted}, got {given}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag(item.name)} must be a finite number, got {value}")
        if choices is not None and value not in choices:
            raise ConfigError(f"{flag(item.name)} must be one of {', '.join(choices)}, got {value!r}")


def _check_at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{flag(name)} must be at least {low}, got {value}")
