"""Handing a trained model on: merged weights, GGUF, Ollama; whole, tested, then in place."""
