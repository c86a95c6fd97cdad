"""The registered comparisons, and what decides them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpr_fast.evaluate.retrieval.paired import paired_difference, seed_difference

from .rows import query_sources, query_values
from .settings import BETTER, SEEDS, SETTINGS

# The rise of a straight line through n = 1, 3, 5, 7 (least squares), from n = 1 to n = 7.
TREND = {"coclr": -0.9, "cpr_n3": -0.3, "cpr_n5": 0.3, "cpr_n7": 0.9}


@dataclass(frozen=True)
class Claim:
    """A weighted sum of settings that is expected to be positive (or, if two-sided, is only asked for its sign).

    Attributes:
        measure: "map" or "r@1" (two-stream unless a view is named), "pmr" or "cmr_median" (of the last epoch).
    """

    text: str
    weights: dict[str, float]
    measure: str = "map"
    view: str = "two_stream"
    two_sided: bool = False


def _pair(text: str, first: str, second: str, **changes: Any) -> Claim:
    return Claim(text, {first: 1.0, second: -1.0}, **changes)


PRIMARY = _pair("**primary: mAP, CPR n = 7 > CoCLR**", "cpr_n7", "coclr")
CLAIMS = (
    PRIMARY,
    Claim("1. mAP rises with n", TREND),
    Claim("1. R@1 rises with n", TREND, "r@1"),
    Claim("1. PMR rises with n, RGB queries", TREND, "pmr", "rgb"),
    Claim("1. PMR rises with n, flow queries", TREND, "pmr", "flow"),
    _pair("1. median CMR, n = 7 > CoCLR, RGB queries", "cpr_n7", "coclr", measure="cmr_median", view="rgb"),
    _pair("1. median CMR, n = 7 > CoCLR, flow queries", "cpr_n7", "coclr", measure="cmr_median", view="flow"),
    _pair("2. mAP, r = .5 > r = .8, n = 7", "cpr_n7", "cpr_n7_r.8"),
    _pair("2. mAP, r = .5 > r = .8, n = 3", "cpr_n3", "cpr_n3_r.8"),
    _pair("2. mAP, r = .5 against r = .3, n = 3", "cpr_n3", "cpr_n3_r.3", two_sided=True),
    _pair("3. mAP, UberNCE > CPR n = 7", "ubernce", "cpr_n7"),
    _pair("3. mAP, CoCLR > InfoNCE", "coclr", "infonce"),
    _pair("3. mAP, CPR n = 7 > InfoNCE", "cpr_n7", "infonce"),
    _pair("3. R@1, CPR n = 7 > CoCLR", "cpr_n7", "coclr", measure="r@1"),
    _pair("3. R@1, CPR n = 7 > InfoNCE", "cpr_n7", "infonce", measure="r@1"),
    _pair("mAP, InfoNCE > untrained", "infonce", "untrained"),
    _pair("mAP, InfoNCE continued against its start", "infonce", "start", two_sided=True),
    _pair("4. mAP, IIC + CPR, progressive > fixed top-k", "iic_cpr_progressive", "iic_cpr_fixed", view="merged"),
    _pair("4. mAP, IIC + CPR, progressive > IIC", "iic_cpr_progressive", "iic", view="merged"),
    _pair("5. mAP, anchor f_q+ against f_q, n = 7", "cpr_n7", "cpr_n7_query_anchor", two_sided=True),
    _pair("5. mAP, protocol of the paper against the code's, n = 7", "cpr_n7", "cpr_n7_coclr_protocol", two_sided=True),
    _pair("mAP, twice the memory, CPR n = 7", "cpr_n7_memory_x2", "cpr_n7", two_sided=True),
    Claim(
        "mAP, CPR's lead over CoCLR grows with the memory",
        {"cpr_n7_memory_x2": 1.0, "coclr_memory_x2": -1.0, "cpr_n7": -1.0, "coclr": 1.0},
    ),
    _pair("reason: mAP, CoCLR without its wrong positives > InfoNCE", "coclr_only_right", "infonce"),
    _pair("reason: mAP, CoCLR without its wrong positives > CoCLR", "coclr_only_right", "coclr"),
    _pair("reason: mAP, CoCLR with a warm start > CoCLR", "coclr_warm_start", "coclr"),
    _pair("reason: mAP, CoCLR with a warm start > InfoNCE", "coclr_warm_start", "infonce", two_sided=True),
    _pair("reason: mAP, IIC + CPR in one cycle > in five, top-5", "iic_cpr_one_cycle", "iic_cpr_fixed", view="merged"),
    _pair("reason: mAP, IIC + CPR in one cycle > IIC", "iic_cpr_one_cycle", "iic", view="merged"),
    _pair(
        "reason: mAP, in one cycle, without its wrong positives > with them",
        "iic_cpr_only_right",
        "iic_cpr_one_cycle",
        view="merged",
    ),
    _pair(
        "reason: mAP, IIC + CPR in one cycle without its wrong positives > IIC",
        "iic_cpr_only_right",
        "iic",
        view="merged",
    ),
    *(_pair(f"better mining: mAP, {setting.replace('_', ' ')} > CPR n = 7", setting, "cpr_n7") for setting in BETTER),
)

# What the README shows of them.
HEADLINES = (
    PRIMARY.text,
    "1. mAP rises with n",
    "1. PMR rises with n, RGB queries",
    "1. PMR rises with n, flow queries",
    "2. mAP, r = .5 > r = .8, n = 7",
    "3. mAP, UberNCE > CPR n = 7",
    "3. mAP, CoCLR > InfoNCE",
    "3. mAP, CPR n = 7 > InfoNCE",
    "3. R@1, CPR n = 7 > InfoNCE",
    "4. mAP, IIC + CPR, progressive > fixed top-k",
    "4. mAP, IIC + CPR, progressive > IIC",
    "5. mAP, anchor f_q+ against f_q, n = 7",
    "5. mAP, protocol of the paper against the code's, n = 7",
)


def judge(claim: Claim, rows: dict[tuple[str, int], dict[str, Any]], folder: Path, name: str) -> dict[str, Any] | None:
    """Returns the test of a claim on a set.

    Args:
        rows: the rows of the set by setting and seed.
        folder: of study_queries.json.
    Returns:
        `seeds` (`seed_difference`), `sources` (`paired_difference` of the means over seeds; None for measures of the
        mining, which have no queries) and the `verdict`; None as long as no seed has all settings of the claim.
    """
    by_seed = {seed: found for seed in SEEDS if (found := of_one_start(claim, rows, seed)) is not None}
    if not by_seed:
        return None
    seeds = list(by_seed)
    of_query = claim.measure in ("map", "r@1")
    values = _query_sums(claim, by_seed) if of_query else None  # [S, Q]
    differences = values.mean(1) if of_query else _mining_sums(claim, by_seed)
    found = seed_difference(differences.tolist())
    sources = None
    if of_query:
        mean = values.mean(0)
        sources = paired_difference(mean, torch.zeros_like(mean), query_sources(folder, name))
    complete = len(seeds) == len(SEEDS)
    return {"seeds": found, "sources": sources, "verdict": verdict(found, sources, complete=complete)}


def of_one_start(
    claim: Claim, rows: dict[tuple[str, int], dict[str, Any]], seed: int
) -> dict[str, dict[str, Any]] | None:
    """Returns the row of each setting of a claim for a seed, all of which continue the same start, or None.

    Rows that were added after the main table name their start. Where it is not the main table's, the row of a setting
    of the main table is that of its "_again".
    """
    named = {rows[key]["start_weights"] for s in claim.weights if "start_weights" in rows.get(key := (s, seed), {})}
    if len(named) > 1:
        return None
    main = rows.get(("start", seed), {}).get("weights")
    if named and any(s not in SETTINGS and "start_weights" not in rows.get((s, seed), {}) for s in claim.weights):
        return None
    found = {}
    for setting in claim.weights:
        other = named and setting in SETTINGS and named != {main}
        row = rows.get((f"{setting}_again" if other else setting, seed))
        if row is None or (other and row["start_weights"] not in named):
            return None
        found[setting] = row
    return found


def verdict(seeds: dict[str, Any], sources: dict[str, Any] | None, *, complete: bool) -> str:
    """Returns "confirmed" if both 95 % intervals of the difference are above 0 and no seed is below; "refuted" if both
    are below 0 and no seed is above; else "undecided". Without all seeds, "partial"."""
    if not complete:
        return f"partial ({seeds['seeds']} of {len(SEEDS)} seeds)"
    intervals = [seeds["ci95"]] + ([] if sources is None else [sources["ci95"]])
    if None in intervals:  # all seeds gave the same difference
        return "undecided"
    if all(low > 0 for low, _ in intervals) and min(seeds["differences"]) >= 0:
        return "**confirmed**"
    if all(high < 0 for _, high in intervals) and max(seeds["differences"]) <= 0:
        return "**refuted**"
    return "undecided"


def _query_sums(claim: Claim, by_seed: dict[int, dict[str, dict[str, Any]]]) -> Tensor:
    """Returns the weighted sum of the settings' values for every seed and query, [S, Q] float64."""
    return torch.stack([
        sum(weight * query_values(rows[setting], claim.measure, claim.view)
            for setting, weight in claim.weights.items())
        for rows in by_seed.values()
    ])  # fmt: skip


def _mining_sums(claim: Claim, by_seed: dict[int, dict[str, dict[str, Any]]]) -> Tensor:
    """Returns the weighted sum of the settings' last epochs for every seed, [S] float64."""
    sums = [
        sum(weight * rows[setting]["mining"][claim.view][claim.measure][-1]
            for setting, weight in claim.weights.items())
        for rows in by_seed.values()
    ]  # fmt: skip
    return torch.tensor(sums, dtype=torch.float64)
