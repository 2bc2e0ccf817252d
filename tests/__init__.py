"""Tests of eightgig; `tiny` makes the models that they use."""
