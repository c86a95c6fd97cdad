"""The table of the quick start's seeds: finished rows stay, and every promise is judged by its own numbers."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PIXEL, UNTRAINED, OWN, START = PROMISES = [
    "1.5 x best pixel baseline", "2 x untrained", "2 x untrained of the same seed", "mAP above the start",
]  # fmt: skip


@pytest.fixture
def script(bench_script):
    return bench_script("training/quickstart_seeds")


def row(seed, trained=(0.9, 0.7), start=(0.8, 0.6), untrained=0.3, own=0.2, pixels=(0.1, 0.4, 0.2)):
    def result(name, view, r1, average=0.1):
        return {"name": name, "view": view, "r@1": r1, "map": average}

    baselines = zip(("single_frame", "mean_colour", "mean_flow"), ("rgb", "rgb", "flow"), pixels, strict=True)
    results = [result("trained", "two_stream", *trained), result("untrained", "two_stream", untrained)]
    return {
        "seed": seed,
        "results": [*results, *(result(*each) for each in baselines), result("trained", "rgb", 0.0)],
        "start": [result("trained", "two_stream", *start)],
        "untrained_of_seed": [result("untrained", "two_stream", own)],
        "pretrain_cpu_s": 300.0,
    }


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"pixels": (0.61, 0.4, 0.2)}, [PIXEL]),
        ({"pixels": (0.1, 0.4, 0.61)}, [PIXEL]),
        ({"untrained": 0.46}, [UNTRAINED]),
        ({"own": 0.46}, [OWN]),
        ({"start": (0.8, 0.7)}, [START]),  # equal is not above
    ],
)
def test_promises(script, changes, broken):
    kept = script.kept_promises(script.measures(row(0, **changes)))
    assert [name for name, holds in kept.items() if not holds] == broken and list(kept) == PROMISES


def test_finished_rows_are_neither_run_again_nor_replaced(script, monkeypatch, tmp_path, capsys):
    earlier = [{"seed": 0, "commit": "83aa057", "threads": 2, "results": []}]
    (tmp_path / script.NAME).write_text(json.dumps(earlier))
    ran = []
    monkeypatch.setattr(
        script, "run_seed", lambda work, name, seed: ran.append(seed) or row(seed, untrained=0.1 * (seed + 4))
    )
    monkeypatch.setattr(
        sys, "argv", ["quickstart_seeds.py", str(tmp_path / "w"), "--results", str(tmp_path), "--seeds", "0"]
    )
    script.main()
    first = json.loads((tmp_path / script.NAME).read_text())
    assert first[0] == earlier[0] and len(first) == 2
    assert {"seed", "settings", "variant", "threads", "device", "commit", "torch", "command"} <= first[1].keys()
    sys.argv += ["1"]
    script.main()
    script.main()
    assert ran == [0, 1] and json.loads((tmp_path / script.NAME).read_text())[:2] == first
    said = capsys.readouterr().out
    assert "| 1 | 0.900 | 0.700 | 0.800 | 0.600 | 0.500 | 0.200 | 0.400 | 300 |" in said
    assert "2 x untrained: 1 of 2 seeds" in said and "mAP above the start: 2 of 2 seeds" in said


def test_the_stored_rows_have_the_settings_of_today(script):
    """Otherwise the seeds would be run again: settings that come later must not change the digest."""
    current = [each for each in script.stored(script.RESULTS) if each.get("settings") == script.settings()]
    assert {(each["seed"], each["variant"]) for each in current} >= {
        (s, v) for s in range(8) for v in ("avx2", "avx512")
    }


def test_two_processes_that_ran_the_same_seed_add_one_row(script, tmp_path):
    finished = {**row(3), "settings": script.settings(), "variant": "avx2", "threads": 1}
    for each in (finished, {**finished, "pretrain_cpu_s": 299.0}, {**finished, "threads": 2}):
        script.append(each, tmp_path)
    assert [(each["threads"], each["pretrain_cpu_s"]) for each in script.stored(tmp_path)] == [(1, 300.0), (2, 300.0)]
