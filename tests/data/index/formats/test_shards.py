"""Tar files as WebDataset names their members: class, source and split of every sample, and what is wrong with some."""

from __future__ import annotations

import gzip
import json
import tarfile

import numpy as np
import pytest
from support.data_sets.tar_files import write_tar
from support.videos.odd_videos import write_plain

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.files.tar import members
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.catalogue import Catalogue
from cpr_fast.data.index.formats.frames import Clips
from cpr_fast.data.index.formats.shards import list_shards, shard_files
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("video") / "v.mp4", 20).read_bytes()


def listed(root) -> tuple[list[tuple[str, str, str, str]], dict[str, list[str]], str]:
    """Returns (name, label, source, split) of every video, the reasons of problems by kind, and the levels."""
    found = list_shards(root)
    problems: dict[str, list[str]] = {}
    for problem in found.problems:
        problems.setdefault(problem.kind, []).append(problem.reason)
    return sorted((v.path.name, v.label, v.source, v.split) for v in found.videos), problems, found.levels


def test_class_source_and_split_stand_beside_the_video(tmp_path):
    facts = [{"label": 3}, {"class": " walk  fast "}, {"label": "run", "source": "film", "split": "Validation"},
             {"url": "http://x/y"}]  # fmt: skip
    write_tar(tmp_path / "train-0.tar", {f"{i}.{kind}": json.dumps(fact).encode() if kind == "json" else b"video"
                                         for i, fact in enumerate(facts) for kind in ("mp4", "json")})  # fmt: skip
    write_tar(tmp_path / "test" / "a.tar", {"k.cls": b"7\n", "k.jpg": b"", "k.webm": b"v", "readme.md": b"", "no": b""})
    rows, problems, levels = listed(tmp_path)
    assert rows == [("0.mp4", "3", "train-0.tar/0", "train"), ("1.mp4", "walk fast", "train-0.tar/1", "train"),
                    ("2.mp4", "run", "film", "val"), ("3.mp4", "", "http://x/y", "train"),
                    ("k.webm", "7", "test/a.tar/k", "test")]  # fmt: skip
    assert not problems and "JSON" in levels
    assert list_shards(tmp_path).others == {".jpg": 1, ".md": 1, "no": 1}


def test_names_of_any_bytes_are_keys(tmp_path):
    names = ["a\nb/c\n.mp4", "v1.5/a b #?.mp4", "früh/\udcff.mp4", "50%d.MP4"]
    write_tar(tmp_path / "s.tar", dict.fromkeys(names, b"v"))
    assert [video.path.name for video in list_shards(tmp_path).videos] == [
        "50%d.MP4", "c\n.mp4", "\udcff.mp4", "a b #?.mp4"]  # fmt: skip
    assert [video.label for video in list_shards(tmp_path).videos] == ["", "a\nb", "früh", "v1.5"]


def test_texts_are_classes_if_they_repeat_and_captions_if_they_differ(tmp_path):
    for name, texts, labels in (
        ("c", ["a", "b", "a", "b"], ["a", "b", "a", "b"]),
        ("d", ["a", "b", "c", "d"], [""] * 4),
    ):
        pairs = [(f"{i}{suffix}", data) for i, text in enumerate(texts)
                 for suffix, data in ((".txt", text.encode()), (".avi", b"video"))]  # fmt: skip
        rows, _, levels = listed(write_tar(tmp_path / f"{name}.tar", pairs))
        assert [row[1] for row in rows] == labels
        assert ("captions" in levels) == (labels[0] == "")


def test_without_texts_the_folder_of_a_member_is_its_class(tmp_path):
    rows, _, levels = listed(write_tar(tmp_path / "x.tar", {"run/s/a.mp4": b"1", "./walk/b.mkv": b"2", "c.mp4": b"3"}))
    assert [row[:2] for row in rows] == [("a.mp4", "run"), ("b.mkv", "walk"), ("c.mp4", "")] and "folder" in levels


def test_nothing_is_lost_where_a_key_comes_twice_a_video_is_missing_or_a_text_is_wrong(tmp_path):
    write_tar(tmp_path / "a.tar", [("k.mp4", b"1"), ("k.mp4", b"22"), ("m.json", b"{}"), ("n.mp4", b"3"),
                                   ("n.json", b'{"label": [1]}'), ("o.mp4", b"4"), ("o.json", b"no JSON"),
                                   ("p.mp4", b"5"), ("p.json", b"[]"), ("k.avi", b"666")])  # fmt: skip
    write_tar(tmp_path / "b.tar", [("n.mp4", b"7")])
    rows, problems, _ = listed(tmp_path)
    assert [row[0] for row in rows] == ["k.avi", "k.mp4", "k.mp4", "n.mp4", "n.mp4", "o.mp4", "p.mp4"]
    assert len(problems["repeated_key"]) == 3 and "'n' of an earlier sample in" in problems["repeated_key"][-1]
    assert problems["no_video"] == ["holds 'm.json' (.json) without a video of this key"]
    assert len(problems["bad_text"]) == 3 and "got [1]" in problems["bad_text"][0]


def test_links_in_a_tar_file_are_counted(tmp_path):
    with tarfile.open(write_tar(tmp_path / "a.tar", {"d/a.mp4": b"1"}), "a") as archive:
        for name, kind in (("b.mp4", tarfile.LNKTYPE), ("c.mp4", tarfile.SYMTYPE), ("e", tarfile.DIRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "d/a.mp4"
            archive.addfile(entry)
    found = list_shards(tmp_path)
    assert [video.path.name for video in found.videos] == ["a.mp4"]
    assert found.others == {"links and special members": 2}


def test_of_a_tar_file_that_was_cut_off_the_whole_samples_are_indexed(tmp_path, video):
    file = write_tar(tmp_path / "s" / "a.tar", {f"{i:02}.mp4": video + bytes([i]) for i in range(4)})
    third = list(members(file))[2]
    file.write_bytes(file.read_bytes()[: third.start + third.size // 2])
    (tmp_path / "s" / "b.tar").write_bytes(b"x" * 2000)
    report = write_index(tmp_path / "s", tmp_path / "i.csv", IndexOptions("tar"))
    assert [video.path.name for video in Index.load(tmp_path / "i.csv")] == ["00.mp4", "01.mp4"]
    assert report["counts"]["damaged_shard"] == report["counts"]["unreadable_shard"] == 1
    reasons = [problem["reason"] for problem in report["problems"]]
    assert any("samples before are listed" in reason for reason in reasons)


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path):
    write_tar(tmp_path / "set" / "a" / "x.tar", {"k.mp4": b"x"})
    (tmp_path / "set" / "b").mkdir()
    for frame in range(1, 4):
        (tmp_path / "set" / "b" / f"img_{frame}.jpg").touch()
    for link, target in (("set/a/b", "set/b"), ("set/b/a", "set/a"), ("set/a/self", "set"), ("set/same", "set/a")):
        (tmp_path / link).symlink_to(tmp_path / target)
    shards = [str(path.relative_to(tmp_path / "set")) for path in shard_files(tmp_path / "set")]
    assert shards == ["a/x.tar", "b/a/x.tar", "same/x.tar"]
    (tmp_path / "set" / "a" / "x.mp4").touch()
    assert [path.parent for path in Catalogue(tmp_path / "set").paths] == [
        path.parent for path in shard_files(tmp_path / "set")
    ]
    frames = [str(path.relative_to(tmp_path / "set")) for path in Clips(tmp_path / "set").paths]
    assert frames == ["a/b", "b", "same/b"]


def test_what_is_no_tar_file_is_told_by_its_bytes(tmp_path, video):
    content = write_tar(tmp_path / "a.tar", {"a.mp4": video}).read_bytes()
    (tmp_path / "b.tar").write_bytes(gzip.compress(content))
    (tmp_path / "c.tar").write_bytes(b"<Error>AccessDenied</Error>" * 100)
    (tmp_path / "d.tar").write_bytes(b"")
    found = list_shards(tmp_path)
    packed, page, empty = (problem.reason for problem in found.problems)
    assert len(found.videos) == 1 and {problem.kind for problem in found.problems} == {"unreadable_shard"}
    assert packed.startswith("is no tar file: ") and packed.endswith("; it is a gzip archive")
    assert "; it is a text that begins with '<Error>Acc" in page and empty == "is empty"


def test_training_reads_the_clips_of_tar_files_as_those_of_files(tmp_path, video):
    videos = {f"{i:02}.mp4": video + bytes(8 * i) for i in range(8)}  # what follows the last box of an MP4 is ignored
    (tmp_path / "f").mkdir()
    for name, data in videos.items():
        (tmp_path / "f" / name).write_bytes(data)
    write_tar(tmp_path / "t" / "x.tar", videos)
    data = DataConfig(frames=8, size=32, batch_size=4, workers=2)
    batches = []
    for root, layout in (("f", "folders"), ("t", "tar")):
        write_index(tmp_path / root, tmp_path / f"{root}.csv", IndexOptions(layout))
        index = Index.load(tmp_path / f"{root}.csv")
        index = Index([type(v)(**{**vars(v), "source": v.path.name}) for v in index])
        loader = TrainLoader(index, data, ["rgb"], seed=1)
        batches.append([batch for epoch in (0, 1) for batch in loader.epoch(epoch)])
        loader.close()
    assert len(batches[0]) == 4
    for plain, packed in zip(*batches, strict=True):
        assert np.array_equal(plain.clips["rgb"], packed.clips["rgb"]) and np.array_equal(plain.plan, packed.plan)


def test_compressed_and_missing_tar_files_are_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"ROOT: expected tar files .*a.tar.gz is compressed"):
        list_shards(tmp_path)
    with pytest.raises(InputError, match="--transcode: expected videos that are files"):
        write_index(tmp_path, tmp_path / "i.csv", IndexOptions("tar", transcode=tmp_path / "t"))
    with pytest.raises(InputError, match="--splits: layout 'tar' reads the split from the tar files"):
        write_index(tmp_path, tmp_path / "i.csv", IndexOptions("tar", splits=tmp_path))
    with pytest.raises(InputError, match="ROOT: --layout tar expects a file that ends in .tar"):
        write_index(tmp_path / "a.tar.gz", tmp_path / "i.csv", IndexOptions("tar"))
