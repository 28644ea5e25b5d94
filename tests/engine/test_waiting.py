"""Who is next, against what the orders promise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minivllm.engine.waiting import FairQueue, WaitingQueue
from minivllm.request import Request, SamplingParams, Terms


def make(name: str, *, tenant: str = "", priority: int = 0, num_tokens: int = 10) -> Request:
    return Request(
        name,
        [1] * num_tokens,
        SamplingParams(),
        seed=0,
        max_total_tokens=100,
        terms=Terms(priority=priority, tenant=tenant),
    )


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
    for _ in range(2):
        request = queue.first()
        queue.remove(request)
        queue.charge_prompt(request)
    # b comes late: it is next, but doesn't get all that a had before it came.
    for number in range(3):
        queue.add(make(f"b{number}", tenant="b", num_tokens=50))
    order = []
    while queue:
        request = queue.first()
        queue.remove(request)
        queue.charge_prompt(request)
        order.append(request.request_id)
    assert order == ["a2", "b0", "b1", "b2"]


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
