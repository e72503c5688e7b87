"""Aids for the training loop."""
