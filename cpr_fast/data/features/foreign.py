"""Readers for features that other programs wrote: a file per clip, or one file of all clips.

    FOLDER/**/NAME.npy, .npz, .pt   one array per file, [D] or [S, D]
    FILE.npy                        [N, D] or [N, S, D]; the names are the rows of a table in the same order
    FILE.npz, FILE.pt, FILE.h5      `features` [N, D] or [N, S, D], perhaps with `names` [N]; or one array per name

Letters: N clips, S features of a clip, such as of its segments, D dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.errors import InputError, is_installed
from cpr_fast.wording import counted, expected, listed

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".h5", ".hdf5")
FEATURES, NAMES = "features", "names"
_FORMS = "a folder of .npy, .npz or .pt files, or one file .npy, .npz, .pt or .h5"


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Foreign:
    """The features of N clips.

    Attributes:
        path: The file or folder.
        names: N names; None where the file has none.
        shape: S and D; S of the first clip.
        read: Returns the features of the clip at a position, [S, D] float32.
        files: The files of a folder; empty if `path` is the only one.
    """

    path: Path
    names: list[str] | None
    count: int
    shape: tuple[int, int]
    read: Callable[[int], np.ndarray]
    files: Sequence[Path] = ()

    def rows(self, positions: Sequence[int], samples: int | None) -> np.ndarray:
        """Returns the features of the clips at these positions, float32 [n, S, D], or [n, samples, D] of evenly spaced
        ones. Raises InputError that names the first clip of another shape."""
        segments, width = self.shape
        found = np.empty((len(positions), samples or segments, width), np.float32)
        for row, position in enumerate(positions):
            features = self.read(position)
            least = samples or segments
            fits = len(features) >= least if samples else len(features) == least
            if features.shape[1] != width or not fits:
                more = " or more features" if samples else " features"
                raise InputError(
                    f"{self.path}: {self._name(position)}: expected {least}{more} of {width} dimensions, as of "
                    f"{self._name(0)}, got {features.shape[0]} of {features.shape[1]}"
                    + ("" if samples else "; --samples M takes M evenly spaced features of every clip")
                )
            if samples:
                features = features[np.linspace(0, len(features) - 1, samples).round().astype(int)]
            found[row] = features
        return found

    def _name(self, position: int) -> str:
        return f"row {position}" if self.names is None else repr(self.names[position])


def open_foreign(option: str, path: Path) -> Foreign:
    """Opens features of another program. Raises InputError that names `option`, or the file and what is wrong."""
    if path.is_dir():
        return _of_folder(option, path)
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        state = f"has the suffix {path.suffix!r}" if path.is_file() else ""
        raise InputError(f"{option}: {expected(_FORMS, path, state)}")
    loaded = load_file(path)
    if not isinstance(loaded, Mapping):
        return _of_array(path, loaded, None)
    if FEATURES in loaded and len(_shape(loaded[FEATURES])) in (2, 3):
        if others := [str(name) for name in loaded if name not in (FEATURES, NAMES)]:
            log.info("%s: %s not read; labels, sources and splits are those of the table INDEX", path, _are(others))
        names = None if NAMES not in loaded else _texts(path, loaded[NAMES])
        return _of_array(path, loaded[FEATURES], names)
    names = list(loaded)
    if not names:
        raise InputError(f"{path}: expected an array of features per clip, got none")
    return _of_clips(path, names, lambda name: loaded[name])


def load_file(path: Path) -> Any:
    """Returns the array of a file, or {name: array}; of .npy and .h5, rows are read when they are asked for; .npz
    and .pt are read as a whole.

    Raises InputError that names the file if it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in (".h5", ".hdf5"):
        return _hdf5(path)
    try:
        if suffix in (".npy", ".npz"):
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            return {name: found[name] for name in found.files} if suffix == ".npz" else found
        import torch

        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # of torch.load, whose text is about its own options
        raise InputError(
            f"{path}: expected tensors that torch.save wrote, alone or in a dict or list, got other objects or a "
            "damaged file; save arrays as tensors (torch.from_numpy) or by numpy.save"
        ) from None
    except (OSError, ValueError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: expected arrays of numbers that NumPy or torch saved, got: {said}") from None


def _hdf5(path: Path) -> Mapping[str, Any]:
    if not is_installed("h5py"):
        raise InputError(f"{path}: HDF5 files are read with the package h5py, which is not installed: pip install h5py")
    import h5py

    try:
        file, found = h5py.File(path, "r"), {}
    except OSError as error:
        raise InputError(f"{path}: expected an HDF5 file, got: {error}") from None
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return found


def _are(names: Sequence[str]) -> str:
    return f"{listed(list(names))} {'is' if len(names) == 1 else 'are'}"


def _of_folder(option: str, folder: Path) -> Foreign:
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in (".npy", ".npz", ".pt", ".pth") and file.is_file():
            files.setdefault(file.suffix.lower(), []).append(file)
    if not files:
        raise InputError(f"{option}: {expected(_FORMS, folder, 'holds no such file')}")
    if len(files) > 1:
        found = listed([f"{len(some):,} {suffix}" for suffix, some in files.items()])
        raise InputError(f"{option}: expected files of one kind in {str(folder)!r}, got {found}")
    paths = {os.path.splitext(os.path.relpath(file, folder))[0]: file for some in files.values() for file in some}

    def read(name: str) -> Any:
        found = load_file(paths[name])
        if not isinstance(found, Mapping):
            return found
        if FEATURES in found or len(found) == 1:
            return found[FEATURES] if FEATURES in found else next(iter(found.values()))
        names = ", ".join(map(str, list(found)[:5]))
        raise InputError(f"{paths[name]}: expected one array, or one named {FEATURES!r}, got {names}")

    return dataclasses.replace(_of_clips(folder, list(paths), read), files=list(paths.values()))


def _of_clips(path: Path, names: list[str], load: Callable[[str], Any]) -> Foreign:
    def read(position: int) -> np.ndarray:
        found = _numbers(f"{path}: {names[position]!r}", load(names[position]))
        if found.ndim not in (1, 2) or not found.size:
            raise InputError(f"{path}: {names[position]!r}: expected features [D] or [S, D], got {list(found.shape)}")
        return np.atleast_2d(found)

    return Foreign(path, [str(name) for name in names], len(names), read(0).shape, read)


def _of_array(path: Path, array: Any, names: list[str] | None) -> Foreign:
    shape = _shape(array)
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(f"{path}: expected features [N, D] or [N, S, D], got {list(shape)}")
    if names is not None and len(names) != shape[0]:
        wanted = counted(shape[0], "name")
        raise InputError(f"{path}: expected {wanted}, one for each row of features, got {len(names)}")
    _numbers(str(path), array[0])
    read = functools.partial(_row, path, array)
    return Foreign(path, names, shape[0], (1, shape[1]) if len(shape) == 2 else (shape[1], shape[2]), read)


def _row(path: Path, array: Any, position: int) -> np.ndarray:
    return np.atleast_2d(_numbers(str(path), array[position]))


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(getattr(array, "shape", ()))


def _numbers(where: str, array: Any) -> np.ndarray:
    """Returns an array of NumPy, torch or h5py as float32. Raises InputError, which `where` begins, for other types."""
    if hasattr(array, "detach"):  # of torch, which may be bfloat16
        array = array.detach().float().numpy()
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{where}: expected numbers, got an array of {array.dtype}")
    return array.astype(np.float32)


def _texts(path: Path, names: Any) -> list[str]:
    """Returns the names of clips, which HDF5 stores as bytes."""
    rows = names[()] if hasattr(names, "asstr") else names
    rows = rows.tolist() if hasattr(rows, "tolist") else list(rows)
    texts = [row.decode("utf-8", "surrogateescape") if isinstance(row, bytes) else row for row in rows]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path}: {NAMES}: expected texts, got {type(texts[0]).__name__}")
    return texts
