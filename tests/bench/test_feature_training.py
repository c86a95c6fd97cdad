"""The benchmark of training on features runs, and its page shows every run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_method_is_measured(tmp_path):
    options = ["--clips", "3000", "--large", "5000", "--epochs", "1", "--out", str(tmp_path), "--folder", str(tmp_path)]
    command = [sys.executable, "bench/step/feature_training.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=500)
    rows = json.loads((tmp_path / "feature_training.json").read_text())["rows"]
    methods = ("InfoNCE", "UberNCE", "CoCLR", "CPR")
    assert [(row["method"], row["precision"], row["batch_size"], row["width"]) for row in rows] == [
        *((method, "fp32", batch, 768) for method in methods for batch in (512, 1024)),
        *((method, "bf16", 1024, 768) for method in methods),
        *((method, "fp32", 1024, 1024) for _ in range(2) for method in ("InfoNCE", "CPR")),
    ]
    for row in rows:
        assert row["samples_per_epoch"] == row["clips"] // row["batch_size"] * row["batch_size"]
        assert row["samples_per_s"] == pytest.approx(row["samples_per_epoch"] / row["epoch_time_s"])
        assert row["peak_memory_mib"] > 100
    page = (tmp_path / "feature_training.md").read_text()
    assert page.count("\n| 3,000 | 768 |") == 12 and page.count("| CPR |") == 5
