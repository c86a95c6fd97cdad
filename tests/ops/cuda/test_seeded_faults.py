"""The seeded faults of bench/kernels/mutations.py: each applies to the present sources, and there are enough of every
kind."""

from __future__ import annotations

import collections
import importlib.util
import json
import shutil

import pytest
from support.cuda_emulation.compile import REPOSITORY

spec = importlib.util.spec_from_file_location("mutations", REPOSITORY / "bench" / "kernels" / "mutations.py")
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)

FAULTS = mutations.read_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"])
def test_every_fault_applies_exactly_once(fault, tmp_path):
    source = REPOSITORY / "csrc" / "cuda" / fault["file"]
    copy = tmp_path / "cuda" / fault["file"]
    copy.parent.mkdir(parents=True)
    shutil.copy(source, copy)
    mutations.apply(fault, tmp_path)
    assert copy.read_text() != source.read_text()
    copy.write_text("")
    with pytest.raises(ValueError, match=f"{fault['name']}: .* 0 times, expected once"):
        mutations.apply(fault, tmp_path)


def test_there_are_enough_faults_of_every_class():
    classes = collections.Counter(fault["class"] for fault in FAULTS)
    assert len(classes) == 12 and sum(classes.values()) >= 60 and min(classes.values()) >= 5
    assert len({fault["name"] for fault in FAULTS}) == len(FAULTS)
    assert {fault["operator"] for fault in FAULTS} == {"cascade_select", "mil_nce", "tvl1_flow"}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "test" in fault], ids=lambda fault: fault["name"])
def test_the_test_of_a_fault_runs_first(fault):
    file, name = fault["test"].split("::")
    assert f"def {name}(" in (mutations.TESTS / file).read_text()
    (stage, arguments), *others = mutations.steps(fault)
    assert arguments == [str(mutations.TESTS / fault["test"])] and dict(others) == mutations.stages(fault["operator"])
    assert stage == ("compiled code" if "ptx" in file else "sanitizer" if "sanitizer" in file else "host execution")


CASES = """
import os, subprocess, sys, time
import pytest

@pytest.mark.parametrize("number", range(3))
def test_in_this_process(number):
    pass

def test_in_another_process():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.6: pass"], check=True)

@pytest.mark.large
def test_large():
    raise AssertionError
"""


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """A file of tests that stands for those of the sanitizer; the results are in its folder."""
    file = tmp_path / "sanitizer" / "test_cases.py"
    file.parent.mkdir()
    file.write_text(CASES)
    monkeypatch.setattr(mutations, "TESTS", tmp_path)
    monkeypatch.setattr(mutations, "build", lambda sanitize: None)
    monkeypatch.setattr(mutations, "RESULTS", tmp_path / "mutations.json")
    return file


def test_the_time_of_the_sanitizer_includes_child_processes_and_no_large_case(cases):
    row = mutations.time_sanitizer()
    assert row["cases"] == 4 and row["cpu_s"] >= 0.6
    assert {"device", "commit", "torch", "command"} <= row.keys()


@pytest.mark.parametrize("line", ["    assert False", "    pytest.skip('no compiler')", "    import no_such_module"])
def test_a_sanitizer_that_does_not_pass_has_no_time(cases, line):
    cases.write_text(CASES.replace("    pass\n", f"{line}\n"))
    with pytest.raises(RuntimeError, match="expected tests that pass, got '.*(failed|skipped)"):
        mutations.time_sanitizer()


def test_the_page_shows_the_time_of_the_sanitizer_if_it_was_measured(cases):
    mutations.RESULTS.write_text('{"commit": "abc", "faults": []}')
    mutations.write_table([], {})
    page = mutations.RESULTS.with_suffix(".md").read_text()
    assert "Without a fault" not in page
    row = {"cases": 4, "cpu_s": 99.6, "device": "a processor", "commit": "def", "torch": "2", "command": "python x.py"}
    mutations.RESULTS.with_name("sanitizer.json").write_text(json.dumps(row))
    mutations.write_table([], {})
    added = set(mutations.RESULTS.with_suffix(".md").read_text().splitlines()) - set(page.splitlines())
    assert added == {
        "Without a fault, the 4 cases of `tests/ops/cuda/sanitizer` (but for large ones) take 100 s of CPU time of one "
        "core, compilation not included: `python x.py` at def, a processor."
    }
