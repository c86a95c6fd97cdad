"""The format of a store of features, and reading it by memory map.

    STORE/store.json               what the store holds, see `Description`
    STORE/clips.csv                a row per clip, see `cpr_fast.data.features.clips`
    STORE/rgb-00000.safetensors    a shard of a view; the shards of a view hold its clips in the order of clips.csv

A shard holds `samples` [C, M, D], the features of M samples of each of C clips, and in stores that `cpr-fast embed`
computed also `evaluation` [C, D], the feature of a clip without augmentation; where it is missing, the mean of the
samples takes its place. Sample m of a clip shows the same frames in every view. Features are float16 or float32, finite
and not normalised.

Only what is asked for is read: a store may be much larger than the memory.

Letters: N clips of the store, C clips of a shard, M samples, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cpr_fast.config import View
from cpr_fast.data.features.clips import ClipTable
from cpr_fast.data.features.names import FILE, TABLE, is_store, shard_name
from cpr_fast.errors import InputError
from cpr_fast.wording import counted, expected

FORMAT, VERSION = "cpr_fast features", 1
DTYPES = {"float16": "F16", "float32": "F32"}  # names in NumPy and in safetensors
CHUNK = 4096  # clips whose evaluation features are yielded at once
GAP = 64  # distance of two clips from which those between them are not read


@dataclass(frozen=True)
class Description:
    """What `store.json` holds, besides the format and its version.

    Attributes:
        views: D of each view.
        samples: M.
        evaluation: whether the shards hold `evaluation`.
        dtype: "float16" or "float32".
        encoder: what computed the features of each view, in words.
        source: digest of everything that the features depend on, by which an unfinished store is continued.
        planned: number of clips that were to be embedded for each shard.
        shards: number of clips in each shard; None while the store is not complete.
        digest: of the clips, of their features and of this description; "" while the store is not complete.
    """

    views: dict[str, int]
    samples: int
    evaluation: bool
    dtype: str
    encoder: dict[str, str]
    source: str
    planned: list[int]
    shards: list[int] | None = None
    digest: str = ""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Description:
        """Reads the description of a store. Raises InputError that names what is wrong."""
        path = folder / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT or values.pop("version") != VERSION:
                raise ValueError
            found = cls(**values)
            valid = found.dtype in DTYPES and set(found.views) <= set(get_args(View)) and found.samples > 0
            sizes = [*found.views.values(), *found.planned, *(1 + count for count in found.shards or ())]
            if not (valid and found.views and all(isinstance(size, int) and size > 0 for size in sizes)):
                raise ValueError
            return found
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise InputError(
                f"{path}: expected the description of a store of features, format {FORMAT!r}, version {VERSION}, as "
                "`cpr-fast embed` writes it"
            ) from None

    def with_digest(self, files: Iterable[Path]) -> Description:
        """Returns the description with its digest, for the table and the shards."""
        sha = hashlib.sha256(self.to_json().encode())
        for path in files:
            with open(path, "rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        return dataclasses.replace(self, digest=sha.hexdigest()[:32])


def header(path: Path) -> dict[str, Any]:
    """Returns the names, dtypes and shapes that a safetensors file states. Raises InputError if it cannot be read or is
    shorter than it states."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except FileNotFoundError:
        raise InputError(f"{path}: the shard is missing; embed the store again, or copy the file again") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: expected a safetensors file, got a damaged one ({error}); embed it again") from None


def check_shard(path: Path, view: str, clips: int, about: Description) -> None:
    """Raises InputError if the shard of a view is missing, is damaged, or its tensors are not those of `clips` clips
    that the description states. Reads its header only."""
    wanted = {"samples": (DTYPES[about.dtype], (clips, about.samples, about.views[view]))}
    if about.evaluation:
        wanted["evaluation"] = (DTYPES[about.dtype], (clips, about.views[view]))
    found = header(path)
    for name, tensor in wanted.items():
        if found.get(name) != tensor:
            raise InputError(f"{path}: expected {name} {_shown(tensor)}, as {FILE} states, got "
                             f"{_shown(found[name]) if name in found else 'none'}")  # fmt: skip


class FeatureStore:
    """A store of features that is complete.

    Attributes:
        folder: The folder of the store.
        about: Its description.
        table: What its N clips are.
        width: D, the largest of all views. The features of a view with fewer dimensions are read with zeros appended,
            which changes no similarity.
    """

    def __init__(self, folder: str | Path, option: str = "STORE") -> None:
        """Opens a store and checks that all of its files have the shapes that it states; no feature is read.

        Raises InputError that names `option` or the file, what came and what was expected.
        """
        self.folder = Path(folder)
        if not is_store(self.folder):
            state = "holds no store.json" if self.folder.is_dir() else "is a file" if self.folder.is_file() else ""
            raise InputError(f"{option}: {expected('a store of features (see `cpr-fast embed`)', folder, state)}")
        self.about = Description.load(self.folder)
        if self.about.shards is None:
            missing = sum(
                not all((self.folder / shard_name(view, i)).exists() for view in self.about.views)
                for i in range(len(self.about.planned))
            )
            raise InputError(
                f"{option}: the store {str(folder)!r} is not complete, {missing} of its "
                f"{counted(len(self.about.planned), 'shard')} are missing; repeat the `cpr-fast embed` that began it, "
                "without --shard"
            )
        self.width = max(self.about.views.values())
        self.table = ClipTable.load(self.folder / TABLE)
        self._begins = np.cumsum([0, *self.about.shards])
        if len(self.table) != self._begins[-1]:
            raise InputError(
                f"{self.folder / TABLE}: expected the {counted(int(self._begins[-1]), 'clip')} that {FILE} states, got "
                f"{len(self.table)}"
            )
        for number, clips in enumerate(self.about.shards):
            for view in self.about.views:
                check_shard(self.folder / shard_name(view, number), view, clips, self.about)

    def require_views(self, option: str, views: Sequence[str]) -> None:
        """Raises InputError that names `option` if the store lacks one of the views."""
        for view in views:
            if view not in self.about.views:
                raise InputError(f"{option}: expected features of the view {view!r}, but the store "
                                 f"{str(self.folder)!r} has {', '.join(self.about.views)}")  # fmt: skip

    def samples(self, view: str, begin: int, end: int) -> np.ndarray:
        """Returns the samples of the clips begin..end-1: [end - begin, M, D], in the dtype of the store."""
        return self._read(view, "samples", begin, end)

    def evaluation(self, view: str, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the evaluation features of clips, given by their ascending numbers int64 [n], as float32
        [CHUNK or fewer, D]. Raises InputError if one is not finite."""
        name = "evaluation" if self.about.evaluation else "samples"
        for begin in range(0, len(rows), CHUNK):
            some = rows[begin : begin + CHUNK]
            features = np.empty((len(some), self.width), np.float32)
            place = 0
            cuts = (np.diff(some) > GAP) | (np.diff(some // CHUNK) > 0)  # few rows in between, and few at once
            for run in np.split(some, np.flatnonzero(cuts) + 1):
                part = self._read(view, name, int(run[0]), int(run[-1]) + 1)[run - run[0]].astype(np.float32)
                features[place : place + len(run)] = part if self.about.evaluation else part.mean(1)
                place += len(run)
            self.require_finite(view, features, some)
            yield features

    def require_finite(self, view: str, features: np.ndarray, rows: np.ndarray) -> None:
        """Raises InputError that names the first clip, if a feature is NaN or infinite. `features` [n, ...] are those
        of the clips `rows` [n] in the store."""
        if np.isfinite(features.sum(dtype=np.float64)):
            return
        bad = np.flatnonzero(~np.isfinite(features.reshape(len(features), -1)).all(1))
        row = int(rows[bad[0]])
        number = int(np.searchsorted(self._begins, row, side="right")) - 1
        raise InputError(
            f"{self.folder / shard_name(view, number)}: expected finite features, got NaN or infinity in those of "
            f"{counted(len(bad), 'clip')} (first: row {row}, {self.table.paths[row]!r})"
        )

    def _read(self, view: str, name: str, begin: int, end: int) -> np.ndarray:
        """Returns rows of a tensor over all shards, with zeros appended to D columns.

        A file is mapped only while its rows are copied, so that the pages of a large store do not add up in the memory
        of the process.
        """
        from safetensors import safe_open

        parts = []
        for number in range(int(np.searchsorted(self._begins, begin, side="right")) - 1, len(self._begins) - 1):
            first, last = (int(bound) for bound in self._begins[number : number + 2])
            if first >= end:
                break
            if first == last:  # none of its videos could be read
                continue
            with safe_open(self.folder / shard_name(view, number), "numpy") as file:
                parts.append(file.get_slice(name)[max(begin - first, 0) : min(end, last) - first])
        rows = np.concatenate(parts) if len(parts) > 1 else parts[0]
        missing = self.width - rows.shape[-1]
        return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]) if missing else rows


def _shown(tensor: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = tensor
    return f"{next((name for name, code in DTYPES.items() if code == dtype), dtype)} {list(shape)}"
