"""Cascade Positive Retrieval: self-supervised video pretraining with fused mining and loss operators.

`docs/architecture.md` says what each folder holds, and which folders may import it."""

__version__ = "0.1.0"
