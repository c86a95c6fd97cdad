"""Explains the encoder, the memory, the cascade and the loss.

Letters: T frames, K memory entries, n stages, r ratio, C channels, D feature width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from cpr_fast.config import Config, Cycle, ModelConfig
from cpr_fast.experiments.explain.section import Section, fraction
from cpr_fast.mining.stages import RATIOS, STAGES, idle_stages, stage_keep, stage_views
from cpr_fast.pretrain.run.checks import CyclePlan
from cpr_fast.wording import counted

# Channels and parameters of the backbones at model.width = 1; a test compares them with the networks. Networks of other
# factories are not counted, because that would import their code.
BACKBONES = {
    "s3d": (1024, 7_910_048),
    "s3dg": (1024, 9_098_000),
    "s3d_milnce": (1024, 9_146_000),
    "r3d": (512, 14_361_792),
    "r21d": (512, 14_365_303),
    "c3d": (512, 27_661_440),
}


def parameters(model: ModelConfig) -> int | None:
    """Returns the number of parameters of an encoder, or None for a width other than 1 or a network that is not
    among `BACKBONES`."""
    if model.width != 1 or model.arch not in BACKBONES:
        return None
    channels, backbone = BACKBONES[model.arch]
    head = channels * (channels + 1) + model.feature_dim * (channels + 1) if model.head == "mlp" else 0
    return backbone + head


def encoder(config: Config) -> Section:
    """Explains the encoder, and which weights it starts from."""
    model, number = config.model, parameters(config.model)
    width = "" if model.width == 1 else f" at {fraction(model.width)} of its width"
    heads = {
        "mlp": f"two linear layers to {model.feature_dim} dimensions, L2-normalised",
        "unit": f"none: the {model.feature_dim} pooled features, L2-normalised",
        "pooled": f"none: the {model.feature_dim} pooled features as they are",
    }
    arguments = ", ".join(f"{name} = {value!r}" for name, value in model.args.items())
    arguments = f" with {arguments}" if arguments else ""
    size = "" if number is None else f", {number / 1e6:.2f} M parameters with the head"
    shared = "one encoder for both views" if model.shared else "one encoder per view"
    given = {view: path for view, path in vars(model.init).items() if path}
    starts = "; ".join(f"{view} from {path}" for view, path in given.items()) or "random weights"
    network = f"{model.arch}{arguments}{width}{size}; {shared}"
    if config.data.features:
        network = f"none; the head reads the stored features; {shared}"
    rows = [("network", network), ("head", heads[model.head]), ("starts from", starts)]
    values = {"arch": model.arch, "args": model.args, "pool": model.pool, "width": model.width, "parameters": number,
              "head": model.head, "feature_dim": model.feature_dim, "shared": model.shared, "init": given}  # fmt: skip
    return Section("Encoder", rows, values)


def memory_size(config: Config, videos: int, clips: int) -> int:
    """Returns K, the number of entries of a memory, for `clips` videos per step."""
    return {"queue": config.memory.size, "bank": videos, "batch": 2 * clips}[config.memory.kind]


def memory(config: Config, plan: CyclePlan, size: int) -> Section:
    """Explains the memory: its entries, and how keys are computed."""
    kind = config.memory.kind
    full = f"full after {counted(plan.fill_steps, 'step')} of {counted(plan.clips, 'video')}"
    entries = {
        "queue": f"queue of the newest {counted(size, 'key')}, {full}",
        "bank": f"bank of {size:,} entries, one per video, {full}; momentum {fraction(config.memory.bank_momentum)}",
        "batch": f"the {counted(size, 'clip')} of a batch",
    }
    rows = [("entries", entries[kind])]
    if kind == "queue" and any(not cycle.waits_for_queue(config.memory) for cycle in config.schedule.cycles):
        rows.append(("", "starts with random vectors as negatives in cycles without a cascade"))
    if kind != "batch" and not config.model.shared:
        groups = config.memory.shuffle_bn_groups
        apart = "one group per process" if groups is None else f"{groups} groups (shuffle-BN)"
        final = config.memory.final_ema_momentum
        momentum = f"{config.memory.ema_momentum:g}" + ("" if final is None else f" on a cosine to {final:g}")
        rows.append(("keys", f"moving average of the query encoder, momentum {momentum}; BatchNorm in {apart}"))
    return Section("Memory", rows, {"kind": kind, "size": size, "full_after_steps": plan.fill_steps})


def mining(config: Config, size: int) -> Section | None:
    """Explains the cascade: the view and the number of survivors of every stage; None if no cycle mines."""
    cycles = [cycle for cycle in config.schedule.cycles if cycle.mining == "cascade"]
    if not cycles:
        return None
    anchor = anchor_of(config)
    feature = "the query's own key (f_q+)" if anchor == "key" else "the query (f_q)"
    compared = ("compared with", f"{feature}; videos of the query's source are never mined")
    if config.mining.stages == "auto":
        return _chosen_mining(config, cycles, size, compared)
    values, alike = [], {}
    for cycle, own in itertools.product(cycles, (0, 1) if config.model.shared else (0,)):
        views, keep = _stages(config, cycle, size, own)
        idle = idle_stages(keep, size)
        query_view = cycle.views(shared=config.model.shared)[own]
        value = {"view": query_view, "views": views, "keep": list(keep), "idle_stages": idle}
        if value not in values:
            values.append(value)
            alike.setdefault((tuple(views), keep[:-1], tuple(idle)), []).append(value)
    rows = [(f"for {group[0]['view']}", _cascade(group)) for group in alike.values()]
    stages = config.mining.stages
    ratio = f", r = {fraction(config.mining.ratio)}" if stages > 1 else ", as in CoCLR"
    rows.insert(0, ("stages", f"n = {stages}{ratio}, {size:,} entries; view and survivors of each stage:"))
    rows.append(compared)
    return Section(
        "Mining", rows, {"stages": stages, "ratio": config.mining.ratio, "anchor": anchor, "cascades": values}
    )


def _chosen_mining(config: Config, cycles: Sequence[Cycle], size: int, compared: tuple[str, str]) -> Section:
    """Explains a cascade that is chosen during training."""
    most = max(config.mining.top_k if cycle.top_k is None else cycle.top_k for cycle in cycles)
    numbers, ratios = ", ".join(map(str, STAGES)), ", ".join(map(fraction, RATIOS))
    rows = [
        ("stages", f"chosen in every epoch from {size:,} entries, by measures that need no labels:"),
        ("", f"last view, n = {numbers}, r = {ratios}, top-k of {most} or less"),
        compared,
    ]
    values = {"stages": "auto", "candidates": {"stages": STAGES, "ratio": RATIOS, "largest_top_k": most}}
    return Section("Mining", rows, values | {"anchor": anchor_of(config)})


def anchor_of(config: Config) -> str:
    """Returns the feature that the cascade compares in the query's view."""
    return config.mining.anchor or ("query" if config.loss.protocol == "coclr" else "key")


def _cascade(group: Sequence[dict[str, Any]]) -> str:
    """Returns the stages of cascades that differ only in top-k."""
    first = group[0]
    last = ", ".join(f"{value['keep'][-1]:,}" for value in group)
    kept = [*(f"{number:,}" for number in first["keep"][:-1]), last]
    stages = " > ".join(f"{view} {number}" for view, number in zip(first["views"], kept, strict=True))
    return stages + _said(first["idle_stages"]) + (" (top-k of the cycles)" if len(group) > 1 else "")


def _stages(config: Config, cycle: Cycle, size: int, own: int) -> tuple[list[str], tuple[int, ...]]:
    """Returns the view and the number of survivors of every stage, for queries of the view `own` of the cycle."""
    views = cycle.views(shared=config.model.shared)
    top_k = config.mining.top_k if cycle.top_k is None else cycle.top_k
    order = stage_views(config.mining.stages, config.loss.protocol)
    return [views[view ^ own] for view in order], stage_keep(config.mining.stages, size, config.mining.ratio, top_k)


def _said(idle: Sequence[int]) -> str:
    if not idle:
        return ""
    which = f"stage {idle[0]} selects" if len(idle) == 1 else f"stages {', '.join(map(str, idle))} select"
    return f"; {which} nothing, because as many entries come in as it keeps"


def loss(config: Config) -> Section:
    """Explains the loss of every kind of cycle."""
    settings, minings = config.loss, {cycle.mining for cycle in config.schedule.cycles}
    coclr = settings.protocol == "coclr"
    rows = [("protocol", f"{settings.protocol}; temperature {fraction(settings.temperature)}")]
    if config.model.shared:
        rows.append(("q+", "the entry of the query's video in the other view; each view learns from the other"))
    if "none" in minings:
        rows.append(
            (
                "InfoNCE",
                "positive: q+, the key of the video's other clip; negatives: the other entries, siblings included",
            )
        )
    if "label" in minings:
        form = "log-softmax averaged over the positives" if coclr else "MIL-NCE"
        rows.append(
            ("UberNCE", f"positives: q+ and the entries with the query's label ({form}); negatives: the others")
        )
    if "cascade" in minings:
        siblings = ", siblings (entries of the query's source)" if coclr else ""
        rest = "the others" if coclr else "the others, siblings included"
        rows.append(("MIL-NCE", f"positives: q+, the mined entries{siblings}; negatives: {rest}"))
        if coclr:
            rows.append(("", f"q+ is only in the denominator in {settings.self_positive_drop:.0%} of the steps"))
    if settings.intra_negatives != "none":
        still = {"repeat": "one frame repeated", "shuffle": "two quarters exchanged"}[settings.intra_negatives]
        rows.append(("intra", f"further negatives: every video without its motion ({still})"))
    return Section("Loss", rows, dict(vars(settings)))
