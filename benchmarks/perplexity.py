"""What a quantisation costs: perplexity of real text, beside that of the same weights in float32.

    python benchmarks/perplexity.py [--compare auto,int8] [--output FILE]

Each window of the text goes through the engine as the prompt of a request, in steps of
``--step-tokens``: scheduler, block tables, KV cache, model and kernels are the ones that serve. Only
the sampler is left out, and logits are computed for every token rather than for the last one alone.
Every token of the text but the first is predicted once, from at most ``--window`` - 1 tokens before it.

Perplexity varies with the text, and the difference does a little, too. Mean KL divergence from the
float32 predictions and the share of equal most likely tokens are the steadier measures of what changed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from minivllm.config import EngineConfig, format_size
from minivllm.engine.batch import FlatBatch
from minivllm.engine.runner import PendingTokens, TorchRunner
from minivllm.engine.scheduler import SampledToken, ScheduledBatch
from minivllm.engine.startup import load_model, make_engine
from minivllm.errors import StartupError
from minivllm.request import SamplingParams
from minivllm.tokenizer.load import load_tokenizer
from minivllm.weights.files import ModelFiles, resolve_model
from minivllm_bench import machine

TEXT = Path(__file__).parent / "data" / "alice.txt"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table."""

    quantization: str
    weight_bytes: int
    kv_cache: str
    """Its dtype."""
    perplexity: float
    difference_percent: float
    """Of the perplexity, from float32's."""
    mean_kl: float
    """KL divergence of the next token's distribution from float32's, in nats; 0 is equal."""
    same_top_percent: float
    """How often the most likely token is float32's."""

    def line(self) -> str:
        """The row."""
        return (
            f"{self.quantization:<12}  {format_size(self.weight_bytes):>11}  {self.kv_cache:<8}"
            f"  {self.perplexity:10.4f}  {self.difference_percent:+8.3f} %"
            f"  {self.mean_kl:8.6f}  {self.same_top_percent:8.2f} %"
        )


HEADER = "quantization      weights  KV cache  perplexity  difference   mean KL    same top"


class ScoringRunner:
    """Executes steps as ``runner`` does, but keeps every token's logits, and samples nothing."""

    runs_ahead = False

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        self.logits_TV = torch.empty(0)
        """Of the last step."""

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        """Run the step; a request that would be sampled gets token 0."""
        device = self.runner.model.placement.device
        flat = FlatBatch.build(batch, device)
        every_token = torch.arange(batch.num_tokens, device=device)
        self.logits_TV = self.runner.model(replace(flat, logits_index_L=every_token), self.runner.pool)
        tokens = [SampledToken(0) if item.is_sampled else None for item in batch.requests]
        return lambda: tokens


class Candidate:
    """A model in an engine of its own, and what its predictions add up to."""

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        self.config = config
        model = load_model(config, files)
        self.weight_bytes = model.num_weight_bytes
        self.engine = make_engine(config, files, model)
        assert isinstance(self.engine.runner, TorchRunner)
        self.runner = ScoringRunner(self.engine.runner)
        self.engine.runner = self.runner
        self.num_tokens = 0
        self.sum_nll = 0.0
        self.sum_kl = 0.0
        self.num_same_top = 0

    def log_probs(self, prompt: list[int]) -> Iterator[torch.Tensor]:
        """Step by step, float64 [T, V]: what the model expects after each token of ``prompt``."""
        self.engine.add("window", prompt, SamplingParams(max_tokens=1, ignore_eos=True))
        while self.engine.has_work:
            for event in self.engine.step():
                if event.error is not None:
                    raise SystemExit(f"--quantization {self.config.quantization}: {event.error}")
            yield self.runner.logits_TV.double().log_softmax(dim=-1)

    def score(self, log_probs_TV: torch.Tensor, reference_TV: torch.Tensor, next_T: torch.Tensor) -> None:
        """Add up one step's predictions. ``next_T`` are the tokens that did come next."""
        self.num_tokens += len(next_T)
        self.sum_nll -= log_probs_TV.gather(1, next_T[:, None]).sum().item()
        self.sum_kl += (reference_TV.exp() * (reference_TV - log_probs_TV)).sum().item()
        self.num_same_top += int((log_probs_TV.argmax(1) == reference_TV.argmax(1)).sum().item())

    def result(self, reference: Candidate) -> Result:
        """Means over all that was scored."""
        return Result(
            quantization=self.config.quantization,
            weight_bytes=self.weight_bytes,
            kv_cache=str(self.runner.runner.pool.layers[0].k_PKSD.dtype).removeprefix("torch."),
            perplexity=math.exp(self.sum_nll / self.num_tokens),
            difference_percent=100 * math.expm1((self.sum_nll - reference.sum_nll) / self.num_tokens),
            mean_kl=self.sum_kl / self.num_tokens,
            same_top_percent=100 * self.num_same_top / self.num_tokens,
        )


def measure(configs: list[EngineConfig], files: ModelFiles, tokens: list[int], window: int) -> list[Result]:
    """Score ``tokens`` with each configuration, all in step, the first as the reference of the rest."""
    candidates = [Candidate(config, files) for config in configs]
    # A window's last token is only predicted; it begins the next window.
    for start in tqdm(range(0, len(tokens) - 1, window - 1), "windows", leave=False, disable=None):
        inputs, targets = tokens[start : start + window][:-1], tokens[start + 1 : start + window]
        begin = 0
        for steps in zip(*(candidate.log_probs(inputs) for candidate in candidates), strict=True):
            end = begin + len(steps[0])
            next_T = torch.tensor(targets[begin:end], device=steps[0].device)
            for candidate, log_probs_TV in zip(candidates, steps, strict=True):
                candidate.score(log_probs_TV, steps[0], next_T)
            begin = end
    return [candidate.result(candidates[0]) for candidate in candidates]


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of quantised weights, and of float32 ones.")
    parser.add_argument("--model", help="as minivllm serve's (default: the embedded model)")
    parser.add_argument("--device", default="auto", help="as minivllm serve's (default: auto)")
    parser.add_argument(
        "--compare", default="", help="--quantization values to set beside float32, such as auto,int8"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of what is compared, as minivllm serve's (default: auto)"
    )
    parser.add_argument("--kv-cache-dtype", default="auto", help="likewise (default: auto)")
    parser.add_argument("--text", type=Path, default=TEXT, help=f"a text file (default: {TEXT.name})")
    parser.add_argument("--max-tokens", type=int, help="of the text (default: all)")
    parser.add_argument("--window", type=int, default=512, help="tokens in a sequence (default: 512)")
    parser.add_argument(
        "--step-tokens",
        type=int,
        default=128,
        help="that go through the model at once; 1 measures what decoding does (default: 128)",
    )
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file, too")
    args = parser.parse_args()
    if args.window < 2:
        parser.error(f"--window must be at least 2, got {args.window}")
    try:
        reference = EngineConfig(
            model=args.model,
            device=args.device,
            dtype="float32",
            kv_cache_dtype="float32",
            quantization="none",
            max_model_len=args.window,
            max_num_batched_tokens=args.step_tokens,
            kv_cache_memory=2**30,
            enable_prefix_caching=False,  # a token found there would have no logits
        )
        compared = replace(reference, dtype=args.dtype, kv_cache_dtype=args.kv_cache_dtype)
        names = [name for name in args.compare.split(",") if name]
        configs = [reference, *(replace(compared, quantization=name) for name in names)]
        files = resolve_model(args.model)
        tokens = load_tokenizer(files).encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False)
        tokens = tokens[: args.max_tokens]
        if len(tokens) < 2:
            parser.error(f"the text must have at least 2 tokens, got {len(tokens)}")
        results = measure(configs, files, tokens, args.window)
    except StartupError as error:
        sys.exit(f"{parser.prog}: error: {error}")

    print(f"{files.name}, {len(tokens)} tokens of {args.text.name}, in windows of {args.window}\n")
    print(HEADER)
    for result in results:
        print(result.line())
    if args.output is not None:
        figures = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine.describe(),
            "commit": machine.revision(Path(__file__).parent),
            "model": files.name,
            "text": args.text.name,
            "tokens": len(tokens),
            "window": args.window,
            "step_tokens": args.step_tokens,
            "results": [vars(result) for result in results],
        }
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
