"""The step trace: written by ``--trace FILE``, read by ``minivllm trace`` and, as it is, by Perfetto."""
