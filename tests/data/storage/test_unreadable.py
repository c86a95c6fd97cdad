"""Files that cannot be read: one line per kind of problem, for any number of files; the run ends if the disk is
gone.
"""

import logging

import pytest

from cpr_fast.data.storage.unreadable import Unreadable, by_kind
from cpr_fast.errors import InputError


def make_files(folder, count):
    folder.mkdir()
    paths = [folder / f"v{i}.mp4" for i in range(count)]
    for path in paths:
        path.touch()
    return paths


def test_few_lines_for_many_files_of_one_kind(tmp_path, caplog):
    paths = make_files(tmp_path / "set", 1234)
    unreadable = Unreadable(paths)
    with caplog.at_level(logging.WARNING):
        for number, path in enumerate(paths):
            unreadable.add(path, f"frame {number} of 1234 does not decode")
            unreadable.add(path, "and a second time")
        unreadable.add(paths[0].with_name("other.mp4"), "holds no video stream")
    assert len(unreadable.files) == 1235
    first, *more, other = [record.getMessage() for record in caplog.records]
    assert str(paths[0]) in first and "frame 0 of 1234" in first and "holds no video stream" in other
    assert [line.split()[1] for line in more] == ["10", "100", "1000"]


def test_a_summary_has_one_line_per_kind_the_most_frequent_first():
    files = [
        ("a", "holds no video stream"),
        ("b", "frame 4 of 5 does not decode"),
        ("c", "frame 7 of 9 does not decode"),
    ]
    assert by_kind(files) == ["2 files: frame 4 of 5 does not decode: b, c", "1 file: holds no video stream: a"]
    assert by_kind([(f"v{i}", "gone") for i in range(9)]) == ["9 files: gone: v0, v1, v2 and 6 more"]
    assert by_kind([]) == []


@pytest.mark.parametrize("count", [1, 2, 65, 1000])
def test_a_disk_that_is_gone_is_noticed_at_the_first_file(tmp_path, count):
    paths = make_files(tmp_path / "mount", count)
    unreadable = Unreadable(paths)
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    with pytest.raises(
        InputError, match="files? looked for can no longer be opened.*v0.mp4.*No such file.* mount .*--resume"
    ):
        unreadable.add(paths[0], "No such file or directory")


def test_a_few_files_that_are_gone_stop_nothing(tmp_path):
    paths = make_files(tmp_path / "set", 300)
    unreadable = Unreadable(paths)
    for path in paths[:130]:
        path.unlink()
        unreadable.add(path, "No such file or directory")
    assert len(unreadable.files) == 130
