"""The decoder: one layer forward and backward, and the stack of them."""
