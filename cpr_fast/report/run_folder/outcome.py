"""Determines whether a run learnt anything, from its row "outcome" and from its other rows."""

from __future__ import annotations

from cpr_fast.report.run_folder.run import MODEL_NAMES, VIEW_NAMES, Cycle, Run

NO_LOSS = 1e-6  # a loss this small has no gradient: all entries that a query is compared with are positives
SIGNS = ("pmr", "view_agreement", "hubness", "mutual_neighbours", "mined_age_steps", "mined_share")  # of mining


def verdict(run: Run) -> list[str]:
    """Returns sentences for the head of the page if the run learnt nothing, or nothing useful; else an empty list."""
    said = run.outcome
    sentences = []
    if said is not None and said.get("learnt") is False:
        sentences.append(said.get("text") or "This run learnt nothing.")
    elif (reason := _no_loss(run)) is not None:
        sentences.append(f"This run learnt nothing: {reason}")
    sentences += (said or {}).get("warnings") or [text for text in map(_no_mining, run.cycles) if text]
    if (text := _no_better(run)) is not None:
        sentences.append(text)
    return sentences


def _no_loss(run: Run) -> str | None:
    losses = [row.get("loss") for row in run.epochs or run.steps]
    if not losses or any(loss is not None and loss > NO_LOSS for loss in losses):
        return None
    if any(loss is not None for loss in losses):
        return "the loss was 0 throughout, because everything that a query is compared with is a positive."
    size = run.config.get("memory", {}).get("size")
    named = "" if size is None else f" (memory.size = {size})"
    return f"no step had a loss, because the queue{named} was never full."


def _no_mining(cycle: Cycle) -> str | None:
    trained = [row for row in cycle.epochs if row.get("loss") is not None]
    if cycle.mining != "cascade" or not trained or any(row.get(sign) is not None for row in trained for sign in SIGNS):
        return None
    return f"Cycle {cycle.number + 1} ({cycle.name}) mined no positives: it was trained with the query's own key only."


def _no_better(run: Run) -> str | None:
    """Compares R@1 with the same network untrained, then with the baselines that look at pixels or flow only."""
    best = run.headline()
    if best is None or best.get("r@1") is None:
        return None
    others = [row for row in run.retrieval if row["name"] != "trained" and row.get("r@1") is not None]
    untrained = [row for row in others if row["name"] == "untrained"]
    same_view = [row for row in untrained if row["view"] == best["view"]] or untrained
    ours = f"R@1 of the trained network ({VIEW_NAMES[best['view']]}) is {100 * best['r@1']:.1f} %"
    reference = max(same_view, key=lambda row: row["r@1"], default=None)
    if reference is not None and best["r@1"] <= reference["r@1"]:
        return (
            f"{ours}, not above the {100 * reference['r@1']:.1f} % of the same network before training: for retrieval, "
            "this run learnt nothing."
        )
    reference = max(others, key=lambda row: row["r@1"], default=None)
    if reference is not None and best["r@1"] <= reference["r@1"]:
        return (
            f"{ours}, not above the {100 * reference['r@1']:.1f} % of a baseline that learns nothing "
            f"({MODEL_NAMES[reference['name']].lower()}): for retrieval, this run learnt nothing useful."
        )
    return None
