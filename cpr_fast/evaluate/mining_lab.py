"""The mining lab: how well any cascade mines on stored two-view features [paper, Tables 1, 2 and 4, without training].

Every row queries all others; its own row and its siblings are excluded by ids, as in pretraining.
Letters: N rows, D feature width, n stages, K memory entries (here N), P positives mined per query.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from ..cascade import stage_keep, stage_views
from ..config import View
from ..errors import InputError
from ..ops import cascade_select
from ..progress import track
from .mining_quality import MiningQuality, class_units

ARRAYS = ("rgb", "flow", "label", "group")
QUERY_CHUNK = 4096  # queries mined at once: bounds what the kernel allocates
RATES = {"PMR": "pmr", "R@1": "r1", "CMR": "cmr_median", "mean CMR": "cmr_mean", "CMR/video": "cmr_median_video"}


@dataclass(frozen=True)
class TwoViewFeatures:
    """N rows seen in two views. Rows of the same label and the same group are siblings."""

    rgb: Tensor  # [N, D] float32
    flow: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64, -1 where unknown
    groups: Tensor  # [N] int64


def load_two_view_features(path: str | Path, *, raw: bool = False) -> TwoViewFeatures:
    """Features from an .npz file of the arrays `rgb`, `flow` [N, D] and `label`, `group` [N].

    Args:
        path: the file; features are of any floating point type, labels and groups integers or strings.
        raw: take the features as they are; otherwise each view is centred by its mean and L2-normalised.
    Raises:
        InputError: the file is no .npz, an array is missing or misshaped, or a feature is not finite.
    """
    arrays = _read_arrays(Path(path))
    features = {}
    for view in ("rgb", "flow"):
        if arrays[view].dtype.kind != "f" or arrays[view].ndim != 2 or 0 in arrays[view].shape:
            raise InputError(f"{path}: {view}: expected floating point [N, D], got {_describe(arrays[view])}")
        if arrays[view].shape != arrays["rgb"].shape:
            raise InputError(f"{path}: flow: expected the shape of rgb {arrays['rgb'].shape}, got {arrays[view].shape}")
        with np.errstate(over="ignore"):  # what does not fit is found below
            features[view] = torch.from_numpy(arrays[view].astype(np.float32))
        broken = (~features[view].isfinite()).any(1).nonzero().flatten()
        if len(broken):
            raise InputError(f"{path}: {view}: expected finite float32 features, row {broken[0]} has NaN or infinity")
    ids = {}
    for name in ("label", "group"):
        if arrays[name].dtype.kind not in "iuSU" or arrays[name].shape != arrays["rgb"].shape[:1]:
            expected = f"integers or strings [N={len(arrays['rgb'])}]"
            raise InputError(f"{path}: {name}: expected {expected}, got {_describe(arrays[name])}")
        ids[name] = np.unique(arrays[name], return_inverse=True)[1].astype(np.int64)
    if arrays["label"].dtype.kind == "i":
        ids["label"][arrays["label"] == -1] = -1
    rgb, flow = (value if raw else _centre_and_normalise(value) for value in features.values())
    return TwoViewFeatures(rgb, flow, torch.from_numpy(ids["label"]), torch.from_numpy(ids["group"]))


def sweep(
    data: TwoViewFeatures,
    *,
    stages: Sequence[int] = (1, 3, 5, 7),
    ratios: Sequence[float] = (0.5,),
    top_ks: Sequence[int] = (5,),
    query_views: Sequence[View] = ("rgb",),
    device: str = "auto",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Mining quality of every cascade of the product of the settings, the stages varying fastest.

    Args:
        stages: n; the ranking starts and ends in the view that is not the query's (n odd).
        ratios: r in (0, 1]: stage s < n keeps ``max(top_k, int(N * r**s))``.
        top_ks: P, what the last stage keeps, at most N.
    Returns:
        Rows of `stages`, `ratio`, `top_k`, `query_view`, and as fractions (None where no label is known) `pmr`,
        `r1` (the first mined entry is a true positive), `cmr_median` and `cmr_mean` over classes (unit source), and
        `cmr_median_video` (unit video).
    """
    _check_settings(stages, ratios, top_ks, query_views, len(data.labels))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    features = torch.stack([data.rgb, data.flow]).to(device)  # [2, N, D]
    quality = MiningQuality(data.labels, data.groups, device=device)
    sibling_ids, _ = class_units(quality.labels, data.groups.to(device), "source")  # [N]
    settings = list(itertools.product(query_views, top_ks, ratios, stages))
    rows = []
    for view, top_k, ratio, n in track(settings, "mining", total=len(settings), unit="cascades", progress=progress):
        query_first = features if view == "rgb" else features.flip(0)
        keep = stage_keep(n, len(data.labels), ratio, top_k)
        summary = _mine_all(query_first, sibling_ids, stage_views(n), keep, quality)
        rates = {"r1" if name == "mining_r1" else name: value for name, value in summary.items()}
        rows.append({"stages": n, "ratio": ratio, "top_k": top_k, "query_view": view, **rates})
    return rows


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `sweep` for a terminal, rates in percent, the highest of each rate in bold."""
    table = Table("query", "top-k", "ratio", "stages", caption="in percent; CMR: median over classes, unit source")
    for heading in RATES:
        table.add_column(heading, justify="right", no_wrap=True)
    best = {name: max((row[name] for row in rows if row[name] is not None), default=None) for name in RATES.values()}
    for row in rows:
        settings = (row["query_view"], str(row["top_k"]), f"{row['ratio']:g}", str(row["stages"]))
        table.add_row(*settings, *(_percent(row[name], row[name] == best[name]) for name in RATES.values()))
    return table


def _mine_all(
    features: Tensor, sibling_ids: Tensor, views: Sequence[int], keep: Sequence[int], quality: MiningQuality
) -> dict[str, float | None]:
    """`MiningQuality.summary` of one cascade in which all rows of `features` [2, N, D] query one another."""
    quality.reset()
    for rows in torch.arange(features.shape[1], device=features.device).split(QUERY_CHUNK):
        mined, _ = cascade_select(
            features[:, rows], features, views, keep, query_ids=sibling_ids[rows], memory_ids=sibling_ids
        )  # [B, P]
        quality.update(mined, rows)
    return quality.summary()


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: expected an .npz file of the arrays {', '.join(ARRAYS)}, got a single array")
        with archive:
            missing = [name for name in ARRAYS if name not in archive]
            if missing:
                raise InputError(f"{path}: expected the arrays {', '.join(ARRAYS)}, missing {', '.join(missing)}")
            return {name: archive[name] for name in ARRAYS}
    except InputError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: expected a readable .npz file: {error}") from error


def _centre_and_normalise(features: Tensor) -> Tensor:
    centred = features.double() - features.double().mean(0)
    return F.normalize(centred, dim=1).float()


def _check_settings(
    stages: Sequence[int], ratios: Sequence[float], top_ks: Sequence[int], query_views: Sequence[str], rows: int
) -> None:
    settings = {"stages": stages, "ratio": ratios, "top_k": top_ks, "query_view": query_views}
    for name, values in settings.items():
        if not values:
            raise InputError(f"{name}: expected at least one value, got none")
    for n in stages:
        if n < 1:
            raise InputError(f"stages: expected at least 1, got {n}")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"ratio: expected a fraction in (0, 1], got {ratio}")
    for top_k in top_ks:
        if not 1 <= top_k <= rows:
            raise InputError(f"top_k: expected 1..{rows} (the number of rows), got {top_k}")
    for view in query_views:
        if view not in ("rgb", "flow"):
            raise InputError(f"query_view: expected 'rgb' or 'flow', got {view!r}")


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _percent(rate: float | None, best: bool) -> str:
    if rate is None:
        return "–"
    return f"[bold]{100 * rate:.2f}[/bold]" if best else f"{100 * rate:.2f}"
