"""The engine in this process, on random weights and random prompts of token ids: no tokenizer, no server."""

from __future__ import annotations

import gc
import itertools
import random
import time
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu_parts.setting import Row, Setting
from minivllm.config import EngineConfig
from minivllm.engine import startup
from minivllm.engine.engine import Engine
from minivllm.models.llama import Llama
from minivllm.request import EngineEvent, SamplingParams
from minivllm.weights.files import ModelFiles, resolve_model


def engine_config(setting: Setting, **settings: Any) -> EngineConfig:
    """The part's settings, over which those of the command line win."""
    own: dict[str, Any] = {
        "device": setting.device,
        "max_model_len": setting.sizes.max_model_len,
        "seed": 0,
    }
    return EngineConfig(model=setting.folder, load_format="dummy", **own | settings | setting.engine)


def load_random(config: EngineConfig) -> tuple[ModelFiles, Llama]:
    """A model of the configuration's shape with random weights."""
    files = resolve_model(config.model, load_format="dummy")
    model = startup.load_model(config, files)
    release()
    return files, model


def release() -> None:
    """Give back the memory of what is gone: the next engine takes what the device has free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class EngineBench:
    """A model with one engine after another around it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device(setting.device)
        start = time.perf_counter()
        self.files, self.model = load_random(engine_config(setting))
        self.load_seconds = time.perf_counter() - start
        self._random = random.Random(0)
        self._request_ids = map(str, itertools.count())

    def make_engine(self, **settings: Any) -> tuple[Engine, Row]:
        """An engine, and what there is to say about it. Only one at a time fits: see :func:`release`."""
        config = engine_config(self.setting, **settings)
        start = time.perf_counter()
        engine = startup.make_engine(config, self.files, self.model)
        row = {
            "kernels": self.model.kernels.name,
            "weight_bytes": self.model.num_weight_bytes,
            "kv_tokens": engine.block_manager.num_blocks * 16,
            "load_seconds": self.load_seconds,
            "engine_seconds": time.perf_counter() - start,
            "config": {k: v for k, v in asdict(config).items() if v is not None and k != "model"},
        }
        return engine, row

    def add(self, engine: Engine, users: int, prompt_tokens: int, output_tokens: int) -> list[str]:
        """Queue so many random prompts, greedy, each to be answered with exactly so many tokens."""
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        vocabulary = range(engine.info.vocab_size)
        request_ids = list(itertools.islice(self._request_ids, users))
        for request_id in request_ids:
            engine.add(request_id, self._random.choices(vocabulary, k=prompt_tokens), sampling)
        return request_ids

    def drain(self, engine: Engine, request_ids: list[str]) -> None:
        """End these requests now, whatever is left of them."""
        for request_id in request_ids:
            engine.abort(request_id)
        while engine.has_work:  # a step may still be under way
            engine.step()

    @property
    def read_bytes(self) -> int:
        """Of weights that one decode step reads: all but the embedding, of which it looks up a few rows."""
        config = self.model.config
        embedding = config.vocab_size * config.hidden_size * self.model.placement.dtype.itemsize
        return self.model.num_weight_bytes - (0 if config.tie_word_embeddings else embedding)

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values, over all layers."""
        config = self.model.config
        return (
            2
            * config.num_layers
            * config.num_kv_heads
            * config.head_dim
            * self.model.placement.dtype.itemsize
        )


def checked_step(engine: Engine) -> list[EngineEvent]:
    """``engine.step()``; raises if a request failed."""
    events = engine.step()
    for event in events:
        if event.error is not None:
            raise RuntimeError(f"the engine failed: {event.error}")
    return events
