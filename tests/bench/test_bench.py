"""The benchmark runs, and all the forms that it compares compute the same result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Runs the command on one small shape without torch.compile, which takes half a minute."""
    out = tmp_path_factory.mktemp("bench")
    options = ["--shapes", "5x300", "--without", "torch.compile", "--largest", "2048", "--seconds", ".02"]
    options += ["--threads", "16x2048"]
    command = [sys.executable, "bench/kernels/compare.py", *options, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    return out


def test_every_form_computes_the_same(report):
    rows = json.loads((report / "kernels_cpu.json").read_text())["rows"]
    ran = [row for row in rows if "skipped" not in row]
    for op, direction in (
        ("cascade_select", "forward"),
        *(("mil_nce", name) for name in ("forward", "gradient", "memory gradient")),
    ):
        forms = [row["form"] for row in ran if (row["op"], row["direction"]) == (op, direction)]
        assert "cpr_fast" in forms and any("eager" in form for form in forms)
    for row in ran:
        limit = (
            0.05 if row["op"] == "cascade_select" else 1e-5
        )  # rounding in float32 may reverse the order of nearly equal scores
        assert row["error"] is None or row["error"] <= limit, row
        assert row["time_ms"] > 0 and row["floor_ms"] > 0 and row["peak_mib"] >= 0


def test_a_form_that_cannot_run_says_why(report):
    rows = json.loads((report / "kernels_cpu.json").read_text())["rows"]
    reasons = {row["form"]: row["skipped"] for row in rows if "skipped" in row}
    assert "CUDA" in reasons["cuVS, then eager"] and "CUDA" in reasons["Liger"]


def test_the_page_shows_all(report):
    page = (report / "kernels_cpu.md").read_text()
    assert (report / "kernels_cpu.png").stat().st_size > 10_000
    for part in (
        "best eager",
        "masked top-k",
        "SDPA with LSE",
        "FAISS",
        "K doubled",
        "## Bars",
        "kernels_cpu.png",
        "(>= ",
    ):
        assert part in page, part


def test_the_pytest_benchmark_suites_run(tmp_path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "rows.json"
    options = [
        "-q",
        "--benchmark-only",
        f"--benchmark-json={out}",
        "--benchmark-max-time=.01",
        "-p",
        "no:cacheprovider",
    ]
    picked = "B16-K2048 and cpu and (cpr_fast or eager) and not graphed and not portable"
    command = [sys.executable, "-m", "pytest", "bench", "-k", picked, *options]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which it recognises by these variables.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=300)
    rows = [row["extra_info"] for row in json.loads(out.read_text())["benchmarks"]]
    assert {row["op"] for row in rows} == {"cascade_select", "mil_nce"}
    for row in rows:
        assert {"B", "K", "D", "dtype", "floor_us", "ratio", "error", "peak_mib", "device", "commit"} <= row.keys()


@pytest.mark.slow
def test_a_step_with_the_operators_is_one_with_their_references(tmp_path):
    sizes = ["--batch", "4", "--frames", "5", "--size", "20", "--width", ".125", "--memory", "256", "--seconds", ".2"]
    command = [sys.executable, "bench/step/training_step.py", "--device", "cpu", *sizes]
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "training_step_cpu.json").read_text())
    assert report["loss_difference"] < 1e-5 and report["gradient_difference"] < 1e-3 and report["over_infonce"] > 0
    assert all(row["time_ms"] > 0 for table in ("parts", "steps") for row in report[table].values())
    assert report["device"] not in ("cpu", "cuda")  # the machine's name
    assert "| published, CPR | " in (tmp_path / "training_step_cpu.md").read_text()


@pytest.mark.slow
def test_the_ledger_of_a_run_is_small(tmp_path):
    """The exit status also depends on the times, which say nothing on a busy machine."""
    command = [sys.executable, "bench/step/ledger.py", "--device", "cpu", "--seconds", "0", "--steps", "100"]
    environment = os.environ | {"OUT": str(tmp_path)}
    subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=300)
    report = json.loads((tmp_path / "ledger.json").read_text())
    assert 100 * 150 < report["bytes"] < 100 * 1000
    for row in report["shapes"].values():
        assert row["share"] > 0 and all(of["time_ms"] > 0 for of in row["parts"].values())
    assert f"**{report['bytes'] / 1000:.0f} kB per 100 steps**" in (tmp_path / "ledger.md").read_text()


@pytest.mark.slow
def test_the_loader_beside_other_decoders(tmp_path):
    """Every form returns the requested clips; a peer that is not installed is reported as such."""
    pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")
    from cpr_fast.data.synthetic.videos import write_synthetic

    write_synthetic(tmp_path / "set", classes=4, videos=4, frames=12, width=64, height=48)
    sizes = ["--videos", "8", "--frames", "4", "--size", "32", "--seconds", ".1"]
    sizes += ["--root", str(tmp_path / "set" / "train"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "bench/data/loading.py", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "loading.json").read_text())["rows"]
    assert {(row["table"], row["source"]) for row in rows} == {
        *(("decode", source) for source in ("files", "transcoded", "records", "flow files", "flow records")),
        *(("loader", source) for source in ("files", "transcoded", "flow files")),
        ("records", "records"), ("records", "flow records"),
    }  # fmt: skip
    for row in rows:
        if "skipped" in row:
            assert "pip install" in row["skipped"]
            continue
        assert row["clips_per_s"] > 0 and row["device"] and row["commit"]
        if row["form"].split(",")[0] in ("cpr_fast", "PyAV", "PIL"):
            assert row.get("identical", 1) == 1 and row.get("plain_db", 99) > 40 and row.get("colour_db", 99) > 20, row
    barred = {(row["table"], row["form"], row["bar"]) for row in rows if "bar" in row}
    assert {("decode", "PyAV", 0.9), ("loader", "PyAV, the same", 1.0), ("records", "PIL, PIL", 1.5)} <= barred
    page = (tmp_path / "out" / "loading.md").read_text()
    assert all(f"| {row['form']} |" in page for row in rows)
    done = subprocess.run([*command, "--files-only"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "out" / "loading.json").read_text())["rows"]
    assert sorted((row["source"], row["form"], row["table"]) for row in again) == sorted(
        (row["source"], row["form"], row["table"]) for row in rows
    )
    measured = {row["source"] for row in again if "--files-only" in row["command"]}
    assert measured == {"files"}
    kept, before = ([row for row in some if row["source"] != "files"] for some in (again, rows))
    assert kept == before


@pytest.mark.slow
def test_batch_norm_is_compared_with_float64(tmp_path):
    command = [sys.executable, "bench/step/batch_norm.py", "--seconds", "0", "--clips", "2", "--draws", "1"]
    environment = os.environ | {"OUT": str(tmp_path)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=300)
    report = json.loads((tmp_path / "batch_norm.json").read_text())
    for forms in report["layers"].values():
        ours, theirs = forms["cpr_fast, channels last"], forms["torch, channels last"]
        assert all(error < theirs[name] and error < 1e-6 for name, error in ours.items())
    assert len(report["networks"]) == 3
    assert "| mean pool | torch, contiguous |" in (tmp_path / "batch_norm.md").read_text()


@pytest.mark.slow
def test_a_memory_on_two_processes_has_the_results_of_one(tmp_path):
    """The exit status says whether slots, loss and gradient are equal bit for bit."""
    command = [sys.executable, "bench/kernels/sharded_memory.py", "--size", "5003", "--batch", "3", "--rounds", "1"]
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "sharded_memory.json").read_text())
    assert report["measured"]["same_bits"] == {"slots": True, "loss": True, "gradient": True}
    few, many = (next(p for p in report["plans"] if p["processes"] == n and p["stages"] == 7) for n in (8, 64))
    # 7/8 of 2 x 4 rounds x 1 KiB for each of 256 queries in each of the six stages before the last, and the ties
    assert few["sent_bytes"]["counts of stages"] == 6 * (256 * 4096 * 2 * 7 // 8 + 7 * 4 * 256)
    assert many["features_gib"] == few["features_gib"] / 8 == few["whole_features_gib"] / 64
    assert "same bits" in (tmp_path / "sharded_memory.md").read_text()
