"""metrics.jsonl consists of whole lines, can be read after a crash, and is rewound when a run is resumed."""

from __future__ import annotations

import json

import pytest

from cpr_fast.errors import InputError
from cpr_fast.runtime.metrics import MetricsWriter, read_metrics, rewind


def write(folder, *rows):
    with MetricsWriter(folder) as writer:
        for row in rows:
            writer.write(row)


def test_rows_come_back_and_runs_append(tmp_path):
    write(tmp_path / "run", {"kind": "run", "x": [1, 2.5, None, "é"]})
    write(tmp_path / "run", {"kind": "note", "nested": {"a": True}})
    assert read_metrics(tmp_path / "run") == [
        {"kind": "run", "x": [1, 2.5, None, "é"]},
        {"kind": "note", "nested": {"a": True}},
    ]


def test_a_row_is_on_disk_before_the_next_is_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"kind": "note", "i": 0})
        assert read_metrics(tmp_path) == [{"kind": "note", "i": 0}]


def test_nan_and_infinity_become_null(tmp_path):
    write(tmp_path, {"kind": "step", "loss": float("nan"), "list": [float("inf"), 1.0], "step": 0})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"kind": "step", "loss": None, "list": [None, 1.0], "step": 0}


def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path):
    write(tmp_path, {"kind": "note", "i": 0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "note", "i"')
    assert read_metrics(tmp_path) == [{"kind": "note", "i": 0}]
    write(tmp_path, {"kind": "note", "i": 2})
    assert [row["i"] for row in read_metrics(tmp_path)] == [0, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "note"}\nnonsense\n{"kind": "note"}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: expected one JSON object per line"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("line", ["3", "null", "[]", "{}", '{"kind": 1}', '"text"'])
def test_a_row_of_another_form_is_named(tmp_path, line):
    write(tmp_path, {"kind": "step", "step": 0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="metrics.jsonl:2: expected a JSON object with a text 'kind', got"):
        read_metrics(tmp_path)


def test_bytes_that_are_not_utf_8_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n" * 3)
    with pytest.raises(InputError, match="metrics.jsonl:1: expected one JSON object per line"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has no metrics.jsonl"):
        read_metrics(tmp_path)


def test_rewind_drops_only_what_came_later(tmp_path):
    kept = [
        {"kind": "run"},
        {"kind": "step", "step": 4},
        {"kind": "epoch", "epoch": 0},
        {"kind": "mined", "epoch": 0},
        {"kind": "step", "step": 5},
        {"kind": "retrieval", "name": "trained"},
    ]
    late = [{"kind": "step", "step": 6}, {"kind": "epoch", "epoch": 1}, {"kind": "mined", "epoch": 1}]
    write(tmp_path, *kept[:5], *late, kept[5])
    rewind(tmp_path, step=6, epoch=1)
    assert read_metrics(tmp_path) == kept
