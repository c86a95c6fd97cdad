"""The top of a page reports a run that learnt nothing, and does so only for such a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.report.run_folders import retrieval_rows, start_row, text_of, training_rows, write_run

from cpr_fast.data.index.index import Index
from cpr_fast.evaluate.retrieval.queries import QueryScores
from cpr_fast.report.page import write_report
from cpr_fast.report.run_folder.outcome import judged_views, verdict
from cpr_fast.report.run_folder.run import Run


def changed(rows: list[dict], kinds: tuple[str, ...] = ("step", "epoch"), **values) -> list[dict]:
    return [row | values if row["kind"] in kinds else row for row in rows]


def texts(folder, rows) -> str:
    return " ".join(verdict(Run(write_run(folder, rows))))


def test_a_run_that_learnt_has_no_alarm(tmp_path, index):
    assert texts(tmp_path / "run", [start_row(index), *training_rows(), *retrieval_rows(index)]) == ""
    assert texts(tmp_path / "new", [start_row(index)]) == ""
    assert texts(tmp_path / "step", [start_row(index), *training_rows()[:1]]) == ""


@pytest.mark.parametrize(("loss", "reason"), [(None, "memory.size = 2048) was never full"), (0.0, "the loss was 0")])
def test_a_run_without_a_loss(tmp_path, index, loss, reason):
    run = write_run(tmp_path / "run", [start_row(index), *changed(training_rows(), loss=loss)])
    text = text_of(write_report([run], tmp_path / "r.html"))
    head = text[: text.index("Date")]
    assert "This run learnt nothing" in head and reason in head


def test_a_cascade_that_mined_nothing(tmp_path, index):
    signs = dict.fromkeys(("pmr", "mining_r1", "cmr_median", "view_agreement", "hubness", "mutual_neighbours"))
    text = texts(tmp_path / "run", [start_row(index), *changed(training_rows(), ("epoch",), **signs)])
    assert "Cycle 2 (RGB CPR) mined no positives" in text


def judged(tmp_path, index, values, pixels=0.1, measure="map"):
    """Returns the sentences of a run whose views have these (trained, untrained) values, with intervals of +- 0.1."""
    common = {"kind": "retrieval", "protocol": "train_test", "gallery": 30, "queries": 16, "chance_r@1": 0.0625}
    found = [(name, view, value) for view, both in values.items()
             for name, value in zip(("trained", "untrained"), both, strict=True)]  # fmt: skip
    rows = []
    for name, view, value in [*found, ("single_frame", "rgb", pixels)]:
        rates = {"r@1": 0.3 if measure == "map" else value} | dict.fromkeys(("r@5", "r@10", "r@20", "r@50"))
        rates |= {"map": value} if measure == "map" else {}
        rows.append(common | rates | {"name": name, "view": view, f"{measure}_ci95": [value - 0.1, value + 0.1]})
    return texts(tmp_path / "run", [start_row(index), *training_rows(), *rows])


@pytest.mark.parametrize("measure", ["map", "r@1"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"rgb": (0.5, 0.2), "residual": (0.2, 0.2)},
            "not every view learnt: RGB learnt; Residual did not improve, judged",
        ),
        (
            {"rgb": (0.2, 0.3), "residual": (0.5, 0.2)},
            "not every view learnt: Residual learnt; RGB did not improve, judged",
        ),
        ({"rgb": (0.5, 0.2), "flow": (0.25, 0.2)}, "not every view learnt: RGB learnt; Flow may have learnt"),
        (
            {"rgb": (0.3, 0.25), "flow": (0.1, 0.2)},
            "not certain that this run learnt anything: RGB may have learnt; Flow did",
        ),
        ({"rgb": (0.2, 0.2), "flow": (0.1, 0.2)}, "For retrieval, this run learnt nothing, judged by"),
        ({"rgb": (0.5, 0.2), "flow": (0.4, 0.2), "two_stream": (0.6, 0.3)}, ""),
    ],
)
def test_every_view_of_a_run_is_judged(tmp_path, index, values, said, measure):
    """By mAP with its interval, and by R@1 where mAP was not measured; all views, not only the last one."""
    text = judged(tmp_path, index, values, measure=measure)
    assert said in text if said else text == ""
    if said:
        name = {"map": "mAP", "r@1": "R@1"}[measure]
        assert f"judged by {name} against the same network before training" in text


@pytest.mark.parametrize("measure", ["map", "r@1"])
def test_the_first_view_is_compared_with_the_pixel_baselines(tmp_path, index, measure):
    values = {"rgb": (0.5, 0.2), "flow": (0.4, 0.2), "merged": (0.6, 0.3)}
    text = judged(tmp_path, index, values, pixels=0.7, measure=measure)
    assert "of the trained network (RGB + residual) is not above that of a baseline that learns nothing" in text
    assert "single frame" in text and "its features are no better than pixels" in text


@pytest.mark.parametrize(("gain", "learnt"), [(0.02, True), (0.0, False)])
def test_stored_measures_of_every_query_decide(tmp_path, index, gain, learnt):
    """The paired interval is narrow where every query gains a little, although the intervals of both overlap."""
    queries = 40
    before = torch.rand(queries, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5
    after = before + gain + 0.001 * torch.arange(queries).sub(20).sign()
    hits = torch.zeros(queries, dtype=torch.int64)
    names = {"trained/rgb": after, "untrained/rgb": before}
    paths = [f"/data/{i}.mp4" for i in range(queries)]
    scores = QueryScores(paths, ["a"] * queries, paths, torch.ones_like(hits), ["g"], names, dict.fromkeys(names, hits))
    common = {"kind": "retrieval", "protocol": "train_test", "view": "rgb", "gallery": 40, "queries": queries}
    rows = [
        common | {"name": name, "map": value.mean().item(), "map_ci95": [0.2, 0.3], "r@1": 1.0, "queries_file": "q.npz"}
        for name, value in (("trained", after), ("untrained", before))
    ]
    folder = write_run(tmp_path / "run", [start_row(index), *rows])
    scores.save(folder / "q.npz")
    (found,) = judged_views(Run(folder))
    assert (found.measure, found.result) == (
        "map",
        "learnt" if learnt else "nothing" if after.mean() <= before.mean() else "unsure",
    )
    assert found.ci95[1] - found.ci95[0] < 0.002 and "too narrow" not in found.sentence
    few = dataclasses.replace(found, sources=19).sentence
    assert "95 % interval" in few and ", too narrow because the queries have only 19 sources)" in few
    (folder / "q.npz").write_bytes(b"PK")  # a damaged file: the interval of the trained network decides
    (found,) = judged_views(Run(folder))
    assert found.ci95 == pytest.approx([0.2 - before.mean().item(), 0.3 - before.mean().item()])


def test_what_the_trainer_says_is_repeated(tmp_path, index):
    said = {
        "kind": "outcome",
        "learnt": False,
        "text": "This run has learnt nothing: so it is.",
        "warnings": ["cycle 1 …"],
    }
    text = texts(tmp_path / "run", [start_row(index), *training_rows(), said])
    assert text == "This run has learnt nothing: so it is. Cycle 1 …."
    good = {"kind": "outcome", "learnt": True, "text": "Fine.", "warnings": []}
    assert texts(tmp_path / "good", [start_row(index), *training_rows(), good]) == ""


def test_an_evaluation_on_another_index_replaces_all_rows_of_the_earlier_one(tmp_path, index):
    """Rows of two indexes were compared: an untrained network of one with the trained one of the other."""
    missing = dict.fromkeys(("r@1", "r@1_ci95", "map", "map_ci95", "chance_r@1"))
    labelled = retrieval_rows(index)
    without = [row | missing for row in labelled if row.get("name") == "trained"]
    same = {"kind": "same_video", "recipe": "paper", "name": "trained", "view": "rgb", "r@1": 0.5}
    for number, (rows, unlabelled, names) in enumerate(
        (
            ([*labelled, *without, same], True, {"trained"}),
            ([*without, same, *labelled], False, {row["name"] for row in labelled if row["kind"] == "retrieval"}),
            ([*labelled, same], True, {row["name"] for row in labelled if row["kind"] == "retrieval"}),  # few labels
        )
    ):
        run = Run(write_run(tmp_path / f"run{number}", [start_row(index), *training_rows(), *rows]))
        assert (run.unlabelled, {row["name"] for row in run.retrieval}) == (unlabelled, names)
        assert bool(run.same_video) == unlabelled and bool(judged_views(run)) != unlabelled


def test_evaluations_of_two_protocols_are_kept_apart(tmp_path, index):
    missing = dict.fromkeys(("r@1", "r@1_ci95", "map", "map_ci95", "chance_r@1"))
    labelled = retrieval_rows(index)
    other = [row | missing | {"protocol": "leave_source_out"} for row in labelled if row.get("name") == "trained"]
    same = {"kind": "same_video", "recipe": "paper", "name": "trained", "view": "rgb", "r@1": 0.5}
    for number, rows in enumerate(([*labelled, *other, same], [*other, same, *labelled])):
        run = Run(write_run(tmp_path / f"run{number}", [start_row(index), *training_rows(), *rows]))
        first = run.retrieval[0]["protocol"]
        assert run.unlabelled == bool(run.same_video) == (first == "leave_source_out")
    few = [row | {"r@1": 0.99} if row.get("name") == "single_frame" else row for row in labelled]
    run = Run(write_run(tmp_path / "few", [start_row(index), *training_rows(), *few, same]))
    assert run.unlabelled and verdict(run) == []  # neither are the pixels judged by few queries


@pytest.mark.parametrize(
    ("labels", "unlabelled"),
    [(" ", True), ("aabb", False), ("a", True), ("ab  ", False), ("ab      ", True)],  # a blank stands for no label
)
def test_too_few_labels_judge_nothing(tmp_path, index, labels, unlabelled):
    videos = list(Index.load(index))
    named = (labels * len(videos))[: len(videos)]
    Index(dataclasses.replace(video, label=name.strip()) for video, name in zip(videos, named, strict=True)).save(
        tmp_path / "few.csv"
    )
    run = Run(write_run(tmp_path / "run", [start_row(tmp_path / "few.csv"), *training_rows()]))
    assert run.unlabelled == unlabelled


@pytest.mark.parametrize(
    ("measure", "trained", "untrained", "chance", "result", "said"),
    [
        ("map", 0.3, 0.1, 0.15, "learnt", "Learnt: mAP +20.0 points"),
        ("map", 0.3, 0.1, 0.25, "unsure", "but the interval of mAP includes chance, 25.0 %"),
        ("map", 0.3, 0.1, 0.3, "nothing", "Not better than chance, 30.0 %, although better than before training: mAP"),
        ("r@1", 0.3, 0.1, 0.4, "nothing", "Not better than chance, 40.0 %, although better than before training: R@1"),
        ("r@1", 0.1, 0.3, 0.4, "nothing", "Worse than before training: R@1 −20.0 points"),
        ("r@1", 0.25, 0.3, 0.1, "nothing", "Not better than before training: R@1 −5.0 points"),
        ("r@1", 0.3, 0.1, None, "learnt", "Learnt: R@1 +20.0 points"),  # an older version did not record chance
    ],
)
def test_a_network_that_is_not_above_chance_has_not_learnt(
    tmp_path, index, measure, trained, untrained, chance, result, said
):
    """It may still be better than the same network before training."""
    rows = [
        {"kind": "retrieval", "protocol": "train_test", "name": name, "view": "rgb", "gallery": 30, "queries": 16,
         "chance_r@1": chance, "chance_map": chance, "r@1": value, "map": value if measure == "map" else None,
         f"{measure}_ci95": [value - 0.1, value + 0.1]}
        for name, value in (("trained", trained), ("untrained", untrained))
    ]  # fmt: skip
    run = Run(write_run(tmp_path / "run", [start_row(index), *training_rows(), *rows]))
    (found,) = judged_views(run)
    assert found.result == result and said in found.sentence
    assert verdict(run) == [] or result != "learnt"
    assert any("before training and chance" in text for text in verdict(run)) == ("hance, " in said)


def test_neighbours_are_those_of_the_evaluation_that_is_shown(tmp_path, index):
    """The pictures of an earlier evaluation, perhaps on another index, are not shown under the numbers of the last."""
    first = [row | {"indexes": ["/old.csv"]} for row in retrieval_rows(index)]
    second = [row | {"indexes": ["/new.csv"]} for row in retrieval_rows(index)]
    other = {"query": second[-1]["nearest"][0], "nearest": [second[-1]["query"]]}
    run = Run(write_run(tmp_path / "run", [start_row(index), *first, *second[:-1], second[-1] | other]))
    assert [row["query"] for row in run.retrieved] == [other["query"]] and run.evaluated_indexes == ["/new.csv"]
    text = text_of(write_report([run.folder], tmp_path / "r.html"))
    assert "Nearest neighbours, RGB + flow, videos of /new.csv" in text and "/old.csv" not in text
    assert "Retrieval on /new.csv: 16 queries, 30 gallery videos, train_test, test-time recipe paper" in text


def test_accuracies_of_two_data_sets_are_not_averaged(tmp_path):
    def row(index, split, accuracy):
        common = {
            "kind": "classification",
            "task": "finetune",
            "recipe": "paper",
            "seed": 0,
            "view": "rgb",
            "crops": 10,
        }
        return common | {"index": index, "split": split, "accuracy": accuracy}

    splits = [row("/ucf1.csv", 1, 0.5), row("/ucf2.csv", 2, 0.75)]
    run = Run(write_run(tmp_path / "splits", splits))
    assert run.accuracy("finetune")["accuracy"] == 0.625
    run = Run(write_run(tmp_path / "both", [*splits, row("/hmdb1.csv", 1, 0.25)]))
    assert run.accuracy("finetune") | {"recipe": "", "view": ""} == {
        "accuracy": 0.25, "indexes": ["/hmdb1.csv"], "recipe": "", "view": ""
    }  # fmt: skip


@pytest.mark.parametrize(("evaluated", "own"), [("hmdb51.csv", "HMDB51"), ("ucf101.csv", "UCF101")])
def test_our_rows_stand_in_the_table_of_the_data_that_was_evaluated(tmp_path, index, evaluated, own):
    """Not of the data that the network was trained on, as in the paper."""
    rows = [row | {"indexes": [f"/data/{evaluated}"]} for row in retrieval_rows(index)]
    start = start_row(index.with_name("ucf101.csv"))
    text = text_of(write_report([write_run(tmp_path / "run", [start, *rows])], tmp_path / "r.html"))
    parts = {"UCF101": text[text.index("Retrieval on UCF101 (") : text.index("Retrieval on HMDB51 (")]}
    parts["HMDB51"] = text[text.index("Retrieval on HMDB51 (") : text.index("Finetuned (Table")]
    assert [name for name, part in parts.items() if "run, RGB" in part] == [own]
