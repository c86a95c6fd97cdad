"""The mining lab: measures the mining quality of any cascade on stored features of two views, without training.

The settings are those of Tables 1, 2 and 4 of the paper.

Every row is used as a query for all other rows. The row itself and its siblings are excluded by their ids, as in
pretraining.

Letters: N rows, D feature width, n stages, K memory entries (here N), P positives mined per query.
"""

from __future__ import annotations

import itertools
import logging
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor

from cpr_fast.config import View
from cpr_fast.errors import InputError
from cpr_fast.mining.auto import choose
from cpr_fast.mining.proxies import mutual_neighbours, view_agreement
from cpr_fast.mining.quality import MiningQuality, class_units
from cpr_fast.mining.stages import stage_keep, stage_views
from cpr_fast.mining.survivors import survivor_rates
from cpr_fast.ops import cascade_select
from cpr_fast.runtime.distributed import device_of
from cpr_fast.runtime.progress import track
from cpr_fast.wording import counted

ARRAYS = ("rgb", "flow", "label", "group")
QUERY_CHUNK = 4096  # number of queries mined at once, which bounds the memory of the kernel
RATES = {
    "PMR": "pmr",
    "R@1": "r1",
    "CMR": "cmr_median",
    "mean\nCMR": "cmr_mean",
    "CMR/\nvideo": "cmr_median_video",
    "agree-\nment": "view_agreement",
    "mutual": "mutual_neighbours",
}
# Eleven columns fit into a terminal of 80 characters.
_NARROW = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TwoViewFeatures:
    """N rows seen in two views. Rows of the same source are siblings; where sources are not given, those of the same
    label and the same group."""

    rgb: Tensor  # [N, D] float32
    flow: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64, -1 where unknown
    groups: Tensor  # [N] int64
    sources: Tensor | None = None  # [N] int64, not negative

    @property
    def sibling_ids(self) -> Tensor:
        """[N] int64: equal for siblings."""
        return class_units(self.labels, self.groups, "source")[0] if self.sources is None else self.sources


def load_two_view_features(path: str | Path, *, raw: bool = False) -> TwoViewFeatures:
    """Reads features from an .npz file of the arrays `rgb`, `flow` [N, D] and `label`, `group` [N].

    Args:
        path: The file. Features may have any floating point type; labels and groups are integers or strings.
        raw: Take the features as they are; otherwise each view is centred by its mean and L2-normalised.
    Raises:
        InputError: The file is not an .npz file, an array is missing or has the wrong shape, or a feature is not
            finite.
    """
    arrays = _read_arrays(Path(path))
    features = {}
    for view in ("rgb", "flow"):
        if arrays[view].dtype.kind != "f" or arrays[view].ndim != 2 or 0 in arrays[view].shape:
            raise InputError(f"{path}: {view}: expected floating point [N, D], got {_describe(arrays[view])}")
        if arrays[view].shape != arrays["rgb"].shape:
            raise InputError(f"{path}: flow: expected the shape of rgb {arrays['rgb'].shape}, got {arrays[view].shape}")
        with np.errstate(over="ignore"):  # values that overflow become infinite and are rejected below
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
    labels, groups = (torch.from_numpy(ids[name]) for name in ("label", "group"))
    return two_views(features["rgb"], features["flow"], labels, groups, raw=raw)


def two_views(
    rgb: Tensor, flow: Tensor, labels: Tensor, groups: Tensor, sources: Tensor | None = None, *, raw: bool = False
) -> TwoViewFeatures:
    """Returns features [N, D] as they are mined: `raw`, or each view centred by its mean and L2-normalised."""
    rgb, flow = (view if raw else _centre_and_normalise(view) for view in (rgb, flow))
    return TwoViewFeatures(rgb, flow, labels, groups, sources)


def sweep(
    data: TwoViewFeatures,
    *,
    stages: Sequence[int] = (1, 3, 5, 7),
    ratios: Sequence[float] = (0.5,),
    top_ks: Sequence[int] = (5,),
    query_views: Sequence[View] = ("rgb",),
    orders: Sequence[str] = (),
    details: bool = False,
    device: str = "auto",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Measures the mining quality of every combination of the settings; the stages vary fastest.

    Args:
        stages: n. The last stage ranks in the view that is not the query's; for an odd n, the first one does so too.
        ratios: r in (0, 1]: stage s < n keeps ``max(top_k, int(N * r**s))``.
        top_ks: P, the number of entries that the last stage keeps, at most N.
        orders: views of the stages as letters: "frf" is flow, RGB, flow. If given, the numbers of stages and the query
            views follow from them.
        details: also measure the precision and recall of each stage, and the proxies that need no labels; ten times
            slower. If no row has a label, the details are always measured, because all other rates need labels.
    Returns:
        Rows of `stages`, `ratio`, `top_k`, `query_view`, `order`, and as fractions (None where no label is known):
        `pmr`, `r1` (the first mined entry is a true positive), `cmr_median` and `cmr_mean` over classes (unit source),
        `cmr_median_video` (unit video); and of `hubness`, `hub_share`, `mined_share` (see `MiningQuality.summary`).
        With details also `view_agreement`, `mutual_neighbours`, `pmr_chance`, `survivor_precision_s` and
        `survivor_recall_s` for s = 1..n.
    """
    _check_settings(stages, ratios, top_ks, query_views, orders, len(data.labels))
    details = details or not (data.labels >= 0).any()
    where = device_of(device)
    features = torch.stack([data.rgb, data.flow]).to(where)  # [2, N, D]
    sibling_ids = data.sibling_ids.to(where)  # [N]
    groups = [orders] if orders else [[view_order(view, n) for n in stages] for view in query_views]
    settings = [s for group in groups for s in itertools.product(top_ks, ratios, group)]
    if progress:
        log.info("mining: %s on %s of features", counted(len(settings), "cascade"), counted(len(data.labels), "row"))
    rows = []
    for top_k, ratio, order in track(settings, "mining", total=len(settings), unit="cascades", progress=progress):
        keep = stage_keep(len(order), len(data.labels), ratio, top_k)
        cascade = Cascade(features, sibling_ids, ["rf".index(letter) for letter in order], keep)
        summary = _mine_all(cascade, data, details)
        rates = {"r1" if name == "mining_r1" else name: value for name, value in summary.items()}
        setting = {"stages": len(order), "ratio": ratio, "top_k": top_k, "query_view": query_view(order)}
        rows.append(setting | {"order": order} | rates)
    return rows


def choose_cascade(data: TwoViewFeatures, top_k: int, *, device: str = "auto") -> dict[str, Any]:
    """Chooses a cascade without labels, as mining.stages = "auto" does in training, and measures it.

    Args:
        top_k: the largest number of positives that may be chosen, at most N.
    Returns:
        The row of `sweep` for the chosen cascade, with `text`, the reason, and `criteria`, see `Choice`.
    """
    _check_settings((1,), (1.0,), (top_k,), ("rgb",), (), len(data.labels))
    where = device_of(device)
    choice = choose(torch.stack([data.rgb, data.flow]).to(where), data.sibling_ids.to(where), top_k)
    order = "".join("rf"[view] for view in choice.views)
    (row,) = sweep(data, ratios=[choice.ratio], top_ks=[choice.top_k], orders=[order], device=device)
    return row | {"text": choice.reason(("rgb", "flow")), "criteria": choice.criteria}


def view_order(query_view: View, stages: int) -> str:
    """Returns SV(1..n) as letters, such as "frf": alternating, and ending in the view that is not the query's.

    Source: Fig. 1 of the paper.
    """
    own, other = ("r", "f") if query_view == "rgb" else ("f", "r")
    return "".join((own, other)[view] for view in stage_views(stages))


def query_view(order: str) -> View:
    """Returns the view of the queries for a cascade of this order: the view that its last stage does not use."""
    return "rgb" if order.endswith("f") else "flow"


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the rows of `sweep` as a table: rates in percent, the highest of each column in bold."""
    caption = "in percent; CMR: median over classes, unit source"
    table = Table(**_NARROW, caption=caption, caption_justify="left")
    for heading in ("n", "views", "top-k", "ratio"):
        table.add_column(heading, no_wrap=True)
    columns = [(heading, name) for heading, name in RATES.items() if all(name in row for row in rows)]
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    best = {name: max((row[name] for row in rows if row[name] is not None), default=None) for _, name in columns}
    for row in rows:
        settings = (str(row["stages"]), row["order"], str(row["top_k"]), f"{row['ratio']:g}")
        table.add_row(*settings, *(_percent(row[name], row[name] == best[name]) for _, name in columns))
    return table


def survivors_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns a table of precision and recall after each stage, in percent, for the deepest cascade of detailed
    rows."""
    row = max(rows, key=lambda row: row["stages"])
    names = {"r": "RGB", "f": "flow"}
    caption = f"survivors of {row['order']}, ratio {row['ratio']:g}, top-{row['top_k']}, in percent"
    table = Table("stage", "view", **_NARROW, caption=caption, caption_justify="left")
    for heading in ("precision", "recall"):
        table.add_column(heading, justify="right")
    table.add_row("0", "", _percent(row["pmr_chance"]), _percent(1.0))
    for stage, letter in enumerate(row["order"], 1):
        rates = (_percent(row[f"survivor_{name}_{stage}"]) for name in ("precision", "recall"))
        table.add_row(str(stage), names[letter], *rates)
    return table


@dataclass(frozen=True)
class Cascade:
    """A cascade over rows of features, in which every row can be a query and an entry of the memory."""

    features: Tensor  # [2, N, D] float32: RGB, flow
    ids: Tensor  # [N] int64, equal for siblings
    views: Sequence[int]  # n, SV(s): 0 is RGB, 1 flow
    keep: Sequence[int]  # n

    def mine(self, rows: Tensor) -> Tensor:
        """Returns the entries mined for the queries at these rows: [len(rows), P] int64, -1 where fewer remain."""
        queries = self.features[:, rows]
        return cascade_select(
            queries, self.features, self.views, self.keep, query_ids=self.ids[rows], memory_ids=self.ids
        )[0]

    def details(self, rows: Tensor, mined: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns the rates of each query that `MiningQuality` does not compute: {name: [len(rows)]}; labels is [N]."""
        ids = {"query_ids": self.ids[rows], "memory_ids": self.ids}
        query_view = self.features[1 - self.views[-1]]
        survivors = survivor_rates(
            self.features[:, rows], self.features, self.views, self.keep, mined,
            **ids, query_labels=labels[rows], memory_labels=labels,
        )  # fmt: skip
        return survivors | {
            "view_agreement": view_agreement(query_view[rows], query_view, mined, **ids),
            "mutual_neighbours": mutual_neighbours(query_view[rows], query_view, mined, **ids),
        }


def _mine_all(cascade: Cascade, data: TwoViewFeatures, details: bool) -> dict[str, float | None]:
    """Returns `MiningQuality.summary` of one cascade, with every row as a query for all other rows."""
    device = cascade.features.device
    labels, quality = data.labels.to(device), None
    for rows in torch.arange(len(labels), device=device).split(QUERY_CHUNK):
        mined = cascade.mine(rows)  # [B, P]
        extra = cascade.details(rows, mined, labels) if details else {}
        quality = quality or MiningQuality(
            labels, data.groups, top_k=cascade.keep[-1], extra=list(extra), device=device
        )
        quality.update(mined, rows, extra)
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
        why = "" if "pickle" in str(error) else f" ({error})"  # NumPy speaks of pickles for every other kind of file
        raise InputError(
            f"{path}: expected an .npz file of the arrays {', '.join(ARRAYS)}, but it cannot be read as one{why}; "
            "`cpr-fast pretrain --dump-memory` writes RUN/memory/cycle-N.npz"
        ) from error


def _centre_and_normalise(features: Tensor) -> Tensor:
    centred = features.double() - features.double().mean(0)
    return F.normalize(centred, dim=1).float()


def _check_settings(
    stages: Sequence[int],
    ratios: Sequence[float],
    top_ks: Sequence[int],
    query_views: Sequence[str],
    orders: Sequence[str],
    rows: int,
) -> None:
    settings = {"stages": stages, "ratio": ratios, "top_k": top_ks, "query_view": query_views}
    for name, values in settings.items():
        if not values:
            raise InputError(f"--{name}: expected at least one value, got none")
    for n in stages:
        if n < 1:
            raise InputError(f"--stages: expected at least 1, got {n}")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"--ratio: expected a fraction in (0, 1], got {ratio}")
    for top_k in top_ks:
        if not 1 <= top_k <= rows:
            raise InputError(f"--top-k: expected 1 to {rows} (the number of rows), got {top_k}")
    for view in query_views:
        if view not in ("rgb", "flow"):
            raise InputError(f"--query-view: expected 'rgb' or 'flow', got {view!r}")
    for order in orders:
        if not order or set(order) - {"r", "f"}:
            raise InputError(f"--order: expected letters r (RGB) and f (flow), such as 'frf', got {order!r}")


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _percent(rate: float | None, best: bool = False) -> str:
    if rate is None:
        return "–"
    return f"[bold]{100 * rate:.2f}[/bold]" if best else f"{100 * rate:.2f}"
