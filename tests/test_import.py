"""What importing costs, and what it needs."""

from __future__ import annotations

import os
import subprocess
import sys

BLOCK = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
"""
EVERYTHING_ELSE = {
    "accelerate", "fastapi", "gguf", "httpx", "huggingface_hub", "jinja2", "llguidance", "msgspec",
    "opentelemetry", "prometheus_client",
    "pydantic", "sentencepiece", "starlette", "tqdm", "transformers", "triton", "uvicorn", "zmq",
}  # fmt: skip


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_import_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "safetensors", "tokenizers", *EVERYTHING_ELSE}
    result = run_python(BLOCK.format(names=heavy) + "import minivllm; print(minivllm.SamplingParams(n=2).n)")
    assert result.stdout == "2\n", result.stderr


def test_the_engine_needs_four_packages() -> None:
    """torch, numpy, safetensors and tokenizers; the model here is random, and runs."""
    code = BLOCK.format(names=EVERYTHING_ELSE) + (
        "import minivllm.tokenizer.tokenizer, minivllm.completion, minivllm.weights.loader\n"
        "import torch\n"
        "from minivllm_kernels import get_backend\n"
        "from minivllm.config import EngineConfig\n"
        "from minivllm.engine.startup import make_engine\n"
        "from minivllm.models.config import ModelConfig\n"
        "from minivllm.models.layers import Placement\n"
        "from minivllm.models.llama import Llama\n"
        "from minivllm.request import SamplingParams\n"
        "from minivllm.weights.files import ModelFiles\n"
        "from tests.tiny_model import CONFIG\n"
        "config = ModelConfig.from_hf(CONFIG)\n"
        "model = Llama(config, Placement(torch.device('cpu'), torch.float32, get_backend()))\n"
        "for slot in model.weight_slots().values(): slot.normal_()\n"
        "files = ModelFiles(name='tiny', path=None, kind='dummy', config=config)\n"
        "engine = make_engine(EngineConfig(kv_cache_memory=2**22), files, model)\n"
        "engine.add('a', [5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))\n"
        "print(sum(len(event.new_token_ids) for _ in range(4) for event in engine.step()))\n"
    )
    result = run_python(code)
    assert result.stdout == "4\n", result.stderr


def test_serving_does_not_load_torch() -> None:
    """Only the engine process pays for it."""
    code = (
        "import sys, minivllm.serve, minivllm.server.app\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    assert run_python(code).stdout == "[]\n"
