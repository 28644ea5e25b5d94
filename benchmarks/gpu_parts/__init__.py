"""The parts of ``benchmarks/gpu.py``: each a generator of (section, row), run in a process of its own."""
