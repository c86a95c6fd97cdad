"""The comparison of the automatic cascade with fixed ones: what a row says, and which sets are measured."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def script(bench_script, monkeypatch):
    script = bench_script("training/auto_cascade")
    small = partial(script.planted, classes=5, sources=8, videos=2, width=16)
    monkeypatch.setattr(script, "sets", lambda: {"chosen on, a": small, "held out, b": partial(small, seed=1)})
    return script


def call(script, monkeypatch, folder, *arguments):
    page = ROOT / "bench" / "results" / "auto_cascade.md"
    if not (folder / page.name).exists():
        (folder / page.name).write_text(page.read_text())
    monkeypatch.setattr(sys, "argv", ["auto_cascade.py", "--results", str(folder), *arguments])
    script.main()
    return json.loads((folder / "auto_cascade.json").read_text())["rows"]


def test_a_row_compares_the_choice_with_the_best_of_all_fixed_cascades(script):
    memory = script.planted(classes=5, sources=8, videos=2, width=16)
    row = script.measure(memory)
    rates = row["fixed"]
    same = rates[row["top_k"]]
    assert row["pmr"] == same[row["chosen"]] and row["pmr_best_same"] == max(same.values())
    assert row["pmr_best_overall"] == max(rate for found in rates.values() for rate in found.values())
    assert row["ratio_same"] == row["pmr"] / row["pmr_best_same"] <= 1
    assert row["by_criterion"]["score"] == pytest.approx(row["ratio_same"])
    # One stage in view 1, from the definition: the nearest entry of another source.
    scores = (memory.features[1] @ memory.features[1].T).masked_fill(memory.ids[:, None] == memory.ids, -torch.inf)
    right = memory.labels[scores.argmax(1)] == memory.labels
    assert rates[1]["f"] == pytest.approx(right.double().mean().item())


def test_finished_sets_are_kept_and_named_ones_are_measured_again(script, monkeypatch, tmp_path, capsys):
    first = call(script, monkeypatch, tmp_path)
    assert [row["set"] for row in first] == ["chosen on, a", "held out, b"]
    assert capsys.readouterr().out.count("\n") == 2
    assert call(script, monkeypatch, tmp_path) == first and capsys.readouterr().out == ""
    call(script, monkeypatch, tmp_path, "--sets", "held out, b")
    assert capsys.readouterr().out.startswith("held out, b: ")
    text = (tmp_path / "auto_cascade.md").read_text()
    assert "1 of 1 sets" in text and f"| held out, b | 80 | {first[1]['chosen']} top-{first[1]['top_k']} |" in text


def test_an_unknown_set_is_refused(script, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(script, monkeypatch, tmp_path, "--sets", "no such set")
    assert "--sets: expected names of sets, got no such set" in capsys.readouterr().err


def test_the_stored_page_has_the_rows_of_the_stored_results():
    rows = json.loads((ROOT / "bench" / "results" / "auto_cascade.json").read_text())["rows"]
    text = (ROOT / "bench" / "results" / "auto_cascade.md").read_text()
    for row in rows:
        assert f"| {row['set']} | {row['size']:,} | {row['chosen']} top-{row['top_k']} |" in text
