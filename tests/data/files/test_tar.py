"""Members of tar files: listed, found where their path says, decoded as the same bytes in a file, and named if not."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.data_sets.tar_files import write_tar
from support.videos.odd_videos import write_plain

from cpr_fast.data.files.access import ffmpeg_input, storage_of
from cpr_fast.data.files.local import LocalStorage
from cpr_fast.data.files.names import Member, is_remote, member_of, member_path, path_of, text_of
from cpr_fast.data.files.ranges import FIRST_BYTES, MOST_BYTES, RangeFile
from cpr_fast.data.files.tar import TAR, members
from cpr_fast.data.video.container import VideoError, open_video
from cpr_fast.data.video.decode import read_frames
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.doctor.parity import decode_linearly
from cpr_fast.errors import InputError


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_reads(tmp_path, form):
    long = "d" * 90 + "/" + "e" * 60 + ".mp4"
    contents = {"./a.mp4": b"abc", "b/c d.mp4": b"x" * 1000, long: b"yz", "0": b""}
    if form != tarfile.USTAR_FORMAT:
        contents["früh.mp4"] = b"1234567"
    file = write_tar(tmp_path / "one, two: #3.tar", contents, format=form)
    found = list(members(file))
    assert [member.name for member in found] == ["a.mp4", *list(contents)[1:]]
    for member, data in zip(found, contents.values(), strict=True):
        path = member_path(member)
        assert member_of(path) == member and path.name == Path(member.name).name
        assert storage_of(path).size(path) == len(data)
        assert storage_of(path).read_range(path, 0, 10**6) == data
        assert storage_of(path).read_range(path, 1, 2) == data[1:3]
        with storage_of(path).open(path) as opened:
            assert opened.read() == data


def test_of_archives_that_were_appended_to_one_another_all_members_are_listed(tmp_path):
    first = write_tar(tmp_path / "a.tar", {"a.mp4": b"a"}).read_bytes()
    second = write_tar(tmp_path / "b.tar", {"b.mp4": b"bb"}).read_bytes()
    (tmp_path / "ab.tar").write_bytes(first + second)
    found = list(members(tmp_path / "ab.tar"))
    assert [member.name for member in found] == ["a.mp4", "b.mp4"]
    assert TAR.read_range(member_path(found[1]), 0, 9) == b"bb"


@pytest.mark.parametrize("kept", [1, 511, 512, 600, 1024, 1536, 2000, 2559, 2560])
def test_a_tar_file_that_was_cut_off_is_named_after_its_whole_members(tmp_path, kept):
    """The file has three members of 512 bytes of header and 512 of content, then the mark of its end."""
    file = write_tar(tmp_path / "whole.tar", {name: name.encode() * 512 for name in "abc"})
    cut = tmp_path / "cut.tar"
    cut.write_bytes(file.read_bytes()[:kept])
    found = []
    with pytest.raises(OSError, match="cut off|no tar file"):
        for member in members(cut):
            found.append(member)
    for member in found:
        if member.start + member.size > kept:
            with pytest.raises(OSError, match="cut off"):
                TAR.size(member_path(member))
    assert [member.name for member in found][: kept // 1024] == list("abc")[: kept // 1024]


def test_what_is_no_tar_file_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar file" * 1000)
    (tmp_path / "b.tar").write_bytes(b"")
    for name, reason in (("a.tar", "is no tar file"), ("b.tar", "is empty"), ("c.tar", "No such file")):
        with pytest.raises(OSError, match=reason):
            list(members(tmp_path / name))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_of_a_file_that_is_read_by_ranges_the_same_members_are_listed(tmp_path, monkeypatch, form):
    """A header of 1024 bytes, that of a long name, may begin in one range and end in the next."""
    contents = {"d" * 120 + f"/{i}.mp4": b"x" * (i * 7 % 5000) for i in range(200)}
    file = write_tar(tmp_path / "s.tar", contents, format=form)
    whole = list(members(file))

    class ByRanges(LocalStorage):
        def open(self, path):
            return RangeFile(self, path)

    monkeypatch.setattr("cpr_fast.data.files.tar.LOCAL", ByRanges())
    assert list(members(file)) == whole and [member.name for member in whole] == list(contents)


def test_an_empty_tar_file_has_no_members(tmp_path):
    assert list(members(write_tar(tmp_path / "s.tar", {}))) == []


def test_a_member_of_a_tar_file_decodes_to_the_frames_of_the_file(tmp_path):
    video = write_plain(tmp_path / "plain.mp4", 30)
    file = write_tar(tmp_path / "s.tar", {"k.json": b"{}", "k.mp4": video.read_bytes(), "l.mp4": b"no video"})
    _, clip, other = map(member_path, members(file))
    numbers = np.array([3, 4, 17, 29])
    for _ in range(2):  # the first read of a file finds its layout, the second uses it
        assert np.array_equal(read_frames(clip, numbers, "rgb", 30), read_frames(video, numbers, "rgb", 30))
    (taken, places), (expected, expected_places) = (slice_packets(path, numbers, 30) for path in (clip, video))
    assert np.array_equal(decode_linearly(taken), decode_linearly(expected))
    assert np.array_equal(places, expected_places)
    assert ffmpeg_input(clip) == f"subfile,,start,{1536},end,{1536 + video.stat().st_size},,:file:{file}"
    with pytest.raises(VideoError, match=r"it is a text that begins with 'no video'") as failed, open_video(other):
        pass
    assert not failed.value.unreadable


def test_a_tar_file_that_changed_since_it_was_listed_is_never_read_as_the_listed_one(tmp_path):
    contents = {"a.mp4": b"a" * 700, "b.mp4": b"b" * 700}
    file = write_tar(tmp_path / "s.tar", contents)
    path = member_path(list(members(file))[1])
    assert TAR.read_range(path, 0, 3) == b"bbb" and TAR.size(path) == 700
    changes = {
        "'c.mp4' is there": {"a.mp4": b"a" * 700, "c.mp4": b"b" * 700},
        "a member of 701 bytes": {"a.mp4": b"a" * 700, "b.mp4": b"b" * 701},
        "no member begins there": {"a.mp4": b"a" * 5000, "b.mp4": b"b" * 700},
        "is cut off": {},
    }
    for reason, changed in changes.items():
        write_tar(file, changed)
        if not changed:
            file.write_bytes(file.read_bytes()[:600])
        with pytest.raises(OSError, match=re.escape(reason)):
            TAR.version(path)
        with pytest.raises(VideoError, match=re.escape(reason)) as failed, open_video(path):
            pass
        assert failed.value.unreadable
    file.unlink()
    with pytest.raises(VideoError, match="No such file"), open_video(path):
        pass


class Counted:
    """A storage of one file that keeps the ranges that were read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.ranges = data, []

    def size(self, path: Path) -> int:
        """Returns the number of bytes."""
        return len(self.data)

    def read_range(self, path: Path, start: int, length: int) -> bytes:
        """Returns a range and keeps it."""
        self.ranges.append((start, length))
        return self.data[start : start + length]

    def held_range(self, path: Path, start: int, length: int) -> None:
        """No disk cache holds anything."""


def test_a_file_that_is_read_by_ranges_holds_the_same_bytes_in_few_requests():
    data = np.random.default_rng(0).integers(0, 256, 3 * 2**20 + 7, np.uint8).tobytes()
    storage = Counted(data)
    file = RangeFile(storage, Path("x"))
    parts = list(iter(lambda: file.read(32768), b""))
    assert b"".join(parts) == data and len(storage.ranges) == 6  # 64, 128, 256, ... kB
    assert max(length for _, length in storage.ranges) <= MOST_BYTES
    storage.ranges.clear()
    assert file.seek(-100, 2) == len(data) - 100 and file.read() == data[-100:] and file.read(5) == b""
    assert file.seek(50) == 50 and file.read(10) == data[50:60] and file.tell() == 60
    assert file.seek(-20, 1) == 40 and file.read(5) == data[40:45]
    assert storage.ranges == [(50, FIRST_BYTES), (40, FIRST_BYTES)]  # the end was still held


def test_the_paths_of_an_index_tell_files_members_and_urls_apart():
    assert is_remote("https:/host/a.mp4") and is_remote(Path("s3://bucket/a.mp4")) and is_remote("gs://b/c")
    for local in ("a/b.mp4", "/a", "c:x.mp4", "http:x.mp4", "x/s3://y.mp4", "1:/x", "s3:"):
        assert not is_remote(local)
    assert text_of(Path("s3://bucket/a b.mp4")) == "s3://bucket/a b.mp4" and text_of("x/s3:/y") == "x/s3:/y"
    assert text_of(Path("a/b")) == "a/b" and path_of("https://h:80/a?b=c%2F") == Path("https://h:80/a?b=c%2F")
    for lost in ("s3://bucket//a", "https://h/a/./b", "https://h/a/"):
        with pytest.raises(InputError, match="without an empty part"):
            path_of(lost)
    for other in ("a.tar", "a.tar#b.mp4", "a.tar#1+2", "a.tar#-1+2/b", "a.tar.gz#1+2/b"):
        assert member_of(other) is None
    assert member_of("s3:/b/s.tar#5+6/c/d.mp4") == Member(Path("s3:/b/s.tar"), 5, 6, "c/d.mp4")
