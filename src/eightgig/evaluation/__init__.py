"""Whether the tuned model is better."""
