"""The head of a run's part of the page: date, command, data set and machine, and the most important results."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cpr_fast.evaluate.features.intervals import binomial_interval
from cpr_fast.evaluate.retrieval.names import MEASURES, MODEL_NAMES, VIEW_NAMES, interval, percent, with_copies
from cpr_fast.report.run_folder.outcome import judged_views
from cpr_fast.report.run_folder.run import Run
from cpr_fast.report.run_folder.unfinished import unfinished
from cpr_fast.runtime.progress import duration
from cpr_fast.wording import counted, listed, three_digits

MEANINGS = {
    "map": "Mean average precision: how far up all videos of the query's class rank",
    "r@1": "Recall at 1: the nearest video has the query's class",
}
TERMS = (
    ("View", "A representation of a clip: RGB, its frames; flow, the optical flow between them; residual, the "
     "difference of each frame from the one before. Every view has a network of its own; two views are compared "
     "together by the sum of their similarities."),
    ("Clip, window", "A clip is a short piece of a video, as long as the network reads at once. For evaluation a video "
     "is cut into evenly spaced clips, the windows, whose features are averaged."),
    ("Query, gallery", "Retrieval takes one video, the query, and ranks all videos of the gallery by similarity."),
    ("R@k", "Recall at k: the share of queries that have a video of their own class among the k nearest."),
    ("mAP", "Mean average precision: how far up the ranking all videos of the query's class are, mean over queries. "
     "Average precision is the precision at the rank of each of these videos, mean over them."),
    ("Learnt", "A view learnt for retrieval if its mAP is above that of the same network before training and above "
     "chance, and the 95 % intervals of the difference and of the mAP lie above 0 and chance; by R@1 where mAP was not "
     "measured."),
    ("Protocol", "Which videos are queries and which are the gallery. train_test: the test videos and the training "
     "videos. leave_source_out: every video is a query, and the gallery is all videos of other sources."),
    ("Test-time recipe", "How a video becomes a feature: the windows, the crops and the normalisation, as a "
     "publication describes them (paper, coclr, iic)."),
    ("Cycle", "A part of the training in which the network of one view learns and the others stay as they are."),
    ("Memory, queue", "The memory is a store of features of earlier clips. A queue is a memory that keeps the most "
     "recent ones; it begins empty or with random vectors, and those make the first losses too low."),
    ("Positive", "A clip that the loss pulls towards the query. Mining looks for positives in the memory."),
    ("Anchor", "The feature by which mining ranks the memory: that of the query's second clip (key) or of the query."),
    ("InfoNCE, CoCLR, CPR", "Methods. InfoNCE mines nothing; CoCLR and CPR mine positives with a cascade; UberNCE uses "
     "the labels instead."),
    ("n", "The number of stages of the cascade that mines positives. Each stage ranks what the one before it kept, "
     "in turn by one view and the other. n = 1 is CoCLR."),
    ("PMR", "Positive mining ratio: the share of mined clips that have the query's class."),
    ("Mining R@1", "The share of queries whose first mined clip has their class."),
    ("Source, sibling", "Videos cut from the same recording have one source and are siblings. A query never mines "
     "its siblings."),
    ("CMR", "Class mining ratio: the share of the sources of a class that were mined for it at least once in an "
     "epoch; the number shown is the median over classes."),
    ("Effective rank", "The number of dimensions that the features use. Near 1, all clips have the same feature."),
    ("Shuffle-BN", "The clips of a step are shuffled among groups with separate BatchNorm statistics, so that these do "
     "not give away which key belongs to a query (memory.shuffle_bn_groups)."),
    ("Chance", "The result of a random choice: the share of right answers among all that may be chosen, mean over "
     "the queries. Of PMR: videos of the same class among all videos of other sources. Of the loss: its value if all "
     "candidates were equally similar to the query."),
    ("95 % interval", "The range of the number if other sources had been drawn (bootstrap over sources). In the lines "
     "below a run's name it is given in brackets."),
)  # fmt: skip


# What the number of clips per second counts, on this page.
RATE = (
    "two clips of each video, each counted once for all its views; median over all logged steps, also those that only "
    "fill the memory"
)
NOT_EVALUATED = (
    "Retrieval has not been measured yet, so this page cannot say whether the run learnt; see Retrieval below."
)


def facts(run: Run) -> list[tuple[str, str]]:
    """Returns (name, value) of the date, the command, the data, the time, the machine and the evaluations of a run."""
    data, index = run.config.get("data", {}), run.index
    rows = [("Date", date(run)), ("Command", run.start.get("command") or "not recorded by the version that trained")]
    if data.get("features"):
        rows.append(("Training features", data["features"]))
    else:
        rows.append(("Training index", data.get("index") or "not recorded"))
    if index is not None:
        classes = counted(len(index.classes), "class", "classes") if index.classes else "no labels"
        split = f"split {data['split']!r}" if data.get("split") else "all splits"
        sources = index.source_count
        rows.append(("Training videos", f"{len(index):,} of {counted(sources, 'source')}, {classes}, {split}"))
    else:
        rows.append(("Training videos", "not known: the index is no longer there, or its videos are not"))
    planned = run.planned_epochs or 0
    of = f"{len(run.epochs)} of " if len(run.epochs) < planned else ""
    trained = f"{of}{counted(max(planned, len(run.epochs)), 'epoch')} in {counted(len(run.cycles), 'cycle')}"
    rows.append(("Training time", f"{duration(run.seconds)} for {trained}"))
    commit = (run.start.get("commit") or "")[:10]
    rows.append(("Machine", ", commit ".join(filter(None, (run.start.get("device") or "not recorded", commit)))))
    return rows + [("Retrieval on", f"{evaluated_on(of)}, {of[0]['protocol']}, test-time recipe {of[0]['recipe']}")
                   for of in run.evaluations]  # fmt: skip


def evaluated_on(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the indexes of an evaluation of retrieval, and the numbers of its queries and gallery videos."""
    first = rows[0]
    named = listed(first.get("indexes") or ["an index that the version that evaluated did not record"])
    queries = counted(first["queries"], "query", "queries")
    return f"{named}: {queries}, {counted(first['gallery'], 'gallery video')}"


def date(run: Run) -> str:
    """Returns the start time of the run or, if it was not recorded, the time of the last write."""
    if run.start.get("date"):
        return f"started {_utc(datetime.fromisoformat(run.start['date']))}"
    return f"last written {_utc(datetime.fromtimestamp(run.written, UTC))}"


def _utc(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def tiles(run: Run) -> list[dict[str, Any]]:
    """Returns the most important results: "name", "value", "meaning", a "note", and whether the note is "good" news."""
    found = []
    for measure, name in MEASURES.items():
        best = run.headline() or {}
        if best.get(measure) is None:
            continue
        note, good = "", None
        if other := run.best_other(measure):
            chance = best.get("chance_map" if measure == "map" else "chance_r@1")
            good = best[measure] > max(other[measure], chance or 0)
            named = MODEL_NAMES[other["name"]].lower()
            named += f", {VIEW_NAMES[other['view']]}" if other["name"] == "untrained" else ""
            note = f"best of the others: {percent(other[measure])}, {named}"
        found.append(
            _tile(f"{name}, {VIEW_NAMES[best['view']]}", percent(best[measure]), MEANINGS[measure], note, good)
        )
    for task, name in (("probe", "Linear probe"), ("finetune", "Finetuned")):
        if accuracy := run.accuracy(task):
            meaning = f"accuracy on test videos, test-time recipe {accuracy['recipe']}"
            found.append(_tile(f"{name}, {VIEW_NAMES[accuracy['view']]}", percent(accuracy["accuracy"]), meaning))
    found += _mining_tiles(run)
    if speed := run.speed():
        wait = speed["data_wait_s"] / max(1e-9, speed["data_wait_s"] + speed["step_time_s"])
        note = f"{percent(wait)} of a step waits for data"
        found.append(_tile("Clips per second", three_digits(speed["clips_per_s"]), RATE, note))
    return found


def headline(run: Run) -> list[str]:
    """Returns the result of the run, a line for every view that it trained, two views together first.

    A line gives mAP and R@1 of the trained network, with their intervals, those of the same network untrained, and
    whether the view learnt (of an unfinished run: so far). Then follow the best baseline and, if there are any,
    the number of queries with an exact copy in the gallery. Without an evaluation the only line says so.
    """
    lines, judged = [], {judgement.view: judgement for judgement in judged_views(run)}
    for row in run.trained():
        if row.get("r@1") is None:
            continue
        parts = [f"{VIEW_NAMES[row['view']]}: {_measures(row)}."]
        if untrained := run.untrained(row["view"]):
            parts.append(f"Untrained network: {_measures(untrained)}.")
        if row["view"] in judged:
            sentence = judged[row["view"]].sentence
            parts.append(f"So far {sentence[:1].lower()}{sentence[1:]}" if unfinished(run) else sentence)
        lines.append(" ".join(parts))
    if not lines:
        return [NOT_EVALUATED] if run.epochs and not run.retrieval else []
    lines[0] = f"Retrieval, {lines[0]}"
    if baseline := run.best_baseline():
        kind = "stored features" if baseline["name"] == "stored" else "pixel baseline"
        what = VIEW_NAMES[baseline["view"]] if baseline["name"] == "stored" else MODEL_NAMES[baseline["name"]].lower()
        lines.append(f"Best {kind} ({what}): {_measures(baseline)}.")
    return [*lines, *filter(None, [with_copies(run.retrieval[0].get("queries_with_copy"))])]


def _measures(row: dict[str, Any]) -> str:
    """Returns mAP and R@1 of a row, each with its interval over sources or its standard deviation over splits."""
    said = []
    for measure, name in MEASURES.items():
        bounds, deviation = row.get(f"{measure}_ci95"), row.get(f"{measure}_std")
        text = f"{name} {'not measured' if row.get(measure) is None else percent(row[measure])}"
        if bounds:
            text += f" ({interval(bounds)})"
        elif deviation is not None:
            text += f" (standard deviation of {row['splits']} splits {percent(deviation, '')})"
        said.append(text)
    return ", ".join(said)


def _mining_tiles(run: Run) -> list[dict[str, Any]]:
    mined = [row for row in run.epochs if row.get("pmr") is not None]
    mining = [row for row in mined if row["view"] == mined[-1]["view"]]
    if not mining:
        return []
    last, chance = mining[-1], run.chance_pmr
    note = f"first mining epoch {percent(mining[0]['pmr'])}"
    note += f", chance {percent(chance)}" if chance is not None else ""
    good, draws = None, sum(last.get("right_counts") or ())  # neither, if there are too few queries to tell
    if chance is not None and draws:
        low, high = binomial_interval(last["pmr"], draws)
        good = True if low > chance else False if high < chance else None
    meaning = "Positive mining ratio: mined clips that have the query's class"
    found = [_tile(f"PMR, {VIEW_NAMES[last['view']]}, last epoch", percent(last["pmr"]), meaning, note, good)]
    if last.get("cmr_median") is not None:
        meaning = "Class mining ratio: sources of a class that were mined for it"
        found.append(_tile("Median CMR, last epoch", percent(last["cmr_median"]), meaning))
    return found


def _tile(name: str, value: str, meaning: str, note: str = "", good: bool | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "meaning": meaning, "note": note, "good": good}
