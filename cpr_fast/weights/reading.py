"""Reads files that `torch.save` wrote, of any program, without executing code from them.

torch's restricted unpickler creates tensors and a few types of Python. The tables below add the other types that
training scripts save beside their tensors. What NumPy and configuration packages define is not created by their own
code: a stand-in keeps the bytes, and the value is built from them afterwards, so that a malicious file cannot call
`numpy.dtype.__setstate__` or a constructor of a package.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import errno
import pathlib
import pickletools
import re
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpr_fast.errors import InputError

_NUMPY_KINDS = "biufcUSMm"  # booleans, numbers, text, bytes and times; not objects ("O") and structures ("V")
_LEGACY_PICKLES = 5  # a file without a zip archive starts with this many pickles [torch before 1.6]


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, written by another program, or could not be written; the message says which."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is empty, truncated or otherwise not readable; `damage` says which ("is empty")."""

    def __init__(self, message: str, damage: str = "is damaged") -> None:
        super().__init__(message)
        self.damage = damage


class _RefusedTypeError(Exception):
    """The file holds a type that is not read; the argument is its name."""


def read_torch(path: str | Path, *, device: torch.device | str = "cpu", expected: str) -> Any:
    """Loads a file that `torch.save` wrote, without executing code from it.

    Besides tensors and plain Python values, the file may hold NumPy scalars, arrays and dtypes, collections, paths,
    dates, `argparse.Namespace`, and the dicts of easydict, yacs and addict, which become an OrderedDict. A
    `defaultdict` becomes a dict, a `deque` a list, and a path a pure path.

    Args:
        expected: what the file should be, for the end of the error message.
    Raises:
        CheckpointError: the file does not exist, cannot be read, or holds a type that is not read.
        DamagedCheckpointError: the file is empty, truncated or otherwise damaged, or is not of torch's format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist; {expected}")
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol and TorchScript, which `_refusal` explains
            return _built(torch.load(path, map_location=device, weights_only=True), set())
    except Exception as error:  # the unpickler raises any exception in a damaged or foreign file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # raised for some truncated files
            raise CheckpointError(f"cannot read checkpoint {str(path)!r}: {error.strerror or error}") from error
        refusal = _refusal(path, error)
        if damage := _damage(path, refusal):
            raise DamagedCheckpointError(f"checkpoint {str(path)!r} {damage}; {expected}", damage) from error
        raise CheckpointError(f"checkpoint {str(path)!r} {refusal or _unknown(error)}; {expected}") from error


def _refusal(path: Path, error: Exception) -> str | None:
    """Says why an intact file is not read, or returns None if the error does not tell."""
    if isinstance(error, _RefusedTypeError):
        name = error.args[0]
    elif found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        name = found[1]
    elif "TorchScript" in str(error):
        return "is a TorchScript program, whose code is not run; save the state_dict of its module instead"
    elif (protocol := _pickle_protocol(path)) not in (None, 2):
        return (
            f"was written with pickle protocol {protocol}, and only protocol 2 can be read without running code. The "
            "file is not damaged: write it again without the argument pickle_protocol of torch.save"
        )
    else:
        return None
    return (
        f"holds {name}, which is not among the types that are read, because it could run code from the file. The file "
        "is not damaged: in the program that wrote it, save it again without that object, for example "
        "torch.save({'state_dict': checkpoint['state_dict']}, FILE)"
    )


def _unknown(error: Exception) -> str:
    said = re.sub(r"(?s).*WeightsUnpickler error:", "", str(error)).strip() or type(error).__name__
    return f"is not damaged, but torch cannot read it ({said.splitlines()[0][:200]})"


def _damage(path: Path, refusal: str | None) -> str | None:
    """Returns a short description of the damage of a file that `torch.load` refused, or None if it is intact."""
    with open(path, "rb") as file:
        start = file.read(2)
    if not start:
        return "is empty"
    if start == b"PK":
        return None if zip_intact(path) else "is truncated or damaged"
    if start[:1] != b"\x80":
        return "is not a checkpoint"
    return None if refusal and _legacy_intact(path) else "is truncated or damaged"


def zip_intact(path: Path) -> bool:
    """Returns whether a file is a zip archive in which every byte agrees with the checksums; 1 s for about 1 GB."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None  # reads every byte and compares checksums
    except Exception:  # a damaged directory raises any exception, such as zlib.error
        return False


def is_zip(path: Path) -> bool:
    """Returns whether a file begins as a zip archive does, as `torch.save` writes it."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _legacy_intact(path: Path) -> bool:
    """Returns whether the pickles at the start of the file are complete. They have no checksums."""
    try:
        with open(path, "rb") as file:
            for _ in range(_LEGACY_PICKLES):
                for _ in pickletools.genops(file):
                    pass
        return True
    except Exception:  # pickletools raises ValueError for most damages, and others from decoding arguments
        return False


def _pickle_protocol(path: Path) -> int | None:
    """Returns the protocol that the file's first pickle names, or None if there is no pickle."""
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                start = file.read(2)
        else:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                start = archive.read(name)[:2]
    except Exception:  # a damaged directory raises any exception, such as UnicodeDecodeError
        return None
    return start[1] if start[:1] == b"\x80" and len(start) == 2 else None


class _StandIn:
    """An object that `_built` replaces by the value `value()`."""

    def value(self) -> Any:
        raise NotImplementedError


class _Dtype(_StandIn):
    """Stands for `numpy.dtype(code)`."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order, self.unit = str(code), "", ""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else ""
        if self.code[0] in "Mm":  # the last entry holds (metadata, (unit, multiple, 1, 1))
            unit, multiple, *_ = state[8][1]
            unit = unit.decode() if isinstance(unit, bytes) else unit
            self.unit = "" if unit == "generic" else f"[{int(multiple)}{unit}]"

    def value(self) -> np.dtype:
        if self.code[0] not in _NUMPY_KINDS:
            raise _RefusedTypeError(f"numpy.dtype({self.code!r})")
        return np.dtype(f"{self.order}{self.code}{self.unit}")


class _Array(_StandIn):
    """Stands for a `numpy.ndarray`."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def value(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        dtype = dtype.value()
        if not dtype.itemsize:
            return np.zeros(shape, dtype)
        return np.frombuffer(_bytes(data), dtype).reshape(shape, order="F" if fortran else "C").copy()


def _scalar(dtype: _Dtype, data: Any = b"") -> Any:
    kind = dtype.value()
    data = _bytes(data)
    if not kind.itemsize:
        return kind.type()
    return np.frombuffer(data, kind, count=1)[0]


def _bytes(data: Any = b"") -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _reconstruct(_kind: type, *_: Any) -> _Array:
    return _Array()


def _dict(*_: Any) -> dict[Any, Any]:
    return {}


def _list(items: Any = (), *_: Any) -> list[Any]:
    return list(items)


def _named(value: Any, *names: str) -> list[tuple[Any, str]]:
    return [(value, name) for name in names]


# What the unpickler creates for the names in a file.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    decimal.Decimal,
    *(getattr(datetime, name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        (kind, f"builtins.{kind.__name__}")
        for kind in (frozenset, range, slice, bool, int, float, str, list, tuple, dict)
    ),
    *_named(_bytes, "builtins.bytes"),  # how protocol 2 writes empty bytes
    *_named(_dict, "collections.defaultdict"),
    *_named(_list, "collections.deque"),
    *_named(OrderedDict, "easydict.EasyDict", "yacs.config.CfgNode", "addict.addict.Dict"),
    *(
        (pure, f"{module}.{kind}Path")
        for module in ("pathlib", "pathlib._local")  # the second one in Python 3.13
        for pure, kinds in (
            (pathlib.PurePosixPath, ("Posix", "PurePosix", "")),
            (pathlib.PureWindowsPath, ("Windows", "PureWindows")),
        )
        for kind in kinds
    ),
    *_named(_Dtype, "numpy.dtype"),
    *_named(_Array, "numpy.ndarray"),
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")  # before and from NumPy 2
        for function, name in ((_scalar, "scalar"), (_reconstruct, "_reconstruct"))
    ),
    *((np.dtype(code).type, f"numpy.{np.dtype(code).type.__name__}") for code in "?bBhHiIlLqQefdgFDGSUMm"),
    *_named(np.bool_, "numpy.bool_", "numpy.bool"),
]


def _built(value: Any, seen: set[int]) -> Any:
    """Replaces the stand-ins in nested dicts, lists, tuples and namespaces by their values; changes dicts and lists in
    place."""
    if isinstance(value, _StandIn):
        return value.value()
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_built(item, seen) for item in value)
    if id(value) in seen or not isinstance(value, dict | list | argparse.Namespace | types.SimpleNamespace):
        return value
    seen.add(id(value))
    items = value if isinstance(value, dict | list) else vars(value)
    for key in list(items) if isinstance(items, dict) else range(len(items)):
        items[key] = _built(items[key], seen)
    return value
