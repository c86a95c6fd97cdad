"""The comparison of motion vectors with TV-L1: what is trained, what decides, and what the page says."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def script(bench_script):
    return bench_script("training/motion_views")


def test_the_arms_differ_from_the_study_only_in_the_motion_view(script):
    study = script.config_of(script.BASE, "cpr_n7", 1, Path("index.csv"), Path("runs")).to_dict()
    vectors = script.arm_config("vectors", "cpr_n7", 1, Path("index.csv"), Path("runs")).to_dict()
    assert vectors["data"].pop("flow") == "vectors" and study["data"].pop("flow") == "stored"
    assert vectors == study
    residual = script.arm_config("residual", "cpr_n7", 1, Path("index.csv"), Path("runs"))
    assert [(cycle.view, cycle.other) for cycle in residual.schedule.cycles] == [
        ("rgb", "residual"),
        ("residual", "rgb"),
    ]
    assert residual.model.init.residual == residual.model.init.rgb and not residual.model.init.flow


def test_pmr_is_that_of_the_last_four_epochs_of_both_views(script):
    rates = {"rgb": [0.9, 0.1, 0.1, 0.2, 0.2], "flow": [0.9, 0.3, 0.3, 0.3, 0.3]}
    row = {"mining": {view: {"pmr": values} for view, values in rates.items()}}
    assert script.pmr(row) == pytest.approx((0.15 + 0.3) / 2)


def test_the_stored_page_is_that_of_the_stored_results(script):
    page = (ROOT / "bench" / "results" / "motion_views.md").read_text()
    stored = json.loads((ROOT / "bench" / "results" / "motion_views.json").read_text())
    assert script.replace_results(page, "\n".join(script.tables(stored)), "motion_views.py") == page
    assert {row["seed"] for row in script.study_rows([0, 1, 2])} == {0, 1, 2}
