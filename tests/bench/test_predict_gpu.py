"""The predicted times of the CUDA kernels: what bounds a launch, and how they are put beside measured times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import predict_gpu
from bars import BEFORE, GROWTH, bar_rows, steepest

ROOT = Path(__file__).resolve().parents[2]
PREDICTED = ROOT / "bench" / "results" / "gpu_predicted.json"
A100 = predict_gpu.GPUS[0]


def launch(blocks: int, threads: int = 128, shared_bytes: int = 0, **per_block: float) -> dict:
    counts = {key.replace("__", " "): value for key, value in per_block.items()}
    made = {"kernel": "k", "blocks": blocks, "threads": threads, "shared_bytes": shared_bytes, "launches": 1}
    return made | {"per_block": counts}


def test_blocks_that_a_multiprocessor_holds():
    assert predict_gpu.resident_blocks(A100, 128, 32, 0) == 16  # 64 warps
    assert predict_gpu.resident_blocks(A100, 128, 255, 0) == 2  # 65,536 registers
    assert predict_gpu.resident_blocks(A100, 128, 32, 80 << 10) == 2  # 164 KiB
    assert predict_gpu.resident_blocks(A100, 32, 16, 0) == 32


def test_the_busiest_multiprocessor_and_the_slowest_unit_bound_a_launch():
    products = {"sm_80__tensor": 1e6}
    one, two = (
        predict_gpu.predict_launch(A100, launch(blocks, threads=1024, **products), 64, 0) for blocks in (108, 109)
    )
    assert one["limit"] == "tensor" and one["time_us"] == pytest.approx(2e6 / 1.41e3)
    assert two["time_us"] == pytest.approx(2 * one["time_us"])
    instructions = predict_gpu.predict_launch(A100, launch(108, threads=1024, sm_80__constant=4e6), 64, 0)
    assert instructions["limit"] == "issue" and instructions["time_us"] == pytest.approx(1e6 / 1.41e3)
    sectors = predict_gpu.predict_launch(A100, launch(108, sectors=1e6), 64, 0)
    assert sectors["limit"] == "L2" and sectors["time_us"] == pytest.approx(108e6 * 32 / 4.5e6)
    conflicts = predict_gpu.predict_launch(A100, launch(1, wavefronts=5e5, sm_80__shared__load=1e5), 64, 0)
    assert conflicts["limit"] == "shared memory"


def test_a_few_warps_wait_for_their_own_results():
    alone = predict_gpu.predict_launch(A100, launch(1, threads=32, sm_80__fp32=1000, global__loads=40), 64, 0)
    assert alone["limit"] == "latency"
    far = predict_gpu.predict_launch(A100, launch(1, threads=32, sm_80__fp32=1000, global__loads=40), 64, 1)
    assert far["time_us"] > alone["time_us"]


def test_products_by_warpgroups_have_a_rate_of_their_own_and_nothing_runs_beside_the_scores():
    h200 = predict_gpu.GPUS[2]
    counts = {"warpgroup__products": 9.5e5}
    busy = predict_gpu.predict_launch(h200, launch(132, threads=256, **counts), 185, 0)
    assert busy["limit"] == "tensor" and busy["time_us"] == pytest.approx(1e6 / 1.755e3)
    by_warps = predict_gpu.predict_launch(h200, launch(132, threads=256, sm_90a__tensor=9.5e5), 185, 0)
    assert by_warps["time_us"] == pytest.approx(9.5 / 6.2 * busy["time_us"])
    one, two = (predict_gpu.latency_cycles(h200, launch(1, threads=128 * n, **counts), 0) for n in (1, 2))
    assert one == pytest.approx(1e6 / 3) and two == pytest.approx(one / 2)  # half of the products each


def test_every_predicted_call_is_at_least_its_floor_and_names_its_limit():
    report = json.loads(PREDICTED.read_text())
    assert len(report["rows"]) >= 30 and {row["device"] for row in report["rows"]} == {g.name for g in predict_gpu.GPUS}
    key = ("device", "op", "precision", "B", "K")
    floors = {tuple(row[name] for name in key): row["floor_us"] for row in report["rows"]}
    for row in report["rows"]:
        assert row["limit"] and row["kernels"]
        # Long memories are scored on tensor cores, whatever the precision.
        streamed = any("stream_kernel" in kernel["kernel"] for kernel in row["kernels"])
        call = row | {"precision": "bf16 of fp32"} if streamed and row["precision"] == "fp32" else row
        floor = floors[tuple(call[name] for name in key)]
        assert floor is None or row["time_us"] >= floor, row


def test_the_recorded_predictions_follow_from_the_recorded_counts(tmp_path):
    predict_gpu.write(ROOT / "bench" / "results" / "ptx_counts.json", tmp_path)
    for name in ("gpu_predicted.json", "gpu_predicted.md"):
        assert (tmp_path / name).read_text() == (PREDICTED.parent / name).read_text(), name


def test_no_time_grows_by_more_than_its_bar_where_the_memory_doubles():
    report = json.loads(PREDICTED.read_text())
    found = {(row["op"], row["precision"], row["B"]) for row in report["growth"]}
    assert {("cascade_select", "fp32", 32), ("cascade_select", "fp32", 256)} < found and len(found) == 4
    assert len(report["growth"]) == len(predict_gpu.GPUS) * len(found)
    for row in report["growth"]:
        ratios = {K: ratio for ratio, K in steepest(row["time_us"])}
        assert sorted(ratios) == [1024 << step for step in range(12)]
        assert all(0.9 < ratio <= GROWTH for ratio in ratios.values()), row


def test_times_over_the_memory_are_those_of_the_predicted_calls():
    report = json.loads(PREDICTED.read_text())
    growth = {(row["device"], row["op"], row["precision"], row["B"]): row["time_us"] for row in report["growth"]}
    common = 0
    for row in report["rows"]:
        times = growth.get((row["device"], row["op"], row["precision"], row["B"]), {})
        if (time := times.get(str(row["K"]))) is not None:
            assert time == pytest.approx(row["time_us"], rel=1e-3), row
            common += 1
    assert common == 8 * len(predict_gpu.GPUS)


def test_the_steepest_doubling_comes_first():
    assert steepest({"8": 30.0, "2": 10.0, "4": 12.0, "32": 99.0}) == [(2.5, 4), (1.2, 2)]


def test_bars_compare_with_the_floor_or_with_the_time_of_fp32():
    rows = bar_rows(json.loads(PREDICTED.read_text())["rows"])
    shapes = {
        device: {row["call"][2:] for row in rows if row["device"] == device and row["of"] == "fp32"}
        for device in BEFORE
    }
    many = {(256, 16384), (256, 65536), (1024, 65536), (1024, 1_000_000), (4096, 1_000_000)}
    assert shapes == {"NVIDIA A100-SXM4-80GB": many | {(32, 16384)}, "NVIDIA H200": many}  # where the floors say so
    assert len(rows) == 8 * len(BEFORE) + 11
    missed = {row["call"][:2] for row in rows if not row["met"]}
    assert missed == {("cascade_select", "bf16")}  # the page says why
    first = rows[0]
    assert first["call"] == ("cascade_select", "fp32", 32, 2048) and first["before_us"] == 17.04
    assert first["ratio"] == pytest.approx(first["now_us"] / 4.4, rel=0.02)  # the floor: 4.4 us


def test_the_counted_products_of_the_streamed_route_are_those_of_all_scores():
    """A score of two terms for each factor has three products, all but low * low; one term has one. A product of tensor
    cores has 16 x 8 x 16 terms, and features have 128 dimensions in two views."""
    streamed = 0
    for call in json.loads((PREDICTED.parent / "ptx_counts.json").read_text())["calls"]:
        scans = [launch for launch in call["launches"] if launch["kernel"].startswith("stream_kernel")]
        if scans:
            products = sum(row["launches"] * row["blocks"] * row["per_block"]["ptx mma"] for row in scans)
            expected = (3 if call["precision"] == "fp32" else 1) * 2 * 128 * call["B"] * call["K"] / (16 * 8 * 16)
            assert 0.999 * expected <= products < 1.1 * expected, (
                call
            )  # more: tiles at the ends of chunks and of the memory
            streamed += 1
    assert streamed >= 14


def test_extrapolated_counts_agree_with_interpreted_ones():
    checks = json.loads((PREDICTED.parent / "ptx_counts.json").read_text())["checks"]
    assert {row["op"] for row in checks} == {"cascade_select", "mil_nce"} and len(checks) >= 8
    for row in checks:
        assert abs(row["error"]) <= (0.15 if "select" in row["kernel"] or "stages" in row["kernel"] else 0.02), row


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / "predict_gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_predictions_are_printed_beside_measured_times(tmp_path):
    predicted = [row for row in json.loads(PREDICTED.read_text())["rows"] if row["device"] == "NVIDIA H200"]
    calls = [row for row in predicted if row["op"] != "tvl1_flow"][:3]
    measured = [{key: row[key] for key in ("op", "precision", "B", "K")} for row in calls]
    for row, call, factor in zip(measured, calls, (2.0, 1.0, 0.8), strict=True):  # made up: errors of -50, 0 and +25 %
        row["time_us"] = factor * call["time_us"]
    measured.append({"op": "cascade_select", "precision": "fp32", "B": 3, "K": 7, "time_us": 1.0})  # not predicted
    (tmp_path / "gpu_time.json").write_text(json.dumps({"device": "NVIDIA H200", "rows": measured}))
    pair = next(row for row in predicted if row["op"] == "tvl1_flow")
    rows = [{"pairs": pair["B"], "time_ms": pair["time_us"] / 1e3}]
    (tmp_path / "gpu_flow.json").write_text(json.dumps({"device": "NVIDIA H200", "rows": rows}))
    process = run("compare", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 5 and lines[-1] == "median error of 4 predictions: 12.5 %"
    first = calls[0]
    assert lines[0].startswith(f"{first['op']} {first['precision']} {first['B']}x{first['K']} ")
    assert "-50.0 %" in lines[0] and "+25.0 %" in lines[2] and f"limit {first['limit']}" in lines[0]


def test_a_device_without_predictions_or_measurements_is_said(tmp_path):
    rows = [{"op": "cascade_select", "precision": "fp32", "B": 32, "K": 2048, "time_us": 10.0}]
    (tmp_path / "gpu_time.json").write_text(json.dumps({"device": "NVIDIA T4", "rows": rows}))
    other = run("compare", "--out", tmp_path)
    assert other.returncode == 0 and other.stdout.startswith(
        "no prediction for NVIDIA T4; there are some for NVIDIA A100"
    )
    nothing = run("compare", "--out", tmp_path / "empty")
    assert nothing.returncode == 1 and "neither gpu_time.json nor gpu_flow.json" in nothing.stderr
