"""Tuneloop: the managed fine-tuning loop for chat models, on machines that you own."""

__version__ = "0.1.0"
