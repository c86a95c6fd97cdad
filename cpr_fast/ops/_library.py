"""Loads the operator library, which registers `torch.ops.cpr_fast.*` for the CPU and, where built, for CUDA."""

from pathlib import Path

import torch

_PATH = Path(__file__).resolve().parent.parent / "_C.so"

if not _PATH.exists():
    raise ImportError(
        f"the operator library {_PATH} is not built: run `python setup.py build_ext` or `pip install .`",
        name="cpr_fast._C",
    )
torch.ops.load_library(str(_PATH))
