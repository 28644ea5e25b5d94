"""``minivllm simulate``: the engine's own scheduler and block manager on hardware that isn't there."""
