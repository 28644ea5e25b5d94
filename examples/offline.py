"""Offline inference: several prompts in one batch, then a chat.

python examples/offline.py [model]
"""

import sys

from minivllm import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)  # None: the embedded SmolLM2-135M-Instruct

prompts = ["The capital of France is", "The three primary colours are", "Once upon a time,"]
for output in llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0)):
    completion = output.outputs[0]
    print(f"{output.prompt!r} → {completion.text!r} ({completion.finish_reason.value})")

chat = [{"role": "user", "content": "Name one river in Germany."}]
answer = llm.chat(chat, SamplingParams(max_tokens=64, temperature=0))[0].outputs[0]
seconds = answer.metrics.finished_time - answer.metrics.arrival_time
print(f"\n{answer.text}\n{len(answer.token_ids)} tokens in {seconds:.2f} s")
