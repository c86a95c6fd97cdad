"""Loads the operator library `_C.so`, which registers `torch.ops.cpr_fast.*` for the CPU and, where built, for CUDA.

Defines the names of the module that Hugging Face's kernel builder generates in its place in a kernel package
(`hub/write.py`). No other module of `cpr_fast.ops` names the namespace of the operators, so several builds of a kernel
package can be loaded in one process.
"""

from __future__ import annotations

from pathlib import Path

import torch

_PATH = Path(__file__).resolve().parents[1] / "_C.so"

if not _PATH.exists():
    raise ImportError(
        f"the operator library {_PATH} is not built: run `python setup.py build_ext` or `pip install .`",
        name="cpr_fast._C",
    )
torch.ops.load_library(str(_PATH))

ops = torch.ops.cpr_fast


def add_op_namespace_prefix(op_name: str) -> str:
    """Returns the qualified name of an operator, such as "cpr_fast::mil_nce"."""
    return f"cpr_fast::{op_name}"
