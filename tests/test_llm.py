"""The offline class: what users of ``LLM`` get."""

from __future__ import annotations

import gc
import itertools
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import minivllm
from minivllm import LLM, FinishReason, SamplingParams
from minivllm.config import EngineConfig, ServerConfig
from minivllm.engine.scheduler import ScheduledBatch
from minivllm.errors import ConfigError, ContextLengthError, InvalidRequestError, RequestFailedError
from tests.conftest import Oracle

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
CAPITAL = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    """In float32: with rounded weights and activations a close call may fall otherwise than the oracle's."""
    return LLM(device="cpu", quantization="none", kv_cache_memory=100 * 2**20, max_model_len=1024)


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """As in a terminal: a suite that runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _nothing_stays_behind(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.has_work
    assert llm.engine.stats().num_used_blocks == 0
    llm.engine.check_integrity()


def test_one_prompt_and_several(llm: LLM, oracle: Oracle) -> None:
    prompts = ["The capital of France is", "Once upon a time", "1, 2, 3,"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    for output in outputs:
        completion = output.outputs[0]
        oracle.check(output.prompt_token_ids, completion.token_ids)
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.metrics.num_preemptions == 0
        assert completion.metrics.finished_time >= completion.metrics.first_token_time > 0
    alone = llm.generate(prompts[0], GREEDY, use_tqdm=False)
    assert len(alone) == 1
    assert alone[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    by_ids = llm.generate(outputs[0].prompt_token_ids, GREEDY, use_tqdm=False)
    assert by_ids[0].prompt is None
    assert by_ids[0].outputs[0].text == outputs[0].outputs[0].text


def test_chat(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, temperature=0)
    one = llm.chat(CAPITAL, params, use_tqdm=False)
    several = llm.chat([CAPITAL, CAPITAL], params, use_tqdm=False)
    for output in (*one, *several):
        assert output.outputs[0].text == "The capital of France is Paris."
        assert output.outputs[0].finish_reason is FinishReason.STOP


def test_n_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, n=3, seed=1, logprobs=2)
    first, again = (llm.generate("My favourite", params, use_tqdm=False)[0].outputs for _ in range(2))
    assert len({tuple(completion.token_ids) for completion in first}) == 3
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert [c.index for c in first] == [0, 1, 2]
    for completion in first:
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
        assert all(len(entry.top) == 2 for entry in completion.logprobs)


def test_parameters_of_their_own(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 5, 9)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 9]
    with pytest.raises(InvalidRequestError, match="got 2"):
        llm.generate(["a", "b", "c"], params[:2], use_tqdm=False)


def test_a_stop_string_ends_the_request_in_the_engine(llm: LLM) -> None:
    params = SamplingParams(max_tokens=500, temperature=0, stop=("France",))
    completion = llm.chat(CAPITAL, params, use_tqdm=False)[0].outputs[0]
    assert completion.text == "The capital of "
    assert completion.finish_reason is FinishReason.STOP
    assert len(completion.token_ids) == 4


def test_streaming_and_leaving_early(llm: LLM) -> None:
    params = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True)
    stream = llm.stream("Once upon a time", params)
    text = "".join(next(stream).text for _ in range(5))
    assert llm.engine.stats().num_used_blocks > 0
    stream.close()
    whole = llm.generate("Once upon a time", SamplingParams(max_tokens=5, temperature=0), use_tqdm=False)
    assert text == whole[0].outputs[0].text


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_in_the_middle_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that it hasn't written aren't shared with who asks the same again, and nobody else fails."""
    prompt = [int(token_id) for token_id in torch.randint(100, 40_000, (100,))]
    other, kernels = llm.stream("Once upon a time", GREEDY), llm.engine.runner.model.kernels  # type: ignore[attr-defined]
    next(other)
    write, num_calls = kernels.rope_and_write_kv, itertools.count()

    def interrupted_write(*arguments: Any) -> None:
        if next(num_calls) == 1:
            signal.raise_signal(signal.SIGINT)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "rope_and_write_kv", interrupted_write, raising=False)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([prompt], GREEDY, use_tqdm=False)
    assert llm.engine.stats().num_running == 1
    text = "".join(delta.text for delta in other)
    (again,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    llm.engine.block_manager.forget_prefixes()
    (fresh,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    assert again.outputs[0].token_ids == fresh.outputs[0].token_ids
    (whole,) = llm.generate("Once upon a time", GREEDY, use_tqdm=False)
    assert whole.outputs[0].text.endswith(text)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_while_a_request_is_added(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add = llm.engine.add

    def interrupted_add(*arguments: Any) -> None:
        add(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(llm.engine, "add", interrupted_add)
    with pytest.raises(KeyboardInterrupt):
        next(llm.stream("Once upon a time", GREEDY))


def test_a_stream_that_is_collected_in_the_middle_of_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cleaning up runs in whichever thread the garbage collector was in, whatever that one holds."""
    cycle: list[Any] = [llm.stream("Once upon a time", SamplingParams(max_tokens=500, ignore_eos=True))]
    cycle.append(cycle)
    next(cycle[0])
    schedule = llm.engine.scheduler.schedule

    def collecting_schedule() -> ScheduledBatch:
        gc.collect()
        return schedule()

    monkeypatch.setattr(llm.engine.scheduler, "schedule", collecting_schedule)
    del cycle
    done = ThreadPoolExecutor(1).submit(llm.generate, "One", GREEDY, use_tqdm=False)
    assert done.result(timeout=60)[0].outputs[0].token_ids


def test_streams_beside_each_other(llm: LLM) -> None:
    """Whoever takes the next step of the engine, each call gets what is its own."""
    prompts = ["Once upon a time", "1, 2, 3,", "The capital of France is"]
    want = [output.outputs[0] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    first, second = llm.stream(prompts[0], GREEDY), llm.stream(prompts[1], GREEDY)
    texts = [next(first).text, next(second).text]
    third = llm.generate(prompts[2], GREEDY, use_tqdm=False)[0].outputs[0]
    texts[1] += "".join(delta.text for delta in second)
    texts[0] += "".join(delta.text for delta in first)
    assert texts == [want[0].text, want[1].text]
    assert third.token_ids == want[2].token_ids
    with pytest.raises(InvalidRequestError, match="n must be 1 for a stream, got 2"):
        next(llm.stream("x", SamplingParams(n=2)))


def test_calls_from_several_threads(llm: LLM) -> None:
    prompts = [f"Number {i} is" for i in range(6)]
    want = [llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text for prompt in prompts]

    def streamed(prompt: str) -> str:
        return "".join(delta.text for delta in llm.stream(prompt, GREEDY))

    def whole(prompt: str) -> str:
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text

    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(streamed, prompts[:3]), *pool.map(whole, prompts[3:])] == want


@pytest.mark.parametrize("prompts", [b"abc", {"prompt": "a"}, [{"prompt": "a"}], [["a"]], [b"abc"], [1.5], 7])
def test_what_is_no_prompt(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"must be .*, got "):
        llm.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ("", GREEDY, InvalidRequestError),
        ([], GREEDY, InvalidRequestError),
        ([10**6], GREEDY, InvalidRequestError),
        ([-1], GREEDY, InvalidRequestError),
        ([5] * 1024, GREEDY, ContextLengthError),
        ([5] * 1000, SamplingParams(max_tokens=25), ContextLengthError),
        ("x" * 10**6, GREEDY, ContextLengthError),
        ("x", SamplingParams(stop_token_ids=(10**6,)), InvalidRequestError),
        ("\ud800", GREEDY, InvalidRequestError),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(
    llm: LLM, prompt: str | list[int], params: SamplingParams, error: type[Exception]
) -> None:
    prompts = [prompt] if isinstance(prompt, str) else [prompt] if prompt else [[]]
    with pytest.raises(error):
        llm.generate(["fine", *prompts], params, use_tqdm=False)


def test_a_failing_step_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "execute", fail)
        with pytest.raises(RequestFailedError, match="no such luck"):
            llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert llm.generate("a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_wrong_options_are_value_errors() -> None:
    for options, message in (
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1, got 0"),
        ({"max_num_seqs": "4"}, "--max-num-seqs must be an integer, got '4'"),
        ({"max_model_len": True}, "--max-model-len must be an integer or None, got True"),
        ({"kv_cache_memory": "1 GiBi"}, "a size is a number and a unit"),
        ({"kv_cache_memory": 0.5}, "--kv-cache-memory must be an integer or None, got 0.5"),
        ({"dtype": "float8"}, "--dtype must be one of auto, .*, got 'float8'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(**options)
    with pytest.raises(ConfigError, match=r"--tool-call-parser must be one of .*, got 'typo'"):
        ServerConfig(tool_call_parser="typo")
    with pytest.raises(ConfigError, match="--api-key must be a tuple of text, got str"):
        ServerConfig(api_key="secret")
    config = EngineConfig(model=Path("model.gguf"), kv_cache_memory="64MB", gpu_memory_utilization=1)
    assert (config.model, config.kv_cache_memory) == ("model.gguf", 64 * 10**6)
    assert issubclass(ConfigError, ValueError)
    with pytest.raises(AttributeError):
        _ = minivllm.no_such_name
