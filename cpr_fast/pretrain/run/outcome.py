"""The outcome of a run: whether it learnt. It is computed from the rows of the metrics, which cover all parts of a
resumed run.

A run can end without an error and still have learnt nothing: its queue never filled, its learning rate was too small
to move a weight, or every entry of the memory was a positive. The row `outcome` states this, and the report repeats it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cpr_fast.config import Config
from cpr_fast.evaluate.features.intervals import binomial_interval
from cpr_fast.evaluate.retrieval.names import interval, percent
from cpr_fast.pretrain.run.checks import cycle_names
from cpr_fast.wording import counted

NO_LOSS = 1e-6  # below this the gradient is negligible: every entry compared is a positive
ENOUGH_EPOCHS = 3  # comparable epochs; fewer do not show whether the loss falls. Chance is compared with any number
CLEAR_FALL = 0.03  # share of the first epoch's loss by which the lowest must be below it: less may be noise
MANY_SKIPPED = 0.2  # share of unreadable videos above which a warning is given


def outcome(
    rows: list[dict[str, Any]], config: Config, step: int, videos: int, expected: list[str], *, judged: bool = True
) -> dict[str, Any]:
    """Returns the row `outcome` of a run.

    Args:
        rows: rows of `metrics.jsonl`.
        step: number of steps that the run has done.
        videos: number of training videos.
        expected: warnings that were given before the run started.
        judged: whether enough videos have labels for PMR to raise doubts.
    Returns:
        `learnt`: True if every cycle learnt, False if none did, else None: it is not decided, or not every cycle did.
        `text`: sentences for the head of a report. `warnings`: one sentence for each kind of doubt, which names the
        cycles it concerns. `cycles`: for each `cycle`, `view`, `mining`, `trained` (whether a loss changed the
        weights), `continues` (whether its encoder had been trained before), `learnt` (see `_learnt`),
        `learning_steps` (optimiser steps; None in rows of older versions), `loss_first`, `loss_last`, `loss_lowest`
        (means of the first, the last and the lowest of the `comparable` epochs, of which there are `compared`),
        `loss_chance` (the loss if every candidate were equally similar; None in rows of older versions),
        `pmr_first`, `pmr_last`, `random_negatives` (whether the queue held random vectors in all epochs that have a
        loss).
    """
    cycles, doubts = [], []
    for number, cycle in enumerate(config.schedule.cycles):
        epochs = [row for row in rows if row["kind"] == "epoch" and row["cycle"] == number]
        about = {"cycle": number, "view": cycle.view, "mining": cycle.mining}
        summary = _cycle(epochs) | about | {"continues": _is_trained(cycle.view, config, cycles)}
        if why := _why_not(epochs, config):
            doubts.append((number, " learnt nothing: " + why, ""))
            found = []
        else:
            found = _doubts(summary, epochs, judged)
        found += _collapse(rows, number, config)
        doubts += [(number, f": {text}", figures) for text, figures in found]
        cycles.append(summary | {"learnt": _learnt(summary, bool(found))})
    warnings = _by_kind(doubts, config)
    skipped = max((row.get("skipped") or 0 for row in rows if row["kind"] == "epoch"), default=0)
    if skipped > MANY_SKIPPED * videos:
        warnings.append(f"{skipped} of {counted(videos, 'video')} could not be read and were replaced by others")
    found = {cycle["learnt"] for cycle in cycles}
    return {
        "kind": "outcome",
        "step": step,
        "learnt": found.pop() if len(found) == 1 else None,
        "text": _sentence(cycles),
        "warnings": warnings,
        "expected": expected,
        "cycles": cycles,
    }


def comparable(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the epochs of a cycle whose losses can be compared.

    These have a loss and began with a queue without random vectors. Such vectors are easy negatives: while keys replace
    them the loss rises, and it is not 0 even if every key is a positive. If all epochs with a loss began with some, all
    of these are returned. Epochs that mined another number of positives than the last one, which mining.stages = "auto"
    may choose, have another loss of chance and are left out.
    """
    trained = [row for row in epochs if row["loss"] is not None]
    trained = [row for row in trained if row.get("loss_chance") == trained[-1].get("loss_chance")]
    return [row for row in trained if not row.get("random_negatives")] or trained


def _cycle(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [row["loss"] for row in comparable(epochs)]
    rates = [row["pmr"] for row in epochs if row.get("pmr") is not None]
    random = [bool(row.get("random_negatives")) for row in comparable(epochs)]
    counts = [row["learning_steps"] for row in epochs if row.get("learning_steps") is not None]
    return {
        "trained": any(_trained(row) for row in comparable(epochs)),
        "learning_steps": sum(counts) if len(counts) == len(epochs) else None,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "loss_lowest": min(losses, default=None),
        "compared": len(losses),
        "loss_chance": epochs[-1].get("loss_chance") if epochs else None,
        "pmr_first": rates[0] if rates else None,
        "pmr_last": rates[-1] if rates else None,
        "random_negatives": bool(random) and all(random),
    }


def _is_trained(view: str, config: Config, before: Sequence[dict[str, Any]]) -> bool:
    """Returns whether the encoder of a view is a checkpoint's, or an earlier cycle, of which these are the summaries,
    may have learnt in it."""
    learnt = [cycle["view"] for cycle in before if cycle["learnt"] is not False]
    if config.model.shared:
        return bool(learnt) or any(dataclasses.astuple(config.model.init))
    return view in learnt or bool(getattr(config.model.init, view))


def _learnt(summary: dict[str, Any], doubted: bool) -> bool | None:
    """Returns whether a cycle learnt: True if its loss fell (see `_fell`) and is better than chance, and nothing raises
    doubts; False if nothing was trained, or the loss of its last epoch is not better than chance; None if this is not
    decided: the first loss of a network with random weights may be better than chance, too, and random vectors make it
    too low."""
    last, chance = summary["loss_last"], summary["loss_chance"]
    if not summary["trained"] or (chance is not None and last >= chance):
        return False
    return True if _fell(summary) and not doubted and not summary["random_negatives"] else None


def _fell(summary: dict[str, Any]) -> bool:
    """Returns whether the loss of a cycle fell clearly in one of its `comparable` epochs.

    It may rise again above its first value although the network learns: while a network changes fast, the old keys in
    the memory are easy negatives, and they are not when the learning rate falls.
    """
    return summary["compared"] > 1 and summary["loss_lowest"] <= (1 - CLEAR_FALL) * summary["loss_first"]


def _trained(row: dict[str, Any]) -> bool:
    """Returns whether a loss changed the weights in an epoch; rows of older versions lack the change of the weights."""
    return row["loss"] is not None and row["loss"] > NO_LOSS and row.get("weights_change") != 0


def _why_not(epochs: list[dict[str, Any]], config: Config) -> str | None:
    """Returns why no epoch of a cycle learnt, or None if one did."""
    trained = comparable(epochs)
    if any(_trained(row) for row in trained):
        return None
    if not epochs:
        return "no epoch was finished"
    if not trained:
        return f"the queue was never full, so that no step was trained; memory.size is {config.memory.size}"
    if all(row["loss"] <= NO_LOSS for row in trained):
        return "the loss was 0, because every entry that a query is compared with is a positive, or there is none"
    return "no weight changed: the learning rate is too small, or every gradient overflowed (optim.lr, optim.precision)"


def _by_kind(doubts: list[tuple[int, str, str]], config: Config) -> list[str]:
    """Returns one sentence for each text of `doubts`, tuples of (position of the cycle, text, figures)."""
    kinds: dict[str, dict[int, list[str]]] = {}
    for number, text, figures in doubts:
        kinds.setdefault(text, {}).setdefault(number, []).extend([figures] if figures else [])
    sentences = []
    for text, found in kinds.items():
        named = cycle_names([(number, config.schedule.cycles[number]) for number in found])
        several = len(found) > 1
        parts = [
            (f"cycle {n + 1}: " if several else "") + ", ".join(figures) for n, figures in found.items() if figures
        ]
        sentences.append(f"{named}{text}" + (f" ({'; '.join(parts)})" if parts else ""))
    return sentences


def _no_fall(summary: dict[str, Any]) -> str:
    return "did not fall" if summary["loss_lowest"] >= summary["loss_first"] else "hardly fell"


def _doubts(summary: dict[str, Any], epochs: list[dict[str, Any]], judged: bool) -> list[tuple[str, str]]:
    """Returns reasons to doubt that a cycle learnt anything useful, each with its figures ("" if there are none, or if
    `_sentence` states them)."""
    texts = []
    last = summary["loss_last"]
    enough = sum(not row.get("random_negatives") for row in comparable(epochs)) >= ENOUGH_EPOCHS
    chance = summary["loss_chance"]
    below = chance is not None and last < chance
    if enough and not _fell(summary) and not (below and summary["continues"]):
        text = f"the loss {_no_fall(summary)}"
        if below:
            text += (
                ", but it is better than chance; it can rise in a short cycle, because old keys of a network that "
                "changes fast are easy negatives, so judge by `cpr-fast retrieve`"
            )
        texts.append((text, ""))
    if chance is not None and last >= chance:
        text = "the loss of the last epoch is not better than chance, its value if all candidates are equally similar"
        texts.append((text, ""))
    mined = [row for row in epochs if row.get("pmr") is not None and row.get("pmr_chance") is not None]
    if judged and mined and (figures := _mined_at_chance(mined[-1])):
        texts.append(("the mined positives were not better than chance", figures))
    if summary["mining"] == "cascade" and all(row.get("mined_share", 0) is None for row in epochs):
        texts.append(("the cascade mined nothing, so that the query's own key was its only positive", ""))
    return texts


def _mined_at_chance(row: dict[str, Any]) -> str:
    """Returns the figures of an epoch whose PMR is not above chance, if its queries are enough to exclude that it is
    well above: twice chance, or half of the way from chance to 1 if this is less. Else returns "".

    The clips that are mined for one query resemble each other, so a query counts as one draw.
    """
    pmr, chance, draws = row["pmr"], row["pmr_chance"], sum(row.get("right_counts") or ())
    if pmr > chance or not draws:
        return ""
    bounds = binomial_interval(pmr, draws)
    if bounds[1] >= min(2 * chance, (1 + chance) / 2):
        return ""
    return f"PMR {percent(pmr)}, 95 % interval {interval(bounds)}, chance {percent(chance)}; {draws:,} queries mined"


def _collapse(rows: list[dict[str, Any]], number: int, config: Config) -> list[tuple[str, str]]:
    """Returns the views whose queries were nearly one point at the end of a cycle, with the spread."""
    health = [row for row in rows if row["kind"] == "health" and row["cycle"] == number]
    if not health:
        return []
    least = config.health.min_feature_std
    return [
        (
            f"the features have collapsed: the queries spread less than health.min_feature_std {least}",
            f"{view} {spread:.3g}",
        )
        for view, spread in health[-1]["feature_std"].items()
        if spread is not None and spread < least
    ]


def _sentence(cycles: list[dict[str, Any]]) -> str:
    """Returns sentences that divide the cycles by what they learnt, with their losses."""
    if not any(cycle["trained"] for cycle in cycles):
        return "This run has learnt nothing: no step changed the weights by a loss."
    groups = {
        "The loss fell and is better than chance": [c for c in cycles if c["learnt"]],
        "It is not certain whether this learnt": [c for c in cycles if c["learnt"] is None],
        "The loss is not better than chance": [c for c in cycles if c["learnt"] is False and c["trained"]],
        "No step changed the weights by a loss": [c for c in cycles if not c["trained"]],
    }
    parts = [
        f"{head}: {'; '.join(_losses(cycle) if cycle['trained'] else _name(cycle) for cycle in found)}."
        for head, found in groups.items()
        if found
    ]
    nothing = all(cycle["learnt"] is False for cycle in cycles)
    return ("This run has learnt nothing. " if nothing else "") + " ".join(parts)


def _name(cycle: dict[str, Any]) -> str:
    return f"{cycle['view']} (cycle {cycle['cycle'] + 1})"


def _losses(cycle: dict[str, Any]) -> str:
    """Returns loss and PMR of a cycle: of the first and last of its `comparable` epochs, or one number where a single
    epoch has one."""
    loss, chance = f"{_name(cycle)} epoch loss {cycle['loss_last']:.3f}", cycle["loss_chance"]
    if cycle["compared"] > 1:
        loss = f"{_name(cycle)} epoch loss {cycle['loss_first']:.3f} to {cycle['loss_last']:.3f}"
    about = [] if chance is None else [f"chance {chance:.3f}"]
    about += ["only one epoch can be judged"] if cycle["compared"] == 1 else []
    if cycle["compared"] > 1 and not _fell(cycle):
        about += [f"it {_no_fall(cycle)}"]
    elif cycle["compared"] > 1 and cycle["loss_last"] >= cycle["loss_first"]:
        about += [f"lowest {cycle['loss_lowest']:.3f}"]
    about += ["low, because the queue held random vectors"] if cycle["random_negatives"] else []
    loss += f" ({'; '.join(about)})" if about else ""
    if cycle["pmr_last"] is None:
        return loss
    if cycle["compared"] == 1:
        return f"{loss}, PMR {percent(cycle['pmr_last'])}"
    return f"{loss}, PMR {percent(cycle['pmr_first'])} to {percent(cycle['pmr_last'])}"
