"""The file of the ledger: chained rows, damage that is named, and what a resumed run keeps."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os

import pytest
from support.small_runs import run, settings

from cpr_fast.errors import InputError
from cpr_fast.pretrain.ledger.chain import (
    FILE,
    START,
    Ledger,
    LedgerError,
    read_ledger,
    require_chain,
    require_steps,
    rewind,
)
from cpr_fast.pretrain.run import loop
from cpr_fast.weights.checkpoint import save_step


def row(step, **values):
    return {"step": step, "epoch": step // 3, "cycle": 0, "plan": f"{step:016x}", "loss": step / 7, **values}


@pytest.fixture
def folder(tmp_path):
    """A run folder with the ledger of 6 steps, whose epochs of 3 steps end with a row of weights."""
    ledger = Ledger(tmp_path)
    for step in range(6):
        ledger.write(row(step))
        if step % 3 == 2:
            ledger.write({"step": step, "epoch": step // 3, "cycle": 0, "weights": "ab"})
    ledger.close()
    return tmp_path


def lines_of(folder):
    return (folder / FILE).read_text().splitlines(keepends=True)


def test_rows_are_chained_by_blake2b(folder):
    """Recomputes the chain from the lines with hashlib and json alone."""
    chain = "0" * 32
    for line, read in zip(lines_of(folder), read_ledger(folder), strict=True):
        values = json.loads(line)
        stated = values.pop("chain")
        chain = hashlib.blake2b((chain + json.dumps(values)).encode(), digest_size=16).hexdigest()
        assert stated == chain and read == {**values, "chain": chain}
    assert [r["step"] for r in read_ledger(folder)] == [0, 1, 2, 2, 3, 4, 5, 5]


def test_a_ledger_goes_on_with_the_chain_of_its_last_row(folder, tmp_path_factory):
    """Written by two objects, it is the same file as written by one."""
    straight = tmp_path_factory.mktemp("straight")
    rows = [{name: value for name, value in read.items() if name != "chain"} for read in read_ledger(folder)]
    for each, added in ((folder, [row(6)]), (straight, [*rows, row(6)])):
        ledger = Ledger(each)
        for values in added:
            ledger.write(values)
        ledger.close()
    assert lines_of(folder) == lines_of(straight) and len(read_ledger(folder)) == 9


@pytest.mark.parametrize(
    ("damage", "line", "text"),
    [
        (lambda lines: [lines[0], lines[1].replace('"loss": 0.1', '"loss": 0.2'), *lines[2:]], 2, "was changed"),
        (lambda lines: [*lines[:2], *lines[3:]], 3, "was changed"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4, "was changed"),
        (lambda lines: lines[1:], 1, "was changed"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1, "was changed"),
        (lambda lines: [*lines[:4], "\n", *lines[4:]], 5, "expected a row of a ledger, got ''"),
        (lambda lines: [*lines[:4], "[]\n", *lines[4:]], 5, "expected a row of a ledger"),
        (lambda lines: [*lines[:4], lines[4].replace(', "chain"', ', "link"'), *lines[5:]], 5, "expected a row"),
        (lambda lines: [*lines[:4], lines[4][:30] + "\n", *lines[5:]], 5, "expected a row"),
        (lambda lines: [*lines[:4], '{"step": "4", "chain": "' + "0" * 32 + '"}\n', *lines[4:]], 5, "expected a row"),
        (lambda lines: ['{"step": 3, "epoch": 1, "chain": "' + "0" * 32 + '"}\n', *lines], 1, "expected a row"),
        (lambda lines: ["\udcff\x00[[[[\n", *lines], 1, "expected a row"),
    ],
    ids=["changed", "removed", "twice", "first removed", "exchanged", "empty line", "no object", "no chain", "cut line",
         "step is a text", "no cycle", "binary"],
)  # fmt: skip
def test_damage_is_named_with_its_line(folder, damage, line, text):
    (folder / FILE).write_bytes("".join(damage(lines_of(folder))).encode(errors="surrogateescape"))
    with pytest.raises(LedgerError, match=text) as raised:
        read_ledger(folder)
    assert f"{FILE}:{line}:" in str(raised.value)


def test_an_incomplete_last_line_is_left_out_and_overwritten(folder):
    whole = lines_of(folder)
    with open(folder / FILE, "a") as file:
        file.write('{"step": 6, "epo')
    assert len(read_ledger(folder)) == len(whole)
    ledger = Ledger(folder)
    ledger.write(row(6))
    ledger.close()
    assert lines_of(folder)[:-1] == whole and read_ledger(folder)[-1]["step"] == 6


def test_a_row_that_does_not_fit_on_the_disk_is_removed_and_written_later(folder, monkeypatch):
    """The first part of the row was written before the disk was full."""
    ledger = Ledger(folder)
    whole, file = lines_of(folder), ledger._file

    class Full:
        def write(self, data):
            if len(data) > 40:
                return file.write(data[:40])
            raise OSError(errno.ENOSPC, "No space left on device")

        def truncate(self, size):
            return file.truncate(size)

    ledger._file = Full()
    for step in (6, 6):
        with pytest.raises(InputError, match="could not write .*No space left on device; the rows written so far"):
            ledger.write(row(step))
    assert lines_of(folder) == whole
    ledger._file = file
    ledger.write(row(6))
    ledger.close()
    assert lines_of(folder)[:-1] == whole and read_ledger(folder)[-1]["step"] == 6


def test_a_missing_ledger_is_named(tmp_path):
    with pytest.raises(LedgerError, match=r"has no ledger.jsonl; expected a folder that this version of"):
        read_ledger(tmp_path)


def test_steps_that_are_missing_at_the_end_are_found_by_the_checkpoints(folder):
    require_steps(read_ledger(folder), 3, folder, written=6)
    (folder / FILE).write_text("".join(lines_of(folder)[:5]))
    with pytest.raises(LedgerError, match="cut off: it ends after 4 steps, but a checkpoint was written after 6 steps"):
        require_steps(read_ledger(folder), 3, folder, written=6)


def test_steps_that_are_missing_in_between_are_named(tmp_path):
    ledger = Ledger(tmp_path)
    for step in (0, 1, 4, 5, 7):
        ledger.write(row(step))
    ledger.close()
    with pytest.raises(LedgerError, match="lacks 3 steps from step 3 on"):
        require_steps(read_ledger(tmp_path), 0, tmp_path)
    with pytest.raises(LedgerError, match="lacks 1 step from step 7 on"):
        require_steps(read_ledger(tmp_path), 4, tmp_path)
    require_steps(read_ledger(tmp_path), 7, tmp_path)
    with pytest.raises(LedgerError, match="ends after 8 steps: expected a step after step 8"):
        require_steps(read_ledger(tmp_path), 8, tmp_path)


def test_a_ledger_that_was_written_again_does_not_fit_the_checkpoint(folder):
    rows = read_ledger(folder)
    require_chain(rows, 3, rows[3]["chain"], folder)
    require_chain(rows, 3, None, folder)
    with pytest.raises(LedgerError, match="does not fit the checkpoint after step 3"):
        require_chain(rows, 3, rows[2]["chain"], folder)


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (3, 4), (5, 6), (6, 8), (9, 8)])
def test_rewinding_keeps_the_rows_before_a_step(folder, caplog, step, kept):
    before = lines_of(folder)
    rows = read_ledger(folder)
    rewind(folder, step=step, chain=rows[kept - 1]["chain"] if kept else START)
    assert lines_of(folder) == before[:kept]
    assert not caplog.records


@pytest.mark.parametrize(
    ("damaged", "said", "kept"),
    [
        (lambda lines: [*lines[:2], *lines[3:]], "was changed", 2),
        (lambda lines: lines[:2], "does not fit the checkpoint after step 3", 2),
        (lambda lines: [*lines[:6], "x\n"], "", 4),
        (lambda lines: [*lines[:4], "x\n", *lines[4:]], "", 4),
        (lambda lines: [*lines[:3], "x\n", *lines[4:]], "expected a row of a ledger, got 'x'", 3),
    ],
    ids=["row removed", "cut off", "a fault that is removed", "a fault after the last row", "the last row"],
)
def test_a_damaged_ledger_does_not_stop_a_resumed_run(folder, caplog, damaged, said, kept):
    rows, lines = read_ledger(folder), lines_of(folder)
    (folder / FILE).write_text("".join(damaged(lines)))
    with caplog.at_level(logging.WARNING):
        rewind(folder, step=3, chain=rows[3]["chain"])
    assert lines_of(folder) == lines[:kept]
    assert said in caplog.text and bool(said) == bool(caplog.records)
    copy = folder / f"{FILE}.damaged"
    assert (
        copy.exists()
        == bool(said)
        == (f"kept as {copy.name}; the run continues with its first {kept} rows" in caplog.text)
    )
    assert not said or copy.read_text() == "".join(damaged(lines))


def test_a_ledger_is_on_the_disk_before_the_checkpoint_that_holds_its_chain(tmp_path, monkeypatch):
    """At every checkpoint the ledger was synchronised after its last row, the one that the checkpoint names."""
    synced, saved = [], []
    fsync = os.fsync

    def noted(descriptor):
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(FILE):
            synced.append((tmp_path / "run" / FILE).stat().st_size)

    def save(folder, step, payload, **options):
        rows = read_ledger(folder.parent)
        saved.append(payload["ledger"] == rows[-1]["chain"] and synced[-1:] == [(folder.parent / FILE).stat().st_size])
        return save_step(folder, step, payload, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(loop, "save_step", save)
    run(settings(tmp_path / "run", schedule={"cycles": [{"view": "rgb", "epochs": 2, "mining": "none"}]}))
    assert saved == [True, True]


def test_resuming_without_a_ledger_says_where_it_begins(tmp_path, caplog):
    rewind(tmp_path, step=40, chain=None)
    assert caplog.messages == ["There is no ledger.jsonl: it will begin with step 41"]
