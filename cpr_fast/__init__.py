"""Cascade Positive Retrieval: self-supervised video pretraining with fused mining and loss operators.

`docs/architecture.md` says what each folder holds, and which folders may import it."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports `from_pretrained` when it is first used: it needs torch, which the command line loads late."""
    if name == "from_pretrained":
        from cpr_fast.weights.hub import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
