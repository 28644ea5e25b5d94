"""A process that starts an engine, answers one prompt with one token, and says when it did what.

    python -m benchmarks.gpu_parts.first_token MODEL_FOLDER ENGINE_SETTINGS_AS_JSON

Prints the moments as JSON, on time.monotonic's clock.
"""

from __future__ import annotations

import json
import sys
import time

began = time.monotonic()

from minivllm.openmp import spin_briefly  # noqa: E402

spin_briefly()

from benchmarks.gpu_parts.engine import checked_step, load_random  # noqa: E402
from minivllm.config import EngineConfig  # noqa: E402
from minivllm.engine.startup import make_engine  # noqa: E402
from minivllm.request import SamplingParams  # noqa: E402

imported = time.monotonic()
config = EngineConfig(model=sys.argv[1], load_format="dummy", **json.loads(sys.argv[2]))
files, model = load_random(config)
loaded = time.monotonic()
engine = make_engine(config, files, model)
ready = time.monotonic()
engine.add("0", [3, 4, 5], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
while engine.has_work:
    checked_step(engine)
moments = {
    "interpreter started": began,
    "imported": imported,
    "weights loaded": loaded,
    "engine ready": ready,
    "first token": time.monotonic(),
}
print(json.dumps(moments), flush=True)
