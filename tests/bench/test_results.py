"""The committed results: measured on committed code, or marked, with commands that name no folder of a machine."""

import json
import re
import shlex
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
DATA = sorted(path for path in RESULTS.iterdir() if path.suffix in (".json", ".jsonl"))
# Pages of another name than their data.
PAGES = {"study_trials.jsonl": RESULTS / "study.md", "index_rate.json": RESULTS.parents[1] / "docs" / "kinetics.md"}
STRING = r'"((?:[^"\\]|\\.)*)"'


def test_recorded_commands_name_no_folder_of_a_machine(measure):
    found = [(file.name, json.loads(f'"{text}"')) for file in DATA
             for text in set(re.findall(f'"command": {STRING}', file.read_text()))]  # fmt: skip
    found += [
        (page.name, text) for page in RESULTS.glob("*.md") for text in re.findall("`(python [^`]*)`", page.read_text())
    ]
    assert len(found) > 50
    assert not [each for each in found if any(measure.PATH.search(word) for word in shlex.split(each[1]))]


@pytest.mark.parametrize("file", DATA, ids=lambda file: file.name)
def test_a_page_marks_what_was_measured_with_uncommitted_changes(file):
    commits = re.findall(f'"(?:before_)?commit": {STRING}', file.read_text())
    if not any(commit.endswith("-dirty") for commit in commits):
        return
    page = PAGES.get(file.name, RESULTS / f"{file.stem}.md")
    text = page.read_text() if page.exists() else ""
    assert "measured with uncommitted changes" in text, f"measure {file.name} on committed code, or say so"


def test_no_page_has_such_a_commit_without_that_sentence():
    pages = [page for page in RESULTS.glob("*.md") if "-dirty" in page.read_text()]
    assert not [page.name for page in pages if "measured with uncommitted changes" not in page.read_text()]
