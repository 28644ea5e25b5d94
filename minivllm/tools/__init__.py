"""Tool calls and reasoning in a model's text: finding them as it arrives, and making a model write them.

Nothing here knows HTTP: ``minivllm/server/message.py`` words what these parsers find.
"""
