"""Loads the operator library, which registers `torch.ops.cpr_fast.*` for the CPU and, where built, for CUDA."""

import ctypes
from pathlib import Path

import torch

from ..errors import InputError

_PATH = Path(__file__).resolve().parent.parent / "_C.so"

if not _PATH.exists():
    raise ImportError(
        f"the operator library {_PATH} is not built: run `python setup.py build_ext` or `pip install .`",
        name="cpr_fast._C",
    )
torch.ops.load_library(str(_PATH))
_variant_error = ctypes.CDLL(str(_PATH)).cpr_cpu_variant_error
_variant_error.restype = ctypes.c_char_p
if _variant_error() is not None:
    raise InputError(_variant_error().decode())
