"""eightgig: fine-tune Gemma 4, and other open LLMs, on a GPU with 8 GB of memory."""

__version__ = "0.1.0"
