"""Determines whether a run learnt anything, from its row "outcome" and from its other rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.names import MEASURES, MODEL_NAMES, VIEW_NAMES, percent, signed, signed_interval
from cpr_fast.evaluate.retrieval.paired import paired_difference
from cpr_fast.evaluate.retrieval.queries import QueryScores, hits_at_1
from cpr_fast.report.run_folder.run import Cycle, Run
from cpr_fast.report.run_folder.unfinished import unfinished
from cpr_fast.wording import counted, listed

FEW_SOURCES = 20  # below this number a bootstrap over sources gives too narrow an interval
NO_LOSS = 1e-6  # a loss this small has no gradient: all entries that a query is compared with are positives
SIGNS = ("pmr", "view_agreement", "hubness", "mutual_neighbours", "mined_age_steps", "mined_share")  # rates of mining
MORE_EPOCHS = "The first thing to try is more epochs: `cpr-fast init` without --minutes proposes how many."
Result = Literal["learnt", "unsure", "nothing"]
RESULTS: dict[Result, str] = {"learnt": "learnt", "unsure": "may have learnt", "nothing": "did not improve"}


def verdict(run: Run) -> list[str]:
    """Returns sentences for the head of the page if the run, or a view of it, learnt nothing, or nothing useful; else
    an empty list. An unfinished run is not judged: the advice is to finish it, see `unfinished`."""
    if unfinished(run):
        return []
    said = run.outcome
    sentences = []
    if said is not None and said.get("learnt") is False:
        sentences.append(said.get("text") or "This run learnt nothing.")
    elif (reason := _no_loss(run)) is not None:
        sentences.append(f"This run learnt nothing: {reason}")
    warnings = (said or {}).get("warnings") or [text for text in map(_no_mining, run.cycles) if text]
    sentences += [f"{text[:1].upper()}{text[1:].removesuffix('.')}." for text in warnings]
    return sentences + [text for text in (_of_views(run), _below_pixels(run)) if text]


def judge(
    value: float,
    interval: Sequence[float] | None,
    chance: float | None,
    difference: float,
    difference_interval: Sequence[float] | None,
) -> tuple[Result, str]:
    """Returns whether a network learnt, judged by its measure, the value of a random order, and the difference from the
    network before training, with their 95 % intervals; and if not, why: "before" | "chance", which it is not above or
    not certain to be above. None: unknown."""
    if difference <= 0:
        return "nothing", "before"
    if chance is not None and value <= chance:
        return "nothing", "chance"
    if difference_interval is not None and difference_interval[0] <= 0:
        return "unsure", "before"
    if chance is not None and interval is not None and interval[0] <= chance:
        return "unsure", "chance"
    return "learnt", ""


@dataclass(frozen=True)
class Judgement:
    """A trained view, or two views together, compared with the same network before training.

    Attributes:
        measure: "map" or, for rows in which it was not measured, "r@1".
        difference: Of the measure, trained - untrained; a fraction.
        ci95: Interval of the difference: of a paired bootstrap over the sources of the queries where the measures of
            every query are stored, else the interval of the trained network minus the untrained value; None if unknown.
        sources: Number of sources of the queries, over which the bootstrap draws; None if unknown.
        chance: The measure of a random order; None if unknown.
        trained_ci95: Interval of the trained network's measure; None if unknown.
    """

    view: str
    measure: Literal["map", "r@1"]
    trained: float
    untrained: float
    difference: float
    ci95: list[float] | None
    sources: int | None = None
    chance: float | None = None
    trained_ci95: list[float] | None = None

    @property
    def verdict(self) -> tuple[Result, str]:
        """The result and the reason, see `judge`."""
        return judge(self.trained, self.trained_ci95, self.chance, self.difference, self.ci95)

    @property
    def result(self) -> Result:
        """ "unsure": the trained network is better than before and than chance, but an interval includes either."""
        return self.verdict[0]

    @property
    def sentence(self) -> str:
        """Says whether the view learnt, with the difference and its interval."""
        name, how = MEASURES[self.measure], f"{signed(self.difference)} points"
        if self.ci95 is not None:
            few = self.sources is not None and self.sources < FEW_SOURCES
            narrow = f", too narrow because the queries have only {counted(self.sources, 'source')}" if few else ""
            how += f" (95 % interval {signed_interval(self.ci95)}{narrow})"
        before = "Worse" if self.ci95 is not None and self.ci95[1] < 0 else "Not better"
        at_chance = f"chance, {percent(self.chance)}"
        return {
            ("learnt", ""): f"Learnt: {name} {how}.",
            ("unsure", "before"): f"Not certain to have learnt: {name} {how}, and the interval includes 0.",
            ("unsure", "chance"): f"Not certain to have learnt: {name} {how}, but the interval of {name} includes "
            f"{at_chance}.",
            ("nothing", "before"): f"{before} than before training: {name} {how}.",
            ("nothing", "chance"): f"Not better than {at_chance}, although better than before training: {name} {how}.",
        }[self.verdict]


@functools.lru_cache(maxsize=16)
def judged_views(run: Run) -> tuple[Judgement, ...]:
    """Returns the judgement of every trained view that was evaluated beside its untrained network, two views together
    first. The bootstrap of a run is computed once. A run that must be judged without labels has none: a few labelled
    queries would decide."""
    if run.unlabelled:
        return ()
    scores = _scores(run)
    return tuple(
        _judged(row, untrained, scores)
        for row in run.trained()
        if row.get("r@1") is not None and (untrained := run.untrained(row["view"])) is not None
    )


def _judged(row: dict[str, Any], untrained: dict[str, Any], scores: QueryScores | None) -> Judgement:
    both = row.get("map") is not None and untrained.get("map") is not None
    measure: Literal["map", "r@1"] = "map" if both else "r@1"
    difference, bounds = row[measure] - untrained[measure], row.get(f"{measure}_ci95")
    names, sources = [f"{name}/{row['view']}" for name in ("trained", "untrained")], None
    if scores is not None and all(name in scores.first_hit for name in names):
        ours, theirs = (
            scores.average_precision[name] if measure == "map" else hits_at_1(scores.first_hit[name]) for name in names
        )
        ids = scores.source_ids()
        interval, sources = paired_difference(ours, theirs, ids)["ci95"], len(set(ids.tolist()))
    else:
        interval = None if bounds is None else [bound - untrained[measure] for bound in bounds]
    chance = row.get("chance_map" if measure == "map" else "chance_r@1")
    values = row[measure], untrained[measure], difference
    return Judgement(row["view"], measure, *values, interval, sources, chance, bounds)


def _scores(run: Run) -> QueryScores | None:
    """Returns the measures of every query of the evaluation that the report shows first, or None if they are not stored
    or cannot be read."""
    place = next((row["queries_file"] for row in run.retrieval if row.get("queries_file")), None)
    if place is None:
        return None
    try:
        return QueryScores.load(Path(run.folder) / place)
    except InputError:
        return None


def _of_views(run: Run) -> str | None:
    """Returns a sentence that names the views that learnt for retrieval and those that did not; None if all learnt."""
    judged = judged_views(run)
    if all(view.result == "learnt" for view in judged):
        return None
    names = {key: [VIEW_NAMES[j.view] for j in judged if j.result == key] for key in RESULTS}
    measures = " or ".join(dict.fromkeys(MEASURES[j.measure] for j in judged))
    if not names["learnt"] and not names["unsure"]:
        start = "For retrieval, this run learnt nothing"
    else:
        found = "; ".join(f"{listed(of)} {RESULTS[key]}" for key, of in names.items() if of)
        known = "not every view learnt" if names["learnt"] else "it is not certain that this run learnt anything"
        start = f"For retrieval, {known}: {found}"
    against = "the same network before training" + (
        " and chance" if any(j.verdict[1] == "chance" for j in judged) else ""
    )
    return f"{start}, judged by {measures} against {against}. {MORE_EPOCHS}"


def _below_pixels(run: Run) -> str | None:
    """Compares the view that the report shows first with the baselines that look at pixels or flow only, or with the
    stored features that it was trained on."""
    best = run.headline()
    if best is None or best.get("r@1") is None or run.unlabelled:
        return None
    rows = [row for row in run.retrieval if row["name"] not in ("trained", "untrained")]
    measure = "map" if best.get("map") is not None and any(row.get("map") is not None for row in rows) else "r@1"
    reference = max((row for row in rows if row.get(measure) is not None), key=lambda row: row[measure], default=None)
    if reference is None or best[measure] > reference[measure]:
        return None
    if reference["name"] == "stored":
        return (
            f"{MEASURES[measure]} of the trained heads ({VIEW_NAMES[best['view']]}) is not above that of the stored "
            f"features as they are ({VIEW_NAMES[reference['view']]}): for retrieval, training on them gained nothing."
        )
    return (
        f"{MEASURES[measure]} of the trained network ({VIEW_NAMES[best['view']]}) is not above that of a baseline that "
        f"learns nothing ({MODEL_NAMES[reference['name']].lower()}): for retrieval, its features are no better than "
        "pixels."
    )


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
