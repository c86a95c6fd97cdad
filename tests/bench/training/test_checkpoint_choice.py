"""The evidence for the score without labels: which checkpoints are measured, and the tables of planted rows."""

import json
import sys

import numpy as np
import pytest
from scipy.stats import spearmanr

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.evaluate.retrieval.retrieve import retrieve
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.weights.checkpoint import load_encoders


@pytest.fixture(scope="module")
def script(bench_script):
    return bench_script("training/checkpoint_choice")


@pytest.fixture(scope="module")
def choice(script):
    return sys.modules[script.tables.__module__]


def planted(name, run, view, scores, rates):
    return [
        {"set": name, "run": run, "view": view, "epoch": epoch, "score": score, "same_video": score, "siblings": None,
         "neighbours": -score, "effective_rank": 2.0, "r@1": rate, "r@1_all": rate, "map": rate / 2,
         "device": "a processor", "torch": "2", "commit": "abc"}
        for epoch, (score, rate) in enumerate(zip(scores, rates, strict=True))
    ]  # fmt: skip


def test_measured_are_the_epochs_of_powers_of_two_and_the_last_of_every_cycle(script, tmp_path):
    config = script.config_of_run("jhmdb", "plain", 0, tmp_path / "index.csv", tmp_path)
    assert [(c.view, c.epochs, c.mining) for c in config.schedule.cycles] == [
        ("rgb", 10, "none"), ("flow", 20, "none"), ("rgb", 8, "cascade"), ("flow", 8, "cascade")]  # fmt: skip
    assert sorted(script.measured_epochs(config)) == [
        1, 2, 4, 8, 10, 11, 12, 14, 18, 26, 30, 31, 32, 34, 38, 39, 40, 42, 46]  # fmt: skip
    assert config.run.keep_checkpoints == 46


def test_correlations_of_planted_rows(choice):
    rising = planted("jhmdb", "a", "rgb", [1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5])
    falling = planted("jhmdb", "b", "rgb", [1, 2, 3, 4, 5], [0.5, 0.4, 0.3, 0.2, 0.1])
    assert choice.correlation(rising, "score", "map") == pytest.approx(1)
    assert choice.correlation(rising, "neighbours", "map") == pytest.approx(-1)
    assert choice.correlation(rising[:4], "score", "map") is None  # too few
    assert choice.correlation(rising, "siblings", "map") is None
    assert choice.correlation(rising, "effective_rank", "map") is None  # a constant
    assert choice.within(rising + falling, "score", "map") == (pytest.approx(0), 2)
    runs = [row for run in range(6) for row in planted("jhmdb", str(run), "rgb", [9, run], [0.9, 0.1 * run])]
    assert choice.between(runs, "score", "r@1") == (pytest.approx(1), 6)  # only the last checkpoints


def test_the_tables_keep_the_runs_apart_on_which_the_score_was_chosen(choice):
    rows = planted("synthetic", choice.CHOSEN_ON[0], "rgb", [1, 2, 3, 4, 5], [0.5, 0.4, 0.3, 0.2, 0.1])
    rows += planted("synthetic", "other", "rgb", [1, 2, 3, 4, 9], [0.1, 0.2, 0.3, 0.5, 0.4])
    text = "\n".join(choice.tables(rows))
    held = next(line for line in text.splitlines() if line.startswith("| held out, all sets"))
    assert "| 5 | 1 | 0.90 |" in held and "-1.00 †" in text and "10 encoders of 2 runs" in text
    assert "Measured with a processor, torch 2, commit abc." in text
    assert "| synthetic, RGB | 1 | 20.0 / 40.0 | 20.0 / 40.0 | 25.0 / 50.0 |" in text


def test_the_form_with_equal_weights_is_the_score_of_the_rows(choice, script):
    rows = script.read_rows(script.RESULTS / "checkpoint_choice.jsonl")
    form = choice.forms()["(0.333, 0.333, 0.333), 1"]
    assert [choice.value_of(row, *form) for row in rows] == pytest.approx([row["score"] for row in rows])


def test_forms_are_judged_within_the_parts_of_the_rows(choice):
    random = np.random.default_rng(0)
    values, target = random.integers(5, size=(3, 17)), random.integers(5, size=17)
    parts = np.array(["a"] * 8 + ["b"] * 6 + ["c"] * 3)  # the last one has too few rows
    wanted = [np.mean([spearmanr(v[parts == p], target[parts == p]).statistic for p in "ab"]) for v in values]
    assert choice.judged(values, target, parts) == pytest.approx(wanted)
    assert choice.judged(values, target, np.arange(17)).tolist() == [0, 0, 0]


def test_pairs_in_order_are_those_of_the_run_that_is_left_out(choice):
    parts, mine = np.array(["a", "a", "a", "b"]), np.array([True, True, False, True])
    values, target = np.array([1.0, 2.0, 0.0, 9.0]), np.array([1.0, 3.0, 2.0, 0.0])
    assert choice.in_order(values, target, parts, mine) == (2, 3)  # of 0-1, 0-2 and 1-2, the second is not
    assert choice.in_order(values, np.array([1.0, 1.0, 2.0, 0.0]), parts, mine) == (0, 2)  # equal targets


@pytest.mark.slow
def test_a_run_is_measured_once_and_as_retrieve_does(script, tmp_path, monkeypatch):
    index = write_synthetic(tmp_path / "set", classes=4, videos=8, frames=12, width=64, height=48)
    write_flow(index, tmp_path / "flow", progress=False)
    config = script.config_of_run("synthetic", "plain", 0, index, tmp_path)
    values = config.to_dict()
    values["data"] |= {"batch_size": 6}
    values["memory"] |= {"size": 12}
    values["schedule"]["cycles"] = [{"view": "rgb", "epochs": 3, "mining": "none"}]
    run = pretrain(type(config).from_dict(values), progress=False)
    videos = script.Videos(Index.load(index), config.data, 2)
    for _ in range(2):
        script.measure_runs("synthetic", {"a": run}, videos, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["view"]) for row in rows] == [(1, "rgb"), (2, "rgb"), (3, "rgb")]
    found = retrieve(run / "checkpoints" / "last.pt", index, clips_per_video=2, cache=False)["results"]
    trained = next(row for row in found if (row["name"], row["view"]) == ("trained", "rgb"))
    assert rows[-1]["map"] == pytest.approx(trained["map"], abs=0.02)  # the clips are kept as float16
    encoders = load_encoders(run / "checkpoints" / "last.pt")[1]
    assert videos.measure(encoders["rgb"], "rgb")["score"] == rows[-1]["score"]
    assert len(videos.ids) == len(videos.pairs["flow"]) == config.data.batch_size
