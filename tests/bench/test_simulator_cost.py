"""What a step costs, by hand; and whether calibration finds the constants that made the times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from minivllm.config import EngineConfig
from minivllm.engine.scheduler import ScheduledBatch, ScheduledRequest
from minivllm.engine.steps import Prefill, StepRecord
from minivllm.errors import ConfigError, OutOfMemoryError
from minivllm.request import Request, SamplingParams
from minivllm_bench.simulator.calibrate import Sample, calibrate
from minivllm_bench.simulator.cost_model import CostModel, Rates
from minivllm_bench.simulator.deployment import Deployment
from minivllm_bench.simulator.devices import DEVICES, find_device
from minivllm_bench.simulator.models import MODELS, find_model
from minivllm_bench.simulator.simulation import Simulation
from minivllm_bench.simulator.work import StepWork
from minivllm_bench.workloads import Session, Turn
from tests.weights.tiny_models import write_tiny_gguf

LLAMA = MODELS["llama-3.1-8b"]
RATES = Rates(
    bandwidth=1e12,
    kv_bandwidth=5e11,
    flops=1e14,
    attention_flops=4e13,
    step_seconds=1e-3,
    sequence_seconds=2e-5,
)


@pytest.mark.parametrize(
    ("name", "billions"),  # what the models' cards say, to their last digit
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6), ("llama-3.2-1b", 1.24), ("llama-3.2-3b", 3.21),
     ("mistral-7b", 7.25), ("llama-2-7b", 6.74), ("llama-2-13b", 13.0), ("opt-13b", 12.85),
     ("smollm2-135m", 0.1345), ("smollm2-1.7b", 1.71)],
)  # fmt: skip
def test_models_have_as_many_weights_as_their_cards_say(name: str, billions: float) -> None:
    assert MODELS[name].weight_bytes / 2e9 == pytest.approx(billions, rel=0.004)


def test_keys_and_values_of_a_token() -> None:
    assert LLAMA.kv_bytes(2) == 128 * 1024
    assert MODELS["opt-13b"].kv_bytes(2) == 800 * 1024  # Kwon et al. 2023, section 3


def test_the_embedded_model_is_read_from_its_file() -> None:
    model = find_model(None)
    assert (model.linear_bits, model.head_bits) == (5.0, 8.5)
    assert model.num_linear_params == MODELS["smollm2-135m"].num_linear_params


def test_a_folder_with_a_gguf_file_weighs_what_the_file_does(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", matrix_type=GGMLQuantizationType.Q4_1)
    file, folder = find_model(str(path)), find_model(str(tmp_path))
    assert (folder.linear_bits, folder.head_bits) == (file.linear_bits, file.head_bits) == (5.0, 5.0)
    (tmp_path / "config.json").write_text("{}")  # as some repositories of GGUF files have it
    assert find_model(str(tmp_path)).weight_bytes == file.weight_bytes


def test_work_is_counted_alike_in_batches_and_in_records() -> None:
    rng = random.Random(0)
    for _ in range(20):
        items, record = [], StepRecord(1, 0.0, 0.0)
        pairs = 0
        for number in range(rng.randint(1, 9)):
            length, start = rng.randint(2, 60), 0
            start = rng.randrange(length)
            count = rng.randint(1, length - start)
            request = Request(str(number), [1] * length, SamplingParams(), seed=0, max_total_tokens=99)
            request.num_computed_tokens = start
            items.append(ScheduledRequest(request, count))
            is_last = start + count == length
            if count == 1 and is_last:
                record.decodes[str(number)] = start
            else:
                record.prefills.append(Prefill(str(number), start, count, is_last))
            if count > 1:
                pairs += sum(1 for query in range(start, start + count) for _ in range(query + 1))
        work = StepWork.of_batch(ScheduledBatch(items))
        assert work == StepWork.of_record(record)
        assert work.prefill_pairs == pairs
        assert work.tokens == sum(item.num_tokens for item in items)


def test_a_decode_of_one_user_reads_all_weights_and_its_context() -> None:
    cost = CostModel(LLAMA, RATES, 2).cost(StepWork(1, 1, 1, 1000, 0, 0))
    weights = 2 * (LLAMA.num_linear_params + LLAMA.num_head_params) / 1e12
    assert cost.device == pytest.approx(weights + 1000 * 128 * 1024 / 5e11 + 1e-3 + 2e-5)


def test_a_prefill_computes() -> None:
    cost = CostModel(LLAMA, RATES, 2).cost(StepWork(1, 2000, 1, 0, 2000, 2001000))
    products = 2 * 2000 * LLAMA.num_linear_params / 1e14
    attention = 2001000 * 4 * 32 * 32 * 128 / 4e13 + 2000 * 128 * 1024 / 5e11
    head = 2 * LLAMA.num_head_params / 1e12  # one row of logits: memory
    assert cost.device == pytest.approx(products + attention + head + 1e-3 + 2e-5)


@pytest.mark.parametrize("num_tokens", [1, 50])
def test_more_tokens_cost_nothing_until_the_roof_bends(num_tokens: int) -> None:
    model = CostModel(LLAMA, RATES, 2)
    alone, more, far = (model.cost(StepWork(1, n, 0, 0, 0, 0)).device for n in (1, num_tokens, 200))
    assert alone == more
    assert far - 1e-3 - 2e-5 == pytest.approx(2 * 200 * LLAMA.num_linear_params / 1e14)


def test_one_users_tokens_come_at_the_rate_of_the_memory() -> None:
    deployment = Deployment(
        model=LLAMA, device=find_device("a10g"), rates=RATES, config=EngineConfig(seed=0, max_model_len=512)
    )
    engine, clock = deployment.engine()
    (record,) = Simulation(engine, clock, arrivals=[(0.0, Session((Turn(10, 3),)))]).run()
    weights = 2 * (LLAMA.num_linear_params + LLAMA.num_head_params) / 1e12
    gaps = [weights + (11 + i) * 128 * 1024 / 5e11 + 1e-3 + 2e-5 for i in range(2)]
    assert record.inter_token_latencies == pytest.approx(gaps)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_calibration_finds_the_rates_that_made_the_times(noise: float) -> None:
    rng = random.Random(1)
    model = CostModel(LLAMA, RATES, 2)
    samples = []
    for _ in range(600):
        sequences, chunk = rng.choice([1, 2, 8, 40, 200]), rng.choice([0, 0, 20, 300, 2000])
        context, start = sequences * rng.randint(20, 3000), rng.randrange(4000)
        pairs = chunk * start + chunk * (chunk + 1) // 2
        work = StepWork(
            sequences, sequences + chunk, sequences, context, (start + chunk) * (chunk > 0), pairs
        )
        samples.append(Sample(work, model.cost(work).device * (1 + rng.uniform(-noise, noise))))
    slow = rng.sample(range(len(samples)), 30)  # something else ran
    samples = [
        Sample(work, seconds * (5 if place in slow else 1)) for place, (work, seconds) in enumerate(samples)
    ]
    found = calibrate(samples, LLAMA, 2)
    tolerance = 0.04 if noise == 0 else 0.10
    for name in ("bandwidth", "flops", "kv_bandwidth", "attention_flops"):
        assert getattr(found.rates, name) == pytest.approx(getattr(RATES, name), rel=tolerance), name
    # What a step takes besides is a sixteenth of the shortest one here: less than the noise.
    fitted = CostModel(LLAMA, found.rates, 2)
    for work in (StepWork(1, 1, 1, 50, 0, 0), StepWork(64, 64, 64, 64000, 0, 0)):
        assert fitted.cost(work).device == pytest.approx(model.cost(work).device, rel=0.01 + noise / 2)
    assert found.num_left_out >= 30
    assert found.median_error < 0.02 + noise


def test_a_run_of_prompts_that_are_all_alike_still_tells_something_of_others() -> None:
    rng = random.Random(2)
    model = CostModel(LLAMA, RATES, 2)
    samples = []
    for _ in range(200):
        sequences, chunks = rng.randint(0, 8), rng.randint(1, 4)
        keys, pairs = chunks * 512, chunks * 512 * 513 // 2
        for work in (
            StepWork(sequences + chunks, sequences + keys, sequences + chunks, sequences * 600, keys, pairs),
            StepWork(chunks, chunks, chunks, chunks * 600, 0, 0),
        ):
            samples.append(Sample(work, model.cost(work).device * rng.uniform(0.97, 1.03)))
    found = CostModel(LLAMA, calibrate(samples, LLAMA, 2).rates, 2)
    for length in (128, 4096):
        work = StepWork(1, length, 1, 0, length, length * (length + 1) // 2)
        assert found.cost(work).device == pytest.approx(model.cost(work).device, rel=0.3)


def test_calibration_refuses_what_says_too_little() -> None:
    decode = Sample(StepWork(1, 1, 1, 10, 0, 0), 0.01)
    with pytest.raises(ConfigError, match="at least 20 steps, got 3"):
        calibrate([decode] * 3, LLAMA, 2)
    with pytest.raises(ConfigError, match="prompts"):
        calibrate([decode] * 50, LLAMA, 2)


@pytest.mark.parametrize("name", DEVICES)
def test_an_8b_model_fits_where_it_should(name: str) -> None:
    device = find_device(name)
    deployment = Deployment(
        model=LLAMA, device=device, rates=RATES, config=EngineConfig(max_model_len=4096, max_num_seqs=64)
    )
    ledger = deployment.ledger()
    assert ledger.num_blocks * 16 * LLAMA.kv_bytes(2) + LLAMA.weight_bytes < 0.9 * device.memory
    too_large = Deployment(model=MODELS["llama-3.1-70b"], device=device, rates=RATES, config=EngineConfig())
    if device.memory < 160e9:
        with pytest.raises(OutOfMemoryError, match=f"llama-3.1-70b on {name}"):
            too_large.ledger()
    else:
        assert too_large.ledger().num_blocks > 0
