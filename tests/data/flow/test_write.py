"""Runs of `write_flow` that are resumed, killed or sharded, or have videos that fail."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.data_sets.flow import LONG, gray_frames, read_levels, smooth_flow, write_video

from cpr_fast.data.flow import write
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.build import build_index
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.ops import tvl1_flow
from cpr_fast.runtime.interrupt import signals_raise


def test_a_second_run_computes_nothing(data_set, tmp_path):
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    before = data_set.read_text()

    def refuse(frames):
        raise AssertionError("computed again")

    report = write_flow(data_set, tmp_path / "flow", compute=refuse)
    assert (report["written"], report["kept"]) == (0, 5) and data_set.read_text() == before


def test_a_file_of_the_wrong_length_is_made_again(data_set, tmp_path):
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    videos = {video.num_frames: video for video in Index.load(data_set)}
    os.replace(
        videos[6].flow_path, videos[9].flow_path
    )  # one file has 5 fields instead of 8, one has none instead of 5
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (2, 3)
    assert len(read_levels(videos[9].flow_path, 48)) == 8


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_at_the_same_time_are_the_whole(count, data_set, tmp_path):
    whole = write_flow(data_set, tmp_path / "whole", compute=smooth_flow)

    def run(i):
        return write_flow(data_set, tmp_path / "flow", compute=smooth_flow, shard=(i, count))

    with ThreadPoolExecutor(count) as pool:
        reports = list(pool.map(run, range(count)))
    assert sum(report["written"] for report in reports) == whole["written"] == 5
    files = {path.relative_to(tmp_path / "flow"): path.read_bytes() for path in (tmp_path / "flow").rglob("*.mp4")}
    assert files == {
        path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*.mp4")
    }
    assert all("whole" not in video.flow_path.parts and video.flow_path.is_file() for video in Index.load(data_set))


def test_a_killed_run_leaves_no_half_file_and_is_continued(data_set, tmp_path):
    """The process is killed without any clean-up while it encodes its third video."""
    script = f"""
        import os, sys
        sys.path.insert(0, "tests")
        from pathlib import Path
        from cpr_fast.data.flow import write as flow
        from support.data_sets.flow import smooth_flow
        replace, done = os.replace, []
        def die_at_the_third(source, target):
            if len(done) == 2 and str(target).endswith(".flow.mp4"):
                os._exit(9)
            done.append(target)
            replace(source, target)
        os.replace = die_at_the_third
        flow.write_flow({str(data_set)!r}, {str(tmp_path / "flow")!r}, compute=smooth_flow)
    """
    root = Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root)
    assert killed.returncode == 9
    complete = list((tmp_path / "flow").rglob("*.flow.mp4"))
    assert len(complete) == 2 and all(len(read_levels(path, 48)) for path in complete)
    assert all(video.flow_path is None for video in Index.load(data_set))
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert (report["written"], report["kept"]) == (3, 2)
    assert not list(tmp_path.rglob(".*"))
    assert all(video.flow_path is not None for video in Index.load(data_set))


def test_a_stopped_run_leaves_an_index_that_lists_the_flow_it_stored(data_set, tmp_path):
    """`init` and `pretrain` read the index: without this they would take stored flow for missing."""
    calls = []

    def stopped(frames):
        calls.append(len(frames))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return smooth_flow(frames)

    with pytest.raises(KeyboardInterrupt):
        write_flow(data_set, tmp_path / "flow", compute=stopped)
    stored = set((tmp_path / "flow").rglob("*.flow.mp4"))
    listed = {video.flow_path.resolve() for video in Index.load(data_set) if video.flow_path}
    assert listed == stored and 0 < len(listed) < 5
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert report["kept"] == len(stored) and report["without_flow"] == 0


@pytest.mark.usefixtures("signals_as_in_a_terminal")
def test_a_request_to_stop_ends_the_solving_and_says_what_is_kept(data_set, tmp_path):
    """The batch that was being computed took 32 s on a busy machine. Here one would take hours."""
    began, errors = threading.Event(), []

    def endless(pairs):
        if pairs.shape[-1] == 49:  # the last batch
            began.set()
            try:
                return tvl1_flow(pairs.repeat(1, 1, 20, 20), warps=1000, epsilon=0.0).squeeze(1)
            except RuntimeError as error:
                errors.append(str(error))
                raise
        return smooth_flow(pairs)

    def stop():
        began.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as stopped, signals_raise():
        write_flow(data_set, tmp_path / "flow", compute=endless)
    thread.join()
    stored = len(list((tmp_path / "flow").rglob("*.flow.mp4")))
    assert errors and set(errors) == {"tvl1_flow: stopped"}
    has = f"{stored} of 5 videos {'has' if stored == 1 else 'have'} complete flow, which is kept"
    assert stopped.value.__notes__ == [has if stored else "none of 5 videos has complete flow yet"]
    assert write_flow(data_set, tmp_path / "flow")["kept"] == stored  # flow can be computed again


@pytest.mark.parametrize("stage", ["pack", "join"])
def test_a_request_to_stop_between_two_pools_of_threads_ends_both(data_set, tmp_path, monkeypatch, stage):
    """The solver went on after a request that came while solved frame pairs were joined, for hours if they were large:
    once in about 100 requests."""
    ordinary, running = getattr(write, stage), set(threading.enumerate())

    def interrupted(items, *arguments):
        for number, item in enumerate(ordinary(items, *arguments)):
            if number == 1:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(write, stage, interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:  # keeps the generators alive, as a traceback does
        write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert stopped.traceback and set(threading.enumerate()) <= running


def test_the_count_of_the_progress_line_is_that_of_the_stored_videos(data_set, tmp_path, monkeypatch):
    """It was 0/36 for most of a run, because finished videos waited for those before them and for the next batch."""
    shown, seen = [], []

    def tracked(items, *_arguments, done, **_options):
        shown.append(done)
        yield from items

    def waiting(pairs):
        if pairs.shape[-1] == 49:  # the last batch: all other videos can be stored before it
            for _ in range(6000):
                if shown[0]() == 4:
                    break
                time.sleep(0.01)
            seen.append((shown[0](), len(list((tmp_path / "flow").rglob("*.flow.mp4")))))
        return smooth_flow(pairs)

    monkeypatch.setattr(write, "track", tracked)
    write_flow(data_set, tmp_path / "flow", compute=waiting)
    assert seen == [(4, 4)] and shown[0]() == 5


def test_the_index_is_filled_during_the_run(data_set, tmp_path, monkeypatch):
    """A run that is killed, or is still running, has filled the index before."""
    monkeypatch.setattr("cpr_fast.data.flow.write.REFILL_S", 0.0)
    seen = []

    def looked(frames):
        seen.append(sum(video.flow_path is not None for video in Index.load(data_set, require_flow=False)))
        return smooth_flow(frames)

    write_flow(data_set, tmp_path / "flow", compute=looked)
    assert max(seen) > 0


def test_a_failure_while_encoding_stops_the_run_and_leaves_no_half_file(data_set, tmp_path, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(InputError, match="^could not write '.*flow.mp4': No space left .*; complete flow is kept"):
        write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert not [path for path in (tmp_path / "flow").rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert write_flow(data_set, tmp_path / "flow")["written"] == 5  # flow can be computed again


def test_videos_that_cannot_be_read_are_skipped_by_name(data_set, tmp_path):
    videos = {video.num_frames: video for video in Index.load(data_set)}
    videos[6].path.write_bytes(b"not a video any more")
    videos[9].path.write_bytes(videos[LONG].path.read_bytes()[:400])
    write_video(videos[5].path, 4, width=49)
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert report["written"] == 2
    named = {row["path"]: row["reason"] for row in report["problems"]}
    assert named.keys() == {str(videos[n].path) for n in (5, 6, 9)} and report["counts"] == {"broken": 3}
    assert "holds 4 frames, the index says 5: correct its row" in named[str(videos[5].path)]
    with_flow = {video.num_frames for video in Index.load(data_set) if video.flow_path}
    assert with_flow == {2, LONG}


def test_a_single_frame_has_no_flow(tmp_path):
    write_video(tmp_path / "A" / "one.mkv", 1)
    write_video(tmp_path / "A" / "two.mkv", 2)
    build_index(tmp_path, out=tmp_path / "index.csv")
    report = write_flow(tmp_path / "index.csv", tmp_path / "flow", compute=smooth_flow)
    assert [row["reason"] for row in report["problems"]] == ["has a single frame: no flow"]
    assert report["counts"] == {"too_short": 1}


def test_one_video_whose_flow_fails_stops_nothing_and_is_tried_again(data_set, tmp_path, caplog):
    """The other videos have frame pairs in the batches that fail."""
    videos = {video.num_frames: video for video in Index.load(data_set)}
    bad = gray_frames(videos[9].path)[4]

    def fail(pairs):
        if any(torch.equal(pair[0], bad) for pair in pairs if pair[0].shape == bad.shape):
            raise RuntimeError("no convergence")
        return smooth_flow(pairs)

    report = write_flow(data_set, tmp_path / "flow", compute=fail)
    lost = [row["path"] for row in report["problems"]]
    assert str(videos[9].path) in lost and report["counts"] == {"failed": len(lost)} and len(lost) < 4
    assert report["problems"][0]["reason"] == "RuntimeError: no convergence"
    assert (
        f"no flow of {lost[0]}: RuntimeError" in caplog.text and len(caplog.records) == 1
    )  # one line per kind of problem
    assert {str(video.path) for video in Index.load(data_set) if video.flow_path is None} == set(lost)
    again = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert (again["written"], again["kept"], again["problems"]) == (len(lost), 5 - len(lost), [])


def test_nothing_that_works_is_bad_input(data_set, tmp_path):
    def fail(pairs):
        raise RuntimeError("the device is gone")

    with pytest.raises(
        InputError, match="none of its 5 videos gave flow; the first: .*RuntimeError: the device is gone"
    ):
        write_flow(data_set, tmp_path / "flow", compute=fail)


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 0)])
def test_an_impossible_shard_is_named(shard, data_set, tmp_path):
    with pytest.raises(InputError, match="--shard: expected i/n"):
        write_flow(data_set, tmp_path / "flow", compute=smooth_flow, shard=shard)


@pytest.mark.parametrize("storage", ["video", "lmdb"])
def test_two_processes_never_write_the_same_flow(data_set, tmp_path, storage):
    """While one run is writing, a second one is refused without affecting it; a run of another shard is allowed."""
    out, refused = tmp_path / ("flow" if storage == "video" else "flow.lmdb"), []

    def compute(pairs):
        if not refused:
            with pytest.raises(InputError, match="another process"):
                write_flow(data_set, out, storage=storage, compute=smooth_flow)
            refused.append(write_flow(data_set, out, storage=storage, compute=smooth_flow, shard=(0, 2)))
        return smooth_flow(pairs)

    assert write_flow(data_set, out, storage=storage, compute=compute)["without_flow"] == 0
    assert refused[0]["written"] == 3


def test_a_mount_that_drops_ends_the_run_with_one_line(data_set, tmp_path, caplog):
    videos, disk = list(Index.load(data_set)), data_set.parent / "train"

    def compute(pairs):
        if disk.exists():
            disk.rename(tmp_path / "unmounted")
            (data_set.parent / "test").rename(tmp_path / "unmounted too")
        return smooth_flow(pairs)

    with pytest.raises(InputError, match="can no longer be opened.*is the disk or network mount"):
        write_flow(data_set, tmp_path / "flow", compute=compute)
    assert len(caplog.records) == 1
    (tmp_path / "unmounted").rename(disk)
    (tmp_path / "unmounted too").rename(data_set.parent / "test")
    assert write_flow(data_set, tmp_path / "flow", compute=smooth_flow)["without_flow"] == 0
    assert all(is_there.flow_path for is_there in Index.load(data_set)) and len(videos) == 5


@pytest.mark.parametrize(("storage", "name"), [("video", "file"), ("lmdb", "flow"), ("lmdb", "folder.lmdb")])
def test_an_impossible_out_is_named_by_its_option(data_set, tmp_path, storage, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder.lmdb").mkdir()
    with pytest.raises(InputError, match=f"^--out: expected .*{name}"):
        write_flow(data_set, tmp_path / name, storage=storage, compute=smooth_flow)


def test_a_folder_that_cannot_be_written_is_named_before_the_work(data_set, tmp_path, monkeypatch):
    monkeypatch.setattr("cpr_fast.data.flow.write.os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="is read-only.*make an index in a folder that can be written.*index VIDEOS"):
        write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert not (tmp_path / "flow").exists()
    monkeypatch.undo()
    other = tmp_path / "other" / "index.csv"  # as the message says; a copy of the index would not find the videos
    build_index(data_set.parent, out=other)
    assert write_flow(other, tmp_path / "flow", compute=smooth_flow)["without_flow"] == 0


def test_flow_files_that_are_damaged_on_the_disk_are_computed_again(data_set, tmp_path):
    """Cut, empty, of zeros, and of a codec that FFmpeg does not know."""
    write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    files = [video.flow_path for video in Index.load(data_set)]
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(whole[0][: len(whole[0]) // 2])
    files[1].write_bytes(b"")
    files[2].write_bytes(bytes(len(whole[2])))
    files[3].write_bytes(whole[3].replace(b"avc1", b"avxx"))
    report = write_flow(data_set, tmp_path / "flow", compute=smooth_flow)
    assert (report["written"], report["kept"], report["problems"]) == (4, 1, [])
    assert [file.read_bytes() for file in files] == whole
