"""Files with equal bytes are found, compared with a comparison of all pairs of files; and few files are read."""

from __future__ import annotations

from pathlib import Path

from cpr_fast.data.storage import copies
from cpr_fast.data.storage.copies import END, originals


def test_originals_are_those_of_all_pairs(tmp_path):
    long = bytes(range(256)) * (END // 128)
    contents = {
        "a": long, "b": long[:-1] + b"x", "c": b"y" + long[1:], "d": long, "e": b"", "f": b"", "g": b"short", "h": long,
    }  # fmt: skip
    files = [tmp_path / name for name in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "g")
    files.append(tmp_path / "link")
    read = [file.read_bytes() for file in files]
    assert originals(files, [0] * len(files)) == [read.index(content) for content in read]
    assert originals(files[:4], [0, 0, 0, 1]) == [0, 1, 2, 3]  # videos of another length are not copies


def test_files_that_cannot_be_read_and_records_have_no_copies(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    record = Path("data.lmdb#A/v")
    files = [tmp_path / "gone", tmp_path / "a", tmp_path / "gone", record, record, tmp_path]
    assert originals(files, [0] * len(files)) == list(range(len(files)))
    assert originals([], []) == []


def test_only_files_of_equal_sizes_and_ends_are_read_whole(tmp_path, monkeypatch):
    whole = []
    content = copies._content
    monkeypatch.setattr(copies, "_content", lambda path: whole.append(path.name) or content(path))
    for name, written in (("a", b"1234"), ("b", b"1235"), ("c", b"12345"), ("d", b"1235")):
        (tmp_path / name).write_bytes(written)
    assert originals([tmp_path / name for name in "abcd"], [0] * 4) == [0, 1, 2, 1]
    assert whole == ["b", "d"]
