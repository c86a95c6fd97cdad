"""Loads the operator library, which registers `torch.ops.cpr_fast.*` for the CPU and, where built, for CUDA."""

import ctypes
import warnings
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
_library = ctypes.CDLL(str(_PATH))


def _error(function: str) -> str | None:
    """Returns the message of a function of csrc/cpr_fast.h that returns one, or None."""
    call = getattr(_library, function)
    call.restype = ctypes.c_char_p
    message = call()
    return None if message is None else message.decode()


def driver_error() -> str | None:
    """Returns why the NVIDIA driver of this machine cannot run the CUDA kernels, or None. CUDA is not initialised."""
    return _error("cpr_cuda_driver_error")


if message := _error("cpr_cpu_variant_error"):
    raise InputError(message)
# The operators still run on the CPU. A CPU build of torch cannot use the GPU, so its driver does not matter.
if torch.version.cuda is not None and (message := driver_error()):
    warnings.warn(f"cpr_fast: no CUDA kernels: {message}", stacklevel=2)
