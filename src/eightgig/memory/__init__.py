"""Decisions: pure arithmetic over model, machine and settings. No torch, no transformers."""
