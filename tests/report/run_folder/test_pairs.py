"""`cpr-fast compare` and the report's differences of runs whose queries were stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support.report.run_folders import retrieval_rows, start_row, text_of, write_run

from cpr_fast.cli import main
from cpr_fast.config.recipes import retrieve_command
from cpr_fast.evaluate.retrieval.queries import QueryScores
from cpr_fast.evaluate.retrieval.ranking import NO_HIT
from cpr_fast.report.page import write_report

QUERIES = 60


def stored_run(
    folder: Path, index: Path, gain: float, seed: int, *, names=None, recipe="paper", noise=0.02, without=0
) -> Path:
    """A run whose two-stream average precision is higher by `gain` than that of another with another gain; videos of a
    source (2 each) are alike. The last `without` queries have no video of their class in the gallery."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(99).uniform(0.1, 0.8, QUERIES // 2).repeat(2)
    precision = torch.from_numpy(hard + gain + rng.normal(0, noise, QUERIES))
    hits = torch.where(precision > 0.4, 0, 3)
    precision[QUERIES - without :], hits[QUERIES - without :] = torch.nan, NO_HIT
    names = names or [f"/data/{i}.mp4" for i in range(QUERIES)]
    sources = [f"s{i // 2}" for i in range(QUERIES)]
    rows = ("trained/two_stream", "untrained/two_stream")
    scores = QueryScores(
        names, ["a"] * QUERIES, sources, torch.ones(QUERIES, dtype=torch.int64), ["g"],
        dict.fromkeys(rows, precision), dict.fromkeys(rows, hits),
    )  # fmt: skip
    start = start_row(index)
    start["config"]["run"]["seed"] = seed
    found = [row | {"recipe": recipe, "queries_file": "evaluations/q.npz"} for row in retrieval_rows(index)[:-1]]
    run = write_run(folder, [start, *found])
    scores.save(run / "evaluations" / "q.npz")
    return run


def compared(capsys, *words) -> dict:
    assert main(["compare", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["comparisons"][0]


def test_a_planted_difference_of_two_runs_is_found(tmp_path, index, capsys):
    cpr, coclr = stored_run(tmp_path / "cpr", index, 0.05, 1), stored_run(tmp_path / "coclr", index, 0.0, 2)
    block = compared(capsys, cpr, coclr)
    precision, recall = block["rows"]
    assert [(row["view"], row["measure"]) for row in block["rows"]] == [("two_stream", "map"), ("two_stream", "r@1")]
    assert 0.03 < precision["difference"] < 0.07 and precision["ci95"][0] > 0 and precision["p"] < 0.01
    ours, theirs = (QueryScores.load(run / "evaluations" / "q.npz") for run in (cpr, coclr))
    expected = [np.mean(s.average_precision["trained/two_stream"].numpy()) for s in (ours, theirs)]
    assert [precision["first"], precision["second"]] == pytest.approx(expected)
    assert recall["first"] == np.mean(ours.first_hit["trained/two_stream"].numpy() == 0)
    assert (precision["queries"], precision["sources"], precision["seeds"]) == (60, 30, None)

    assert main(["compare", str(cpr), "--against", str(coclr)]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{cpr} against {coclr}" in printed
        and "60 queries of 30 sources, protocol train_test, test-time recipe paper" in printed
    )
    assert f"{100 * precision['difference']:+.1f}" in printed and "d_z" not in printed
    assert "caution" not in printed

    text = text_of(write_report([cpr, coclr], tmp_path / "r.html"))
    low, high = (f"{100 * bound:+.1f}" for bound in precision["ci95"])
    assert f"cpr – coclr train_test, paper RGB + flow mAP {100 * precision['first']:.1f}" in text
    assert f"{100 * precision['difference']:+.1f} {low} to {high}" in text and "Not compared" not in text


def test_equal_runs_do_not_differ(tmp_path, index, capsys):
    runs = [stored_run(tmp_path / name, index, 0.0, seed, noise=0.1) for name, seed in (("a", 3), ("b", 4))]
    row = compared(capsys, *runs)["rows"][0]
    assert row["ci95"][0] < 0 < row["ci95"][1] and row["p"] > 0.05
    row = compared(capsys, runs[0], runs[0])["rows"][0]
    assert row["difference"] == 0 and row["p"] == 1


def test_seeds_are_paired_whatever_their_order(tmp_path, index, capsys):
    ours = [stored_run(tmp_path / f"ours{seed}", index, 0.05 + seed / 100, seed) for seed in (0, 1, 2)]
    theirs = [stored_run(tmp_path / f"theirs{seed}", index, 0.0, seed, noise=0.03) for seed in (2, 0, 1)]
    block = compared(capsys, *ours, "--against", *theirs)
    assert [pair["seed"] for pair in block["pairs"]] == [0, 1, 2]
    assert [Path(pair["second"]).name for pair in block["pairs"]] == ["theirs0", "theirs1", "theirs2"]
    means = {
        run.name: QueryScores.load(run / "evaluations" / "q.npz").average_precision["trained/two_stream"].mean().item()
        for run in (*ours, *theirs)
    }
    pairs = [[means[f"{name}{seed}"] for seed in (0, 1, 2)] for name in ("ours", "theirs")]
    test = stats.ttest_rel(*pairs)
    row = block["rows"][0]
    assert row["difference"] == pytest.approx(np.mean(pairs[0]) - np.mean(pairs[1]))
    assert row["seeds"]["seeds"] == 3 and row["seeds"]["p"] == pytest.approx(test.pvalue)
    assert row["seeds"]["d_z"] == pytest.approx(test.statistic / 3**0.5)
    assert main(["compare", *map(str, ours), "--against", *map(str, theirs)]) == 0
    printed = capsys.readouterr().out
    assert "means over 3 pairs" in printed and "95 % interval (seeds)" in printed and "seed 2" in printed


def test_queries_without_a_class_in_the_gallery_are_counted(tmp_path, index, capsys):
    runs = [stored_run(tmp_path / name, index, 0.0, seed, without=4) for name, seed in (("a", 3), ("b", 4))]
    block = compared(capsys, *runs)
    assert [row["queries"] for row in block["rows"]] == [56, 60] and block["without_class"] == 4
    assert main(["compare", *map(str, runs)]) == 0
    assert "mAP leaves out 4 queries" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(tmp_path, index, capsys):
    a = stored_run(tmp_path / "a", index, 0.0, 1)
    elsewhere = [f"/data/{i}.mp4" for i in range(QUERIES - 1)] + ["/data/new.mp4"]
    others = {
        "queries": stored_run(tmp_path / "queries", index, 0.0, 2, names=elsewhere),
        "recipe": stored_run(tmp_path / "recipe", index, 0.0, 2, recipe="iic"),
        "old": write_run(tmp_path / "old", [start_row(index), *retrieval_rows(index)]),
        "torn": stored_run(tmp_path / "torn", index, 0.0, 2),
        "never": write_run(tmp_path / "never", [start_row(index)]),
    }
    (others["torn"] / "evaluations" / "q.npz").write_bytes(b"PK")
    messages = {
        "queries": "1 only in the first (/data/59.mp4), 1 only in the second (/data/new.mp4)",
        "recipe": "expected evaluations with the same protocol and test-time recipe, got",
        "old": f"an older version evaluated it; run `{retrieve_command(others['old'], index)}`",
        "torn": "is damaged",
        "never": f"{others['never']}: none; run `{retrieve_command(a, index)}` and "
        f"`{retrieve_command(others['never'], index)}`, with the same options for every run; R@k and mAP are measured",
    }
    for name, message in messages.items():
        assert main(["compare", str(a), str(others[name])]) == 2
        said = capsys.readouterr()
        assert message in said.err and said.out == "" and said.err.startswith("Reading the runs ...\ncpr-fast: ")
        assert said.err.count("\n") == 2
    text = text_of(write_report([a, others["queries"]], tmp_path / "r.html"))
    assert "Not compared query by query:" in text and "1 only in the first (/data/59.mp4)" in text


def test_seeds_that_do_not_pair_are_named(tmp_path, index, capsys):
    runs = {
        (name, seed): stored_run(tmp_path / f"{name}{seed}", index, 0.0, seed) for name in "ab" for seed in (0, 1, 2)
    }
    cases = [
        ([("a", 0)], [("b", 0), ("b", 1)], "expected as many runs of both settings, got 1 and 2"),
        ([("a", 0), ("a", 1)], [("b", 0), ("b", 2)], "expected the same seeds of both settings, got 0, 1 and 0, 2"),
        ([("a", 0), ("b", 0)], [("b", 1), ("b", 2)], "expected runs of different seeds, got the seeds 0, 0 of"),
    ]
    for ours, theirs, message in cases:
        words = [*(str(runs[key]) for key in ours), "--against", *(str(runs[key]) for key in theirs)]
        assert main(["compare", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", str(runs["a", 0])]) == 2
    assert "RUNS: expected two run folders, or --against" in capsys.readouterr().err


def test_few_sources_are_a_caution(tmp_path, index, capsys):
    runs = [stored_run(tmp_path / name, index, 0.0, seed) for name, seed in (("a", 3), ("b", 4))]
    for run in runs:
        scores = QueryScores.load(run / "evaluations" / "q.npz")
        scores.sources[:] = [f"s{i % 4}" for i in range(QUERIES)]
        scores.save(run / "evaluations" / "q.npz")
    assert main(["compare", *map(str, runs)]) == 0
    assert "caution: from 4 sources, fewer than 20" in capsys.readouterr().out
