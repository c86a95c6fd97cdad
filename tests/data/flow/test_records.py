"""Flow as records of an LMDB file: CoCLR's format, and runs that are resumed, killed or sharded."""

import io
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from support.data_sets.flow import LEVEL, gray_frames, in_pairs, smooth_flow
from support.numbered_videos import clips_at

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.reader import fetch_frames
from cpr_fast.data.flow.levels import quantise
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.records import (
    forget_records,
    frame_size,
    open_records,
    read_jpegs,
    record_path,
    split_record,
)


def test_records_are_in_coclrs_format_and_both_storages_give_the_same_clips(data_set, tmp_path):
    """Clips from the two storages differ by the loss of H.264 and JPEG: a few levels of .157 px."""
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    files = list(Index.load(data_set))
    report = write_flow(data_set, tmp_path / "flow.lmdb", storage="lmdb", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (5, 0)
    records = list(Index.load(data_set))
    for file, record in zip(files, records, strict=True):
        assert record.flow_path.resolve() == tmp_path / f"flow.lmdb#{file.path.parent.name}" / file.path.stem
        expected = quantise(smooth_flow(in_pairs(gray_frames(file.path)))).numpy().transpose(0, 2, 3, 1)
        data = DataConfig(frames=min(4, file.num_frames - 1), size=16)
        clips = [fetch_frames(video, clips_at(video, [0]), "flow", data)[0].astype(int) for video in (file, record)]
        errors = [np.abs(clip - expected[: data.frames]) * LEVEL for clip in clips]
        assert all(error.mean() < 0.1 and error.max() < 5 * LEVEL for error in errors)
        assert np.abs(clips[0] - clips[1]).mean() * LEVEL < 0.15
    stored = open_records(tmp_path / "flow.lmdb")
    assert stored.num_frames() == {f"{v.path.parent.name}/{v.path.stem}": v.num_frames - 1 for v in records}
    picture = Image.open(io.BytesIO(stored.record("A/a_c01")[0][slice(*jpeg_span(stored, "A/a_c01", 2))]))
    expected = quantise(smooth_flow(in_pairs(gray_frames(records[0].path)))).numpy()[2]
    constant, v, u = np.asarray(picture.convert("RGB")).astype(int).transpose(2, 0, 1)  # as CoCLR's loader reads it
    assert (
        np.abs(constant - 128).max() <= 4 and np.abs(u - expected[0]).max() <= 4 and np.abs(v - expected[1]).max() <= 4
    )


def jpeg_span(records, name: str, frame: int) -> tuple[int, int]:
    offset, size = records.record(name)[1][frame].tolist()
    return offset, offset + size


def test_a_killed_run_of_records_is_continued_and_no_half_video_counts(data_set, tmp_path):
    script = f"""
        import os, sys
        sys.path.insert(0, "tests")
        from cpr_fast.data.flow import write as flow
        from cpr_fast.data.storage import record_writer
        from support.data_sets.flow import smooth_flow
        commit, done = record_writer.RecordWriter._commit, []
        def die_at_the_third(self, entries):
            if len(done) == 2:
                with self._environment.begin(write=True) as transaction:
                    for key, value in entries.items():
                        transaction.put(key, value)
                    os._exit(9)
            done.append(1)
            commit(self, entries)
        record_writer.RecordWriter._commit = die_at_the_third
        flow.write_flow({str(data_set)!r}, {str(tmp_path / "flow.lmdb")!r}, storage="lmdb", compute=smooth_flow)
    """
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root).returncode == 9
    assert not (tmp_path / "flow.lmdb").exists()
    assert all(video.flow_path is None for video in Index.load(data_set))
    report = write_flow(data_set, tmp_path / "flow.lmdb", storage="lmdb", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (3, 2)
    assert all(frame_size(video.flow_path) == (video.num_frames - 1, 32, video.width) for video in Index.load(data_set))


def test_shards_of_records_and_the_run_that_makes_one_file_of_them(data_set, tmp_path):
    def refuse(pairs):
        raise AssertionError("computed again")

    out = tmp_path / "flow.lmdb"
    for number in (1, 0):
        write_flow(data_set, out, storage="lmdb", compute=smooth_flow, shard=(number, 2))
        held = [video.flow_path and split_record(video.flow_path)[0].name for video in Index.load(data_set)]
        shards = ["flow.0-of-2.lmdb", "flow.1-of-2.lmdb"] * 3
        assert held == ([None, "flow.1-of-2.lmdb"] * 3 if number else shards)[:5]
    report = write_flow(data_set, out, storage="lmdb", compute=refuse)
    assert (report["written"], report["kept"]) == (0, 5)
    assert {split_record(video.flow_path)[0].resolve() for video in Index.load(data_set)} == {out}
    before = out.stat()
    for file in tmp_path.glob("flow.*-of-2.lmdb"):
        file.unlink()
    assert write_flow(data_set, out, storage="lmdb", compute=refuse)["kept"] == 5
    assert out.stat() == before  # there is nothing to do, so not even a copy is made


def test_a_record_that_was_missing_or_of_the_wrong_length_joins_the_finished_file(data_set, tmp_path):
    out = tmp_path / "flow.lmdb"
    videos = list(Index.load(data_set))
    content = videos[1].path.read_bytes()
    videos[1].path.write_bytes(b"")
    assert write_flow(data_set, out, storage="lmdb", compute=smooth_flow)["counts"] == {"broken": 1}
    videos[1].path.write_bytes(content)
    index = list(Index.load(data_set))
    Index([replace(index[0], num_frames=index[0].num_frames - 1), *index[1:]]).save(data_set)
    report = write_flow(data_set, out, storage="lmdb", compute=smooth_flow)
    assert (report["written"], report["kept"], report["problems"]) == (2, 3, [])
    assert all(frame_size(video.flow_path)[0] == video.num_frames - 1 for video in Index.load(data_set))


def test_a_damaged_record_of_a_shard_is_computed_again(data_set, tmp_path):
    out, whole = tmp_path / "flow.lmdb", tmp_path / "whole.lmdb"
    write_flow(data_set, whole, storage="lmdb", compute=smooth_flow)
    for number in (0, 1):
        write_flow(data_set, out, storage="lmdb", compute=smooth_flow, shard=(number, 2))
    shard = tmp_path / "flow.0-of-2.lmdb"
    name = open_records(shard).names[1]
    jpeg = bytes(read_jpegs(record_path(shard, name), [0])[0])
    data = shard.read_bytes()
    shard.write_bytes(data.replace(jpeg, jpeg[:300] + bytes([jpeg[300] ^ 1]) + jpeg[301:], 1))  # videos share it
    forget_records(shard)
    report = write_flow(data_set, out, storage="lmdb", compute=smooth_flow)
    assert (report["written"], report["kept"], report["without_flow"]) == (1, 4, 0)
    for name, frames in open_records(whole).num_frames().items():
        ours, expected = (read_jpegs(record_path(file, name), range(frames)) for file in (out, whole))
        assert [bytes(jpeg) for jpeg in ours] == [bytes(jpeg) for jpeg in expected]
