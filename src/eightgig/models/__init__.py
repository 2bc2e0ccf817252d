"""Facts about base models: what a folder holds and how its decoder is built."""
