"""Output of the commands: tables, rates, and file names that are not valid Unicode."""

import json
import os

import pytest

from cpr_fast.cli import main
from cpr_fast.commands.output import rate, show, table
from cpr_fast.errors import printable

STRANGE = os.fsdecode(b"caf\xe9.mp4")  # encoded as Latin-1, so that the decoded name contains a surrogate


def test_a_table_is_aligned_without_trailing_spaces():
    text = table(["view", "R@1", "n"], [["rgb", ".546", 10], ["two stream", "-", 2000]], title="on UCF101")
    assert text.splitlines() == [
        "on UCF101",
        "view         R@1     n",
        "----------  ----  ----",
        "rgb         .546    10",
        "two stream     -  2000",
    ]
    assert table(["a"], []) == "a\n-"
    assert r"caf\udce9.mp4" in table(["path"], [[STRANGE]])


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.5461, ".546"), (0.0, ".000"), (1.0, "1.000"), (0.9996, "1.000")]
)
def test_rates_are_written_as_in_the_literature(value, text):
    assert rate(value) == text


def test_names_that_are_not_unicode_can_be_printed(capsys):
    assert printable(STRANGE) == r"caf\udce9.mp4"
    assert printable("Vidéo 視頻.mp4") == "Vidéo 視頻.mp4"
    show({"path": STRANGE, "rows": [], "counts": {"a": 1}}, False, next_step=f"open {STRANGE}")
    printed = capsys.readouterr().out
    assert printed.encode("utf-8")  # would raise an exception for a surrogate
    assert printed.splitlines() == [
        r"path: caf\udce9.mp4",
        "rows: none",
        "counts: a 1",
        "",
        r"next: open caf\udce9.mp4",
    ]
    show({"path": STRANGE}, True, lines=["not printed"], next_step="not printed")
    assert json.loads(capsys.readouterr().out) == {"path": STRANGE}


def test_a_missing_file_with_such_a_name_is_one_line(capsys):
    assert main(["export", STRANGE, "--out", "x"]) == 2
    assert r"caf\udce9.mp4" in capsys.readouterr().err
