"""What paging is worth: the same 24 chats in the same KV memory, paged and contiguous.

python examples/paged_vs_contiguous.py
"""

import time

from minivllm import LLM, SamplingParams

QUESTIONS = ["Why is the sky blue?", "What is a prime number?", "How do bees make honey?"] * 8
SAMPLING = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)

for kv_allocation in ("paged", "contiguous"):
    llm = LLM(kv_allocation=kv_allocation, kv_cache_memory=400 * 2**20, max_model_len=2048)
    engine = llm.engine
    for number, question in enumerate(QUESTIONS):
        prompt = llm.tokenizer.encode_chat([{"role": "user", "content": question}])
        engine.add(str(number), prompt, SAMPLING)

    start, num_tokens, most_running, usage = time.monotonic(), 0, 0, engine.block_manager.usage()
    while engine.has_work:
        num_tokens += sum(len(event.new_token_ids) for event in engine.step())
        most_running = max(most_running, engine.stats().num_running)
        usage = max(usage, engine.block_manager.usage(), key=lambda usage: usage.held)
    rate = num_tokens / (time.monotonic() - start)
    print(
        f"{kv_allocation:>10}: {rate:.0f} tokens/s, up to {most_running} sequences at once; "
        f"at the fullest moment {usage.held / usage.total:.0%} of the KV slots held tokens, "
        f"{(usage.reserved + usage.internal_waste) / usage.total:.0%} were taken and empty"
    )
