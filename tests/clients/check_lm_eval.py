"""lm-eval's ``local-completions``: its scores are the offline engine's, one by one, batched, concurrent."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

FOLDER = Path(os.environ["MINIVLLM_REFERENCE"])
REFERENCE = json.loads((FOLDER / "reference.json").read_text())


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=given, idx=index) for index, given in enumerate(arguments)]


for settings in (
    {"batch_size": 1, "num_concurrent": 1},
    {"batch_size": 4, "num_concurrent": 1},
    {"batch_size": 2, "num_concurrent": 3},
    {"batch_size": 1, "num_concurrent": 1, "tokenized_requests": False},
):
    model = LocalCompletionsAPI(
        base_url=os.environ["MINIVLLM_URL"] + "/v1/completions",
        model="SmolLM2-135M-Instruct",
        tokenizer=str(FOLDER),
        tokenizer_backend="huggingface",
        max_retries=1,
        **settings,
    )
    scores = model.loglikelihood(instances("loglikelihood", [tuple(pair) for pair in REFERENCE["texts"]]))
    assert len(scores) == len(REFERENCE["pairs"])
    for (text, continuation), score, expected in zip(
        REFERENCE["texts"], scores, REFERENCE["pairs"], strict=True
    ):
        assert abs(score[0] - expected[0]) < 1e-9, (text, continuation, score, expected, settings)
        assert score[1] == expected[1], (text, continuation, score, expected, settings)
    assert {is_greedy for _, is_greedy in scores} == {True, False}, "both kinds must be among the examples"

    (rolling,) = model.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(REFERENCE["rolling_text"],)])
    )
    assert abs(rolling - REFERENCE["rolling"]) < 1e-9, (rolling, REFERENCE["rolling"], settings)

    (generated,) = model.generate_until(
        instances("generate_until", [("The capital of France is", {"until": ["."], "max_gen_toks": 8})])
    )
    assert "Paris" in generated, generated
