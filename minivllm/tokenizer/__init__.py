"""Text to token ids and back: encoding, chat templates, incremental detokenization, stop strings."""

from minivllm.tokenizer.detokenizer import IncrementalDetokenizer
from minivllm.tokenizer.load import load_tokenizer
from minivllm.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "load_tokenizer"]
