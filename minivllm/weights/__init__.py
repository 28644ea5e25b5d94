"""Finding a model's files and reading them: folders, GGUF, the Hugging Face hub, random weights."""
