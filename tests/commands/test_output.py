"""Output of the commands: tables, rates, and file names that are not valid Unicode."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest

from cpr_fast.cli import COMMANDS, main
from cpr_fast.commands.inputs import next_shard, other_shards
from cpr_fast.commands.output import after_evaluation, show, table
from cpr_fast.evaluate.retrieval.names import interval, percent, signed, signed_interval
from cpr_fast.wording import counted, ordinal, printable, three_digits

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
    ("value", "rate", "difference"),
    [(None, "–", "–"), (0.5461, "54.6 %", "+54.6"), (0.0, "0.0 %", "+0.0"), (1.0, "100.0 %", "+100.0"),
     (-0.0031, "-0.3 %", "−0.3")],
)  # fmt: skip
def test_rates_and_differences_are_written_in_percent(value, rate, difference):
    assert (percent(value), signed(value)) == (rate, difference)
    bounds = None if value is None else [value, 1.0]
    assert interval(bounds) == ("–" if value is None else f"{rate.removesuffix(' %')} – 100.0")
    assert signed_interval(bounds) == ("–" if value is None else f"{difference} to +100.0")


def test_ordinal_numbers_have_their_ending():
    expected = "1st 2nd 3rd 4th 10th 11th 12th 13th 21st 22nd 101st 111th 112th"
    assert " ".join(map(ordinal, (1, 2, 3, 4, 10, 11, 12, 13, 21, 22, 101, 111, 112))) == expected


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


@pytest.mark.parametrize("nested", [[{"view": "rgb"}], {"rgb": {"map": 0.5}}, {"rgb": [1, 2]}, ([1],)])
def test_nested_values_are_never_printed_as_python_code(nested, capsys):
    with pytest.raises(TypeError, match="expected lines"):
        show({"path": "a", "rows": nested}, False, next_step="b")
    show({"rows": nested}, True, next_step="b")  # JSON may be nested
    assert json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize(
    ("encoding", "row"),
    [("utf-8", "RGB · mAP  17.5 – 20.0  −3.0  é"), ("ascii", r"RGB / mAP  17.5 - 20.0  -3.0  \xe9"),
     ("latin-1", "RGB / mAP  17.5 - 20.0  -3.0  é")],
)  # fmt: skip
def test_tables_can_be_printed_whatever_the_encoding_of_the_terminal(monkeypatch, encoding, row):
    """An encoding without the characters of the tables must not raise UnicodeEncodeError."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    show({}, False, lines=["RGB · mAP  17.5 – 20.0  −3.0  é"], next_step="open é")
    out.flush()
    assert out.buffer.getvalue().decode(encoding).splitlines()[0] == row


def test_a_missing_file_with_such_a_name_is_one_line(capsys):
    assert main(["export", STRANGE, "--out", "x"]) == 2
    assert r"caf\udce9.mp4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shard", "following", "others"),
    [
        ((0, 1), "", ""),
        ((0, 2), "--shard 1/2", "1/2"),
        ((1, 2), "--shard 0/2", "0/2"),
        ((1, 3), "--shard 0/3", "0/3, 2/3"),
        ((0, 8), "--shard 1/8", "1/8 to 7/8"),
        ((2, 8), "--shard 0/8", "0/8 to 1/8, 3/8 to 7/8"),
        ((7, 8), "--shard 0/8", "0/8 to 6/8"),
    ],
)
def test_the_other_shards_are_named(shard, following, others):
    assert " ".join(next_shard(shard)) == following and other_shards(shard) == others


def test_every_line_of_the_next_step_is_a_command(capsys):
    show({}, False, lines=["done"], next_step="cpr-fast a\ncpr-fast b")
    assert capsys.readouterr().out == "done\n\nnext: cpr-fast a\n      cpr-fast b\n"


def test_after_an_evaluation_the_report_or_a_search_comes_next():
    assert after_evaluation(Path("my run"), ["x.pt"], Path("i.csv")) == "cpr-fast report 'my run'"
    said = after_evaluation(None, ["rgb=a.pt", "flow=b c.pt"], Path("i.csv"))
    assert said == "cpr-fast search VIDEO.mp4 --index i.csv --checkpoint rgb=a.pt 'flow=b c.pt'"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "pretrain"])
def test_no_help_shows_an_empty_default(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())  # without the frame and its line breaks
    assert "usage:" in text and not re.search(r"\(default:\s*\)", text)


@pytest.mark.parametrize("columns", [62, 80, 120])
@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_the_help_of_pretrain_says_which_settings_have_no_value(option, columns, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    (tmp_path / "c.toml").write_text('[schedule]\ncycles = [{view = "rgb", epochs = 1, mining = "none"}]\n')
    with contextlib.suppress(SystemExit):
        main(["pretrain", str(tmp_path / "c.toml"), option])
    out = capsys.readouterr().out
    text = " ".join(out.replace("\u2502", " ").split())
    assert "data.index" in text and "(not set)" in text and not re.search(r"\(default:\s*\)|''", text)
    framed = {len(line) for line in out.splitlines() if line.startswith("\u2502")}
    assert len(framed) == (1 if option == "--help-all" else 0)


def test_the_help_of_pretrain_explains_every_setting_in_words_of_its_own(capsys, monkeypatch):
    """The help is the comment of a field; a field without a comment would show nothing, or that of an earlier field."""
    monkeypatch.setenv("COLUMNS", "80")  # one column of frames
    with contextlib.suppress(SystemExit):
        main(["pretrain", "cpr_ucf101", "--help-all"])
    words = "\n".join(line.strip("\u2502 ") for line in capsys.readouterr().out.splitlines())
    blocks = re.split(r"^(?=--)", words, flags=re.MULTILINE)[1:]
    helps = {}
    for block in blocks:
        option, *rest = block.split("\u2570")[0].splitlines()  # up to the lower edge of the frame
        helps[option.split()[0]] = re.sub(r"\((default: .*|not set)\)$", "", " ".join(rest).strip()).strip()
    assert len(helps) > 100 and not [option for option, text in helps.items() if not text]
    first_of = {}
    for option, text in helps.items():
        section = re.sub(r"\d+", "N", option.rpartition(".")[0])
        assert first_of.setdefault((section, text), option).rpartition(".")[2] == option.rpartition(".")[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\nb\tc\x1b[31m", r"a\nb\tc\x1b[31m"), ("x\u2028y\x7f", r"x\u2028y\x7f"), ("\udcff\ud800", r"\udcff\ud800"),
     ("Vid\u00e9o\u00a0\u3000\U0001f600", "Vid\u00e9o\u00a0\u3000\U0001f600")],
)  # fmt: skip
def test_what_changes_a_terminal_is_escaped_and_nothing_else(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize(
    ("number", "nouns", "expected"),
    [(0, ("video",), "0 videos"), (1, ("video",), "1 video"), (9537, ("video",), "9,537 videos"),
     (1, ("class", "classes"), "1 class"), (2, ("class", "classes"), "2 classes")],
)  # fmt: skip
def test_a_number_has_its_noun(number, nouns, expected):
    assert counted(number, *nouns) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1143.6, "1,144"),
        (999.4, "999"),
        (999.5, "1,000"),
        (0.01234, "0.0123"),
        (-2e4, "-20,000"),
        (0, "0"),
        (-0.5, "-0.5"),
    ],
)
def test_a_number_of_three_digits_has_no_power_of_ten(number, expected):
    assert three_digits(number) == expected
