"""Files are written whole, lines are appended whole by several processes, and a full disk gives one sentence."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from support.machine.full_disk import files_end_at

from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import (
    TEMPORARY,
    LineFile,
    _remove_abandoned,
    created,
    naming,
    one_writer,
    replacing,
    temporary_folder,
)
from cpr_fast.runtime.metrics import MetricsWriter, read_metrics, rewind


def append_rows(folder, writer, count):
    with MetricsWriter(folder) as metrics:
        for i in range(count):
            metrics.write({"kind": "note", "writer": writer, "i": i, "text": "x" * (1 + 997 * i % 20_000)})


def test_rows_of_two_processes_stay_whole(tmp_path):
    """Rows of up to 20 kB, longer than what one buffered write passes on."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_rows, args=(tmp_path, name, 150)) for name in ("train", "retrieve")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 300
    for name in ("train", "retrieve"):
        assert [row["i"] for row in rows if row["writer"] == name] == list(range(150))


def test_a_row_waits_while_another_process_holds_the_file(tmp_path):
    held, file = LineFile(tmp_path / "lines"), LineFile(tmp_path / "lines")
    other = threading.Thread(target=lambda: file.append("second"))
    with held.locked():
        other.start()
        other.join(0.2)
        assert other.is_alive() and (tmp_path / "lines").read_bytes() == b""
    other.join(10)
    assert (tmp_path / "lines").read_text() == "second\n"


def test_a_row_written_after_a_rewind_is_in_the_new_file(tmp_path):
    """`rewind` replaces the file; a writer that opened it before must not write to the old one."""
    with MetricsWriter(tmp_path) as evaluation:
        evaluation.write({"kind": "step", "step": 7})
        rewind(tmp_path, step=3, epoch=0)
        evaluation.write({"kind": "note", "text": "later"})
        (tmp_path / "metrics.jsonl").unlink()
        evaluation.write({"kind": "note", "text": "last"})
    assert read_metrics(tmp_path) == [{"kind": "note", "text": "last"}]


def test_a_row_that_does_not_fit_is_removed_again(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write({"kind": "note", "i": 0})
        with files_end_at(4096), pytest.raises(InputError) as raised:
            metrics.write({"kind": "note", "i": 1, "text": "x" * 5000})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "note", "i": 0}\n'
        metrics.write({"kind": "note", "i": 2})
    path = tmp_path / "metrics.jsonl"
    assert str(raised.value) == (
        f"could not write '{path}': File too large; the rows written so far are kept and the run can be resumed"
    )
    assert [row["i"] for row in read_metrics(tmp_path)] == [0, 2]


def test_replacing_a_file_on_a_full_disk(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for kept in ("nothing was left behind", "the previous file is untouched"):
        with (
            files_end_at(1024),
            pytest.raises(InputError, match=rf"^could not write '.*a.txt': File too large; {kept}$"),
            replacing(path) as temporary,
        ):
            temporary.write_text("x" * 5000)
        if kept.startswith("nothing"):
            assert os.listdir(tmp_path) == []
            with replacing(path) as temporary:
                temporary.write_text("whole")
    assert path.read_text() == "whole" and os.listdir(tmp_path / "new") == ["a.txt"]


def abandoned(folder):
    """A process that is killed while it writes a file of each kind."""
    program = f"""
import os, signal, threading
from pathlib import Path
from cpr_fast.runtime.files import replacing, temporary_folder
with replacing({str(folder / "a.txt")!r}) as file, temporary_folder({str(folder)!r}) as other:
    file.write_text("half"), (other / "b").write_text("half")
    print("written", flush=True)
    threading.Event().wait()
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("writer", ["replacing", "temporary_folder"])
def test_what_a_killed_process_leaves_is_removed_and_what_a_running_one_writes_is_kept(tmp_path, writer):
    def write():
        _remove_abandoned.cache_clear()  # as in another process
        if writer == "replacing":
            with replacing(tmp_path / "c.txt") as temporary:
                temporary.write_text("whole")
        else:
            with temporary_folder(tmp_path):
                pass

    process = abandoned(tmp_path)
    assert process.stdout.readline() == "written\n"
    write()
    assert len([name for name in os.listdir(tmp_path) if name.startswith(TEMPORARY)]) == 2
    process.kill()
    process.communicate()
    write()
    assert set(os.listdir(tmp_path)) <= {"c.txt"}


def test_threads_that_replace_one_file_leave_one_of_their_whole_files(tmp_path):
    def write(number):
        with replacing(tmp_path / "a.txt", durable=True) as temporary, open(temporary, "w") as file:
            for _ in range(100):
                file.write(f"{number}\n")
                file.flush()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    lines = (tmp_path / "a.txt").read_text().split()
    assert len(lines) == 100 and len(set(lines)) == 1 and os.listdir(tmp_path) == ["a.txt"]


def test_names_as_long_as_the_file_system_allows(tmp_path):
    for name in ("a" * 251 + ".txt", "a." + "b" * 253, "é" * 125 + ".txt"):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), naming(tmp_path / "a", "nothing"):
        raise PermissionError(errno.EACCES, "Permission denied", "/etc/what the block reads")
    with pytest.raises(ValueError, match="own"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError("own")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("raised", [InputError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=repr)
@pytest.mark.parametrize("write", ["created", "replacing", "one_writer", "RecordWriter"])
def test_a_block_that_fails_leaves_no_folder(tmp_path, write, raised):
    """Whatever creates a folder removes it again; folders that were there before, and what is in them, stay."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    folder = tmp_path / "old" / "new" / "deep"
    block = {
        "created": lambda: created(folder),
        "replacing": lambda: replacing(folder / "file"),
        "one_writer": lambda: one_writer(folder / ".lock", "held"),
        "RecordWriter": lambda: RecordWriter(folder / "flow.lmdb"),
    }[write]
    with pytest.raises((type(raised), InputError)), block() as path:
        if isinstance(path, Path):
            path.write_text("unfinished")
        raise raised
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(KeyboardInterrupt), block():
        (folder / "kept").write_text("work that was done")
        raise KeyboardInterrupt
    assert (folder / "kept").exists()


def test_threads_that_fail_in_the_same_new_folder_leave_none_of_it(tmp_path):
    def fail(number: int) -> None:
        with pytest.raises(ValueError, match="refused"), replacing(tmp_path / "new" / "deep" / f"{number % 3}.txt"):
            raise ValueError("refused")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fail, range(400)))
    assert not list(tmp_path.iterdir())


def failing(folder):
    """A process that creates a folder and removes it again many times, as a command that refuses its input does."""
    program = f"""
from contextlib import suppress
from pathlib import Path
from cpr_fast.runtime.files import replacing
for _ in range(1000):
    with suppress(ValueError), replacing(Path({str(folder / "refused")!r})):
        raise ValueError
"""
    return subprocess.Popen([sys.executable, "-c", program])


@pytest.mark.parametrize("write", ["replacing", "one_writer", "LineFile", "temporary_folder"])
def test_a_folder_that_another_process_removes_is_created_again(tmp_path, write):
    """The other process may remove an empty folder at any moment before the first file is in it."""
    folder = tmp_path / "new" / "deep"

    def use():
        if write == "replacing":
            with replacing(folder / "a") as temporary:
                temporary.write_text("whole")
            (folder / "a").unlink()
        elif write == "one_writer":
            with one_writer(folder / ".lock", None):
                pass
        elif write == "LineFile":
            LineFile(folder / "lines").close()
        else:
            with temporary_folder(folder) as temporary:
                (temporary / "a").write_text("whole")

    other = failing(folder)
    while other.poll() is None:
        use()
        with suppress(OSError):
            folder.rmdir()
    assert other.returncode == 0


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "file")
    for path in (tmp_path / "nowhere" / "a", tmp_path / "nowhere"):
        with pytest.raises((FileNotFoundError, FileExistsError)):
            LineFile(path)


def test_a_temporary_folder_that_another_process_takes_for_abandoned_is_made_again(tmp_path, monkeypatch):
    """Between its creation and its lock, a process that starts to write beside it may remove it."""
    real, taken = fcntl.flock, []

    def flock(descriptor, operation):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].rmdir()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with temporary_folder(tmp_path) as folder:
        assert taken == [folder] and folder.is_dir()
    assert not list(tmp_path.iterdir())
