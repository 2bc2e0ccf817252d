"""Frozen weights on their way from host memory through the device."""
