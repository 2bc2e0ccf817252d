"""The adapter: its layout in memory and on disk."""
