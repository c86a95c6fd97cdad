"""`cpr-fast mine`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cpr_fast.commands.inputs import require_checkpoints, require_features
from cpr_fast.commands.options import Flag, Json
from cpr_fast.commands.output import show
from cpr_fast.data.features.names import is_store
from cpr_fast.errors import InputError

if TYPE_CHECKING:
    from cpr_fast.mining.lab import TwoViewFeatures


def mine(
    features: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FEATURES")],
    *,
    stages: tuple[int, ...] = (1, 3, 5, 7),
    ratio: tuple[float, ...] = (0.5,),
    top_k: tuple[int, ...] = (5,),
    query_view: tuple[Literal["rgb", "flow"], ...] = ("rgb",),
    order: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: alternating views)")] = (),
    auto: Flag = False,
    details: Flag = False,
    raw: Flag = False,
    checkpoint: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = (),
    heatmap: Path | None = None,
    json: Json = False,
) -> None:
    """Measure the mining quality (PMR, CMR, mining R@1) of cascades on stored features of two views.

    Every combination of the given stages, ratios, top-k, query views and orders is measured, without training.

    Args:
        features: An .npz file with the arrays rgb and flow [N, D], and label and group [N], or a store of features (see
            `cpr-fast embed`) with these views. Rows of the same label and group, or clips of one source in a store, are
            siblings, which are never mined.
        stages: Numbers of stages.
        ratio: Fractions of the entries that each stage but the last keeps.
        top_k: Numbers of entries that the last stage keeps.
        query_view: Views of the query; the cascade ends in the other view.
        order: Views of the stages as letters, such as "frf" for flow, RGB, flow; instead of --stages and --query-view.
        auto: Also choose a cascade without labels, as `--mining.stages auto` does in training, with at most the largest
            of --top-k positives, and measure it.
        details: Also print what each stage keeps and loses, and view agreement and mutual neighbours, which need no
            labels.
        raw: Use the features without centring and L2 normalisation: with --checkpoint or a dumped memory, these are
            what training compares.
        checkpoint: With a store, a checkpoint trained on features, whose L2-normalised projections are mined.
        heatmap: A PNG file to write: PMR over stages and ratio.
    """
    require_features("FEATURES", features)
    if checkpoint and not is_store(features):
        raise InputError(f"--checkpoint: expected a store of features with it, got FEATURES {str(features)!r}")
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch")
    from cpr_fast.mining.lab import choose_cascade, load_two_view_features, sweep

    load = partial(_of_store, checkpoint=checkpoint) if is_store(features) else load_two_view_features
    data = load(features, raw=raw)
    rows = sweep(
        data, stages=stages, ratios=ratio, top_ks=top_k, query_views=query_view, orders=order, details=details,
        progress=True,
    )  # fmt: skip
    chosen = choose_cascade(data, max(top_k)) if auto else None
    if heatmap is not None:
        from cpr_fast.report.figures.heatmap import write_heatmap

        write_heatmap(rows, heatmap)
    if not json:
        _print(rows, chosen, details)
    result = {"features": str(features), "rows": len(data.labels), "results": rows}
    show(result | ({"auto": chosen} if chosen else {}), json, lines=[], next_step=_next_step(rows, auto))


def _of_store(folder: Path, *, checkpoint: tuple[str, ...], raw: bool) -> TwoViewFeatures:
    """Returns the features of a store in the views RGB and flow, or, as in training, their L2-normalised projections by
    the heads of a checkpoint. As in training, clips of one source are siblings, whatever their labels."""
    if checkpoint:
        require_checkpoints("--checkpoint", checkpoint)
    import torch

    from cpr_fast.evaluate.features.cache import embed_index
    from cpr_fast.evaluate.features.embedding import Embedding
    from cpr_fast.evaluate.features.pretrained import load_pretrained
    from cpr_fast.evaluate.features.recipe import Recipe
    from cpr_fast.evaluate.features.windows import open_windows
    from cpr_fast.mining.lab import two_views

    how, views = Recipe("paper", metric="plain_cosine"), ["rgb", "flow"]
    networks = load_pretrained(checkpoint or str(folder))
    clips = networks.open("FEATURES", folder)
    clips.store.require_views("FEATURES", views)
    if missing := [view for view in views if view not in networks.encoders]:
        raise InputError(f"--checkpoint: expected heads of the views rgb and flow, got none of {missing[0]}")
    embeddings = {
        view: Embedding(
            view, networks.encoders[view] if networks.stored is None else networks.encoders[view].features, how.metric
        )
        for view in views
    }
    found, _ = embed_index(clips, embeddings, lambda part: open_windows(part, networks.data, views, how, "cpu"))
    labels, sources = torch.from_numpy(clips.labels), torch.from_numpy(clips.source_ids)
    return two_views(found["rgb"], found["flow"], labels, sources, sources, raw=raw)


def _print(rows: list[dict[str, Any]], chosen: dict[str, Any] | None, details: bool) -> None:
    from rich.console import Console

    from cpr_fast.mining.lab import results_table, survivors_table

    Console().print(results_table(rows))
    if details and rows[0]["pmr"] is not None:
        Console().print(survivors_table(rows))
    if chosen is not None:
        print(_said(chosen))


def _said(chosen: dict[str, Any]) -> str:
    """Returns the chosen cascade, the reason, and its PMR where labels are known."""
    rate = "" if chosen["pmr"] is None else f". PMR {100 * chosen['pmr']:.2f} %"
    return f"Chosen without labels: {chosen['text']}{rate}"


def _next_step(rows: list[dict[str, Any]], auto: bool) -> str:
    """Returns the command that trains with the cascade of the highest PMR, the first one if no label is known; or with
    one that is chosen in training."""
    if auto:
        return "cpr-fast pretrain RECIPE --mining.stages auto"
    best = max(rows, key=lambda row: row["pmr"] or 0)
    return (
        f"cpr-fast pretrain RECIPE --mining.stages {best['stages']} --mining.ratio {best['ratio']:g} "
        f"--mining.top-k {best['top_k']}"
    )
