"""The seeded faults of bench/kernels/mutations.py: each applies to the present sources, and there are enough of every
kind."""

from __future__ import annotations

import collections
import importlib.util
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
