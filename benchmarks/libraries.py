"""The libraries of ``peers.py``, each in a child process of its own: this script.

It needs only the standard library at its top, because a library's interpreter may have no more.

    python benchmarks/libraries.py KIND MODEL CORES
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

Run = Callable[[list[list[int]], int], list[int]]
"""Answers prompts (token ids) with so many tokens each, and returns how many there really were."""


def _openvino_genai(model: str, cores: int) -> tuple[str, Run]:
    import numpy
    import openvino  # type: ignore[import-not-found, unused-ignore]
    import openvino_genai  # type: ignore[import-not-found, unused-ignore]

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": cores}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def run(prompts: list[list[int]], max_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensors = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(prompts))
        return [len(result.m_generation_ids[0]) for result in results]

    return f"openvino-genai {openvino_genai.__version__}, continuous batching", run


def _llama_cpp_python(model: str, cores: int) -> tuple[str, Run]:
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    llama = llama_cpp.Llama(model, n_ctx=4096, n_threads=cores, n_threads_batch=cores, verbose=False)

    def run(prompts: list[list[int]], max_tokens: int) -> list[int]:
        counts = []
        for prompt in prompts:
            tokens = llama.generate(prompt, temp=0.0)
            counts.append(sum(1 for _ in zip(range(max_tokens), tokens, strict=False)))
            llama.reset()
        return counts

    return f"llama-cpp-python {llama_cpp.__version__}, one prompt after the other", run


def _transformers(model: str, cores: int) -> tuple[str, Run]:
    import torch
    import transformers

    torch.set_num_threads(cores)
    transformers.utils.logging.set_verbosity_error()
    folder, name = os.path.split(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    loaded.generation_config.eos_token_id = None  # otherwise an answer may end early

    def run(prompts: list[list[int]], max_tokens: int) -> list[int]:
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = loaded.generate(
            padded, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        return [output.shape[1] - longest] * len(prompts)

    return f"transformers {transformers.__version__}, torch {torch.__version__}, float32, padded batch", run


LIBRARIES: dict[str, Callable[[str, int], tuple[str, Run]]] = {
    "openvino-genai": _openvino_genai,
    "llama-cpp-python": _llama_cpp_python,
    "transformers": _transformers,
}
"""What a child can be: loads a model, and returns the library's version and how to run it."""


def main(kind: str, model: str, cores: str) -> None:
    """Answer lines of work on standard input with lines of JSON, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        version, run = LIBRARIES[kind](model, int(cores))
    except ImportError as error:
        answer(error=f"not installed in {sys.executable}: {error}")
        return
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(version=version)
    for line in sys.stdin:
        work = json.loads(line)
        start = time.perf_counter()
        try:
            tokens = run(work["prompts"], work["max_tokens"])
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
        else:
            answer(seconds=time.perf_counter() - start, tokens=tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
