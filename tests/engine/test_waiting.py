"""Who is next, against what the orders promise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minivllm.engine.waiting import FairQueue, WaitingQueue
from minivllm.request import Request, SamplingParams, Terms

from .test_deadlines_and_memory import Clock, CountingRunner, finish
from .test_deadlines_and_memory import make_engine as make_counting_engine


def make(name: str, *, tenant: str = "", priority: int = 0, num_tokens: int = 10) -> Request:
    return Request(
        name,
        [1] * num_tokens,
        SamplingParams(),
        seed=0,
        max_total_tokens=100,
        terms=Terms(priority=priority, tenant=tenant),
    )


def serve(queue: FairQueue, num_requests: int | None = None) -> list[str]:
    """Admit so many of those who wait, or all, and charge their prompts; their names."""
    order = []
    while queue and len(order) != num_requests:
        request = queue.first()
        queue.remove(request)
        queue.charge_prompt(request)
        order.append(request.request_id)
    return order


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=30))
def test_plain_order(arrivals: list[tuple[int, bool]]) -> None:
    """The evicted first, the last of them foremost; then by priority, then by arrival."""
    queue, new, evicted = WaitingQueue(), [], []
    for number, (priority, is_evicted) in enumerate(arrivals):
        request = make(str(number), priority=priority)
        if is_evicted:
            queue.add_evicted(request)
            evicted.insert(0, request)
        else:
            queue.add(request)
            new.append(request)
    expected = evicted + sorted(new, key=lambda request: request.terms.priority)
    assert list(queue) == expected
    while expected:
        assert len(queue) == len(expected)
        assert queue.first() is expected[0]
        queue.remove(expected.pop(0))
    assert not queue


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.integers(1, 50)), min_size=1))
def test_with_all_there_none_gets_far_ahead(work: list[tuple[str, int, int]]) -> None:
    """While two tenants both wait, what they got differs by a request at most (the paper's bound)."""
    queue = FairQueue()
    sizes = {}
    for number, (tenant, prompt, output) in enumerate(work):
        request = make(str(number), tenant=tenant, num_tokens=prompt)
        sizes[request] = prompt + 2 * output
        queue.add(request)
    largest = max(sizes.values())
    served = dict.fromkeys("abc", 0)
    while queue:
        waiting = {request.terms.tenant for request in queue}
        spread = [served[tenant] for tenant in waiting]
        assert max(spread) - min(spread) <= largest
        request = queue.first()
        tenant = request.terms.tenant
        assert tenant in waiting
        assert request is next(r for r in queue if r.terms.tenant == tenant), "a tenant's own stay in order"
        queue.remove(request)
        queue.charge_prompt(request)
        output = (sizes[request] - request.num_prompt_tokens) // 2
        for _ in range(output):
            queue.charge_outputs([request])
        served[tenant] += sizes[request]


def test_a_pause_earns_no_credit() -> None:
    queue = FairQueue()
    for number in range(3):
        queue.add(make(f"a{number}", tenant="a", num_tokens=50))
    serve(queue, 2)
    # b comes late: it is next, but doesn't get all that a had before it came.
    for number in range(3):
        queue.add(make(f"b{number}", tenant="b", num_tokens=50))
    assert serve(queue) == ["a2", "b0", "b1", "b2"]


def test_a_pause_forgives_nothing() -> None:
    """Who comes back is lifted to the others, never lowered to them."""
    queue = FairQueue()
    queue.add(make("a0", tenant="a", num_tokens=100))
    for number in range(4):
        queue.add(make(f"b{number}", tenant="b"))
    assert serve(queue, 1) == ["a0"]
    queue.add(make("a1", tenant="a"))
    assert serve(queue) == ["b0", "b1", "b2", "b3", "a1"]


def test_who_comes_while_nobody_waits_is_level_with_the_last() -> None:
    queue = FairQueue()
    queue.add(make("a0", tenant="a", num_tokens=50))
    assert serve(queue) == ["a0"]
    for name in ("b0", "b1", "a1"):
        queue.add(make(name, tenant=name[0]))
    assert serve(queue) == ["b0", "a1", "b1"]


def test_what_was_in_the_prefix_cache_is_free() -> None:
    queue = FairQueue()
    cached = make("a0", tenant="a", num_tokens=50)
    cached.num_computed_tokens = 48
    queue.add(cached)
    for name in ("b0", "a1", "b1"):
        queue.add(make(name, tenant=name[0]))
    assert serve(queue) == ["a0", "b0", "a1", "b1"]


def test_priority_comes_before_fairness_and_the_evicted_before_all() -> None:
    queue = FairQueue()
    served = make("a0", tenant="a")
    queue.add(served)
    queue.remove(served)
    queue.charge_prompt(served)
    queue.add(make("b0", tenant="b"))
    queue.add(make("a1", tenant="a", priority=-1))
    assert queue.first().request_id == "a1"
    queue.add_evicted(served)
    assert queue.first() is served
    assert len(queue) == 3


def test_the_engine_s_queue_is_fair_between_keys_where_that_is_asked_for() -> None:
    for fairness, order in (("none", ["a0", "a1", "a2", "b0"]), ("keys", ["a0", "b0", "a1", "a2"])):
        engine = make_counting_engine(CountingRunner(), Clock(), scheduler="sequential", fairness=fairness)
        for name in ("a0", "a1", "a2", "b0"):
            engine.add(name, [1] * 20, SamplingParams(max_tokens=2), Terms(tenant=name[0]))
        assert list(finish(engine)) == order


def test_a_long_prompt_is_charged_once_and_each_output_token_twice() -> None:
    """The steps that bring no token cost nothing more."""
    engine = make_counting_engine(CountingRunner(), Clock(), fairness="keys")
    engine.scheduler.max_num_batched_tokens = 16
    engine.add("a0", [1] * 160, SamplingParams(max_tokens=5), Terms(tenant="a"))
    finish(engine)
    queue = engine.scheduler.waiting
    assert isinstance(queue, FairQueue)
    assert queue._served == {"a": 160 + 2 * 5}
