"""Cascade Positive Retrieval: self-supervised video pretraining with fused mining and loss operators."""

__version__ = "0.1.0"
