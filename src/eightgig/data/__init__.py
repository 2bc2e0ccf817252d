"""Facts about the data: rows, their tokens, and which of them are trained."""
