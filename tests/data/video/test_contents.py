"""A file that is no video is refused with what it is, and a video is never taken for something else."""

import re

import numpy as np
import pytest
from support.videos.odd_videos import write_plain

from cpr_fast.data.video import VideoError, read_frames
from cpr_fast.data.video.contents import what_it_is
from cpr_fast.data.video.probe import probe_video

FILES = {
    "page": (b"<!DOCTYPE html>\n<html>404 Not Found</html>", "is a text that begins with '<!DOCTYPE html>'"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "is a pointer of Git LFS"),
    "playlist": (b"#EXTM3U\n#EXTINF:5,\na.ts\n", "is a text that begins with '#EXTM3U'"),
    "umlauts": (("Übersicht ü\n" * 999).encode(), "is a text that begins with 'Übersicht ü'"),
    "zeros": (bytes(20_000), "begins with zero bytes"),
    "archive": (b"PK\3\4" + bytes(range(256)), "is a ZIP archive"),
    "metadata": (b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(4000), "is the macOS metadata of another file"),
    "noise": (bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)), ""),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_video_is_refused_with_what_it_is(tmp_path, name):
    content, what = FILES[name]
    (tmp_path / "v.mp4").write_bytes(content)
    expected = r"Invalid data found when processing input" + (f": it {re.escape(what)}" if what else "$")
    for read in (probe_video, lambda path: read_frames(path, [0], "rgb", 10)):
        with pytest.raises(VideoError, match=expected):
            read(tmp_path / "v.mp4")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_mp4_that_was_cut_short_lacks_its_table_of_frames(tmp_path, share):
    write_plain(tmp_path / "v.mp4", 20)
    content = (tmp_path / "v.mp4").read_bytes()
    assert what_it_is(tmp_path / "v.mp4") == ""
    (tmp_path / "v.mp4").write_bytes(content[: int(content.rindex(b"moov") * share)])
    with pytest.raises(VideoError, match="is an MP4 or QuickTime file without its table of frames"):
        probe_video(tmp_path / "v.mp4")


def test_a_file_that_cannot_be_read_is_not_described(tmp_path):
    assert what_it_is(tmp_path / "none.mp4") == what_it_is(tmp_path) == ""
