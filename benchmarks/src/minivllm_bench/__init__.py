"""Benchmarks that come with minivllm: a load generator, a comparison of its modes, a simulator, a report."""
