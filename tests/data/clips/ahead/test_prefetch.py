"""Loaders with a disk cache: the same clips, few bytes, and no failure that is not named."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from support.data_sets.clips import assert_same_batches
from support.data_sets.tar_files import write_tar
from support.machine.full_disk import files_end_at
from support.machine.new_process import as_a_new_process
from support.videos.odd_videos import pictures

pytest.importorskip("fsspec", reason="fsspec is an extra: pip install fsspec aiohttp")
pytest.importorskip("aiohttp", reason="aiohttp is an extra: pip install fsspec aiohttp")
pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")

from support.data_sets.served_clips import on_server, open_loader

from cpr_fast.data.clips.ahead.future import Future
from cpr_fast.data.clips.ahead.prefetch import AHEAD
from cpr_fast.data.clips.sampling import plan_pairs
from cpr_fast.data.files import remote
from cpr_fast.data.files.cached import store
from cpr_fast.data.files.cached.store import BLOCK
from cpr_fast.data.files.names import member_path
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.files.tar import members
from cpr_fast.data.index.index import Index, Video
from cpr_fast.errors import InputError

EPOCHS = 3


def batches(loader, epochs=range(EPOCHS), start_step: int = 0) -> list:
    """Returns all batches of some epochs, the first one from `start_step` on, and closes the loader."""
    found = []
    for epoch in epochs:
        found += loader.epoch(epoch, start_step)
        start_step = 0
    loader.close()
    return found


def write_long(path: Path, **options) -> Video:
    """Writes a video of 5 s, of several blocks a second."""
    codec, shape = options.pop("codec", "libx264"), (64, 96)
    with av.open(str(path), "w", options=options.pop("container", {})) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *shape, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, frame in enumerate(pictures(120, *shape)):
            noise = np.random.default_rng(number).integers(0, 150, frame.shape).astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame // 2 + noise, format="rgb24")))
        output.mux(stream.encode(None))
    return Video(path, "a", path.name, "train", 120, 25.0, shape[1], shape[0], None)


@pytest.mark.parametrize("mib", [64, 0.13, 0.02])
def test_the_clips_are_those_of_local_files(index, server, tmp_path, mib):
    """The cache holds everything; about a fifth; a single block."""
    loader = open_loader(on_server(index, server), tmp_path, mib)
    assert_same_batches(batches(loader), batches(open_loader(index)))
    counts = loader._ahead.cache.counts
    assert (counts["missed"], counts["failed"], counts["damaged"]) == (0 if mib > 0.1 else counts["missed"], 0, 0)
    assert (tmp_path / "process-0" / "blocks").stat().st_size <= mib * 2**20
    if mib == 64:  # every file once
        assert server.sent.total() == counts["fetched"] == sum(map(len, server.files.values()))


FORMATS = [
    ("a.mp4", {"g": "50", "bf": "2"}),  # the table of frames is at the end of the file
    ("b.mp4", {"g": "10", "bf": "0", "container": {"movflags": "faststart"}}),
    ("c.mkv", {"g": "25", "bf": "2"}),
    ("d.avi", {"codec": "mjpeg"}),
    ("e.avi", {"codec": "mpeg4", "g": "20"}),
]


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("long")
    return Index([write_long(folder / name, **dict(options)) for name, options in FORMATS])


def test_of_a_known_file_only_the_bytes_of_the_clips_are_fetched(long_videos, server, tmp_path):
    near = Index([video for video in long_videos for _ in range(3)])
    videos = []
    for i, video in enumerate(near):
        name = f"/{i}{video.path.name}"
        server.files[name] = video.path.read_bytes()
        videos.append(dataclasses.replace(video, path=Path(server.url + name)))
    mib, options = (
        0.6 * sum(map(len, server.files.values())) / 2**20,
        {"views": ("rgb",), "batch_size": 1, "prefetch": 1},
    )
    loader = open_loader(Index(videos), tmp_path, mib, **options)
    first = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    before, sent, early = loader._ahead.cache.counts.copy(), server.sent.copy(), range(2, 4)
    assert_same_batches(first + batches(loader, early), batches(open_loader(near, **options), range(4)))
    counts = loader._ahead.cache.counts
    assert counts["missed"] == before["missed"]  # all bytes that FFmpeg asked for were foreseen
    for name, data in server.files.items():  # pairs of clips of 4 frames, which FFmpeg reads in one pass
        assert len(data) > 10 * BLOCK or name.endswith("e.avi")
        assert server.sent[name] - sent[name] <= len(early) * len(data)
    assert 0 < counts["fetched"] - before["fetched"] < 0.6 * (counts["read"] - before["read"])
    again = open_loader(Index(videos), tmp_path / "empty", mib, **options)  # as the next cycle of a schedule
    assert len(batches(again, [6])) == len(near) and again._ahead.cache.counts["missed"] == 0
    assert again._ahead.cache.counts["fetched"] < 0.8 * sum(map(len, server.files.values()))


def plain_fetches(index: Index, loader_options: dict, slots: int, epochs: int) -> int:
    """Returns how many of some videos of one block each are fetched: a simulation with sets, in which a step is planned
    when the reader is AHEAD steps before it, and all steps up to `prefetch` + 1 before that are complete."""
    data = open_loader(index, **loader_options)
    data.close()
    options = {"seed": 5, "rank": 0, "world_size": loader_options["world_size"]}
    future = Future(index, data._sources, data._data, ("rgb",), plan_pairs, **options)
    steps = [[read.item for read in future.reads(t)] for t in range((epochs + 1 + future.epochs) * future.steps)]
    window, held, fetches = AHEAD + data._data.prefetch, set(), 0

    def next_use(video: int, step: int) -> int:
        known = (step // future.steps + future.epochs) * future.steps
        return next((t for t in range(step, min(known, len(steps))) if video in steps[t]), 10**9)

    for t in range(epochs * future.steps + AHEAD):  # the loader cannot know that no further epoch follows
        pinned = {video for earlier in steps[max(0, t - window) : t] for video in earlier} & held
        for video in steps[t]:
            if video not in held:
                free = held - pinned - set(steps[t][: steps[t].index(video) + 1])
                if len(held) == slots:
                    if not free:
                        continue
                    held.remove(min(free, key=lambda v: (-next_use(v, t), v)))
                held.add(video)
                fetches += 1
            pinned.add(video)
    return fetches


@pytest.mark.parametrize(("slots", "world_size", "epochs"), [(9, 1, 3), (25, 1, 4), (33, 4, 14)])
def test_the_video_that_is_needed_last_leaves(index, server, tmp_path, slots, world_size, epochs):
    data = index[3].path.read_bytes()
    assert len(data) < BLOCK
    videos = []
    for i in range(40):
        name = f"/{i}{index[3].path.suffix}"
        server.files[name] = data
        videos.append(dataclasses.replace(index[3], path=Path(server.url + name), source=f"{i}"))
    far = Index(videos)
    options = {"views": ("rgb",), "batch_size": 1, "prefetch": 1, "workers": 1, "world_size": world_size}
    loader = open_loader(far, tmp_path, slots * BLOCK / 2**20, **options)
    simulated = len(data) * plain_fetches(far, options, slots, epochs)
    for epoch in range(epochs):
        for _ in loader.epoch(epoch):
            pass
    until = time.monotonic() + 10
    while loader._ahead.cache.counts["fetched"] < simulated and time.monotonic() < until:
        time.sleep(0.01)
    loader.close()
    assert server.sent.total() == loader._ahead.cache.counts["fetched"] == simulated


def test_a_run_that_is_resumed_uses_what_is_there(index, server, tmp_path):
    far = on_server(index, server)
    whole = batches(open_loader(far, tmp_path, rank=0, world_size=1))
    as_a_new_process()
    server.sent.clear()
    loader = open_loader(far, tmp_path)
    assert_same_batches(batches(loader, range(1, EPOCHS), start_step=1), whole[3:])
    assert not server.sent and loader._ahead.cache.counts["missed"] == 0
    assert len(whole) == 2 * EPOCHS
    as_a_new_process()
    server.files["/v0.mp4"] += bytes(9)  # another version: what follows the last box of an MP4 is ignored
    assert_same_batches(batches(open_loader(far, tmp_path)), whole)
    assert server.sent == {"/v0.mp4": len(server.files["/v0.mp4"])}
    as_a_new_process()
    blocks = tmp_path / "process-0" / "blocks"
    blocks.write_bytes(bytes(blocks.stat().st_size))  # all is damaged
    server.sent.clear()
    loader = open_loader(far, tmp_path)
    assert_same_batches(batches(loader), whole)
    assert loader._ahead.cache.counts["damaged"] > 0 and server.sent.total() > 0


def test_a_block_number_of_which_a_bit_has_changed_is_discarded_by_name(index, server, tmp_path, caplog):
    far = on_server(index, server)
    whole = batches(open_loader(far, tmp_path))
    as_a_new_process()
    records = np.fromfile(tmp_path / "process-0" / "records", store.RECORD)
    slot = int(np.flatnonzero(records["length"])[4])
    records["block"][slot] ^= 2**27  # gigabytes of state for the blocks before it
    records.tofile(tmp_path / "process-0" / "records")
    server.sent.clear()
    loader = open_loader(far, tmp_path)
    assert max(len(item.slots) for item in loader._ahead._belady.items.values()) < 1000
    (text,) = [record.getMessage() for record in caplog.records if "cannot be true" in record.getMessage()]
    assert "1 record in" in text and f"block {records['block'][slot]:,} of {server.url}/v" in text
    assert_same_batches(batches(loader), whole)
    assert len(server.sent) == 1 and loader._ahead.cache.counts["missed"] == 0


def test_of_a_server_that_states_no_version_nothing_is_used_by_a_later_process(index, server, tmp_path, monkeypatch):
    server.tags = False
    far, changed = on_server(index, server), f"/{index[0].path.name}"
    loader = open_loader(far, tmp_path, views=("rgb",))
    batches(loader)
    assert loader._ahead.cache.counts["missed"] == 0  # the process itself uses it
    as_a_new_process()
    monkeypatch.setattr(store, "THIS_PROCESS", bytes(16))
    half = len(server.files[changed]) // 2
    server.files[changed] = server.files[changed][:-half] + bytes(half)  # of the same size
    server.sent.clear()
    loader = open_loader(far, tmp_path, views=("rgb",))
    batches(loader)
    assert [path.name for path, _ in loader.skipped] == [changed[1:]] and len(server.sent) == len(far)
    assert loader._ahead.cache.counts["damaged"] == 0


def test_one_process_and_four_read_the_same_clips_of_a_global_batch(index, server, tmp_path):
    far, near = on_server(index, server), index
    for epoch in range(2):
        options = {"batch_size": 8, "views": ("rgb",)}
        (whole,) = batches(open_loader(near, **options), [epoch])
        options["batch_size"] = 2
        parts = [
            batches(open_loader(far, tmp_path, 0.2, rank=rank, world_size=4, **options), [epoch])[0]
            for rank in range(4)
        ]
        for name in ("video", "start", "plan"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert torch.equal(torch.cat([part.clips["rgb"] for part in parts]), whole.clips["rgb"])


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ([403], "the server refuses it (403): has the URL expired"),
        (["cut"], "could not be read in 4 attempts; the last: "),
        ([503], "could not be read in 4 attempts; the last: the server answered 503"),
        (["slow"], "could not be read in 4 attempts; the last: no answer in 0.1 s"),
    ],
)
def test_an_object_that_cannot_be_read_is_named_and_replaced(index, server, tmp_path, faults, reason, monkeypatch):
    monkeypatch.setattr(remote, "ANSWER_S", 0.1)
    server.slow_s = 0.2
    far = on_server(index, server)
    server.faults["/v3.avi"] = faults
    expected = batches(open_loader(far, views=("rgb",)), range(1))
    as_a_new_process()
    loader = open_loader(far, tmp_path, views=("rgb",))
    found = batches(loader, range(1))
    assert_same_batches(found, expected)
    assert 3 not in {video for batch in found for video in batch.video.tolist()}
    ((path, why),) = loader.skipped
    assert path.name == "v3.avi" and why.startswith(reason)


def test_failures_that_pass_change_nothing(index, server, tmp_path):
    far = on_server(index, server)
    server.faults = {f"/{v.path.name}": [503, "cut", 500, None] for v in index}
    loader = open_loader(far, tmp_path)
    assert_same_batches(batches(loader), batches(open_loader(index)))
    assert not loader.skipped and loader._ahead.cache.counts["failed"] == 0


def test_a_server_that_ignores_ranges_is_named(long_videos, server, tmp_path):
    far = on_server(long_videos, server)
    server.ranges = False
    loader = open_loader(far, tmp_path, 0.02, views=("rgb",))  # no room for whole files
    with pytest.raises(InputError, match="ignores requests for ranges"):
        batches(loader)
    loader.close()


def test_members_of_tar_files_that_are_cut_off_or_missing_are_named(index, server, tmp_path):
    contents = [(f"{i}.mp4", video.path.read_bytes()) for i, video in enumerate(index)]
    contents.insert(4, ("0.mp4", index[0].path.read_bytes()))  # a key that comes twice
    shard = write_tar(tmp_path / "s.tar", contents)
    server.files["/s.tar"] = shard.read_bytes()
    found = list(members(Path(f"{server.url}/s.tar")))
    del found[4]
    far = Index([dataclasses.replace(v, path=member_path(m)) for v, m in zip(index, found, strict=True)])
    options = {"views": ("rgb",)}
    expected = batches(open_loader(index, **options))
    loader = open_loader(far, tmp_path / "c", **options)
    assert_same_batches(batches(loader), expected)
    assert loader._ahead.cache.counts["missed"] == 0
    as_a_new_process()
    server.sent.clear()
    assert_same_batches(batches(open_loader(far, tmp_path / "c", **options)), expected)
    assert not server.sent
    as_a_new_process()
    server.files["/s.tar"] = server.files["/s.tar"][: found[8].start + 99]
    loader = open_loader(far, tmp_path / "c", **options)
    batches(loader)
    reasons = {path.name: why for path, why in loader.skipped}
    assert set(reasons) == {"8.mp4", "9.mp4"} and all("is cut off" in why for why in reasons.values())
    as_a_new_process()
    server.files["/s.tar"] = write_tar(tmp_path / "t.tar", [("x", b"x"), *contents[1:]]).read_bytes()
    loader = open_loader(far, tmp_path / "c", **options)
    with pytest.raises(InputError, match="none of the 10 videos of the index can be read; .* has changed since"):
        batches(loader)
    loader.close()


def test_a_full_disk_ends_the_caching_and_nothing_else(index, server, tmp_path, caplog):
    far, expected = on_server(index, server), batches(open_loader(index))
    loader = open_loader(far, tmp_path)
    with caplog.at_level(logging.WARNING), files_end_at(3 * BLOCK):
        assert_same_batches(batches(loader), expected)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"data.disk_cache: could not write to {tmp_path / 'process-0'}: File too large; the run")
    assert not loader.skipped and loader._ahead.cache.counts["fetched_unplanned"] > 0
    as_a_new_process()
    assert_same_batches(batches(open_loader(far, tmp_path)), expected)  # what was written is used, or fetched again


def test_a_loader_that_is_dropped_in_the_middle_starts_again_anywhere(index, server, tmp_path):
    far = on_server(index, server)
    reference = batches(open_loader(index))
    loader = open_loader(far, tmp_path, 0.2)
    for epoch in (2, 0, 1):
        begun = loader.epoch(epoch)
        assert_same_batches([next(begun)], reference[2 * epoch : 2 * epoch + 1])
        begun.close()
    assert_same_batches(batches(loader), reference)


def test_local_files_and_a_path_that_is_listed_twice_may_be_among_the_videos(index, server, tmp_path):
    far = on_server(index, server)
    rows = [*far[:5], *index[5:], dataclasses.replace(far[1], source="again")]
    loader = open_loader(Index(rows), tmp_path)
    assert_same_batches(
        batches(loader), batches(open_loader(Index([*index, dataclasses.replace(index[1], source="again")])))
    )
    assert not loader.skipped and loader._ahead.cache.counts["damaged"] == 0


@pytest.mark.parametrize("views", [("rgb", "flow"), ("flow",)])
def test_of_motion_vectors_the_videos_are_fetched_and_no_stored_flow(long_videos, index, server, tmp_path, views):
    rows = [long_videos[place] for place in (0, 1, 2)]  # of a codec that has vectors
    near = Index([dataclasses.replace(row, flow_path=index[0].flow_path) for row in rows])
    far, options = on_server(near, server), {"views": views, "flow": "vectors", "batch_size": 1}
    loader = open_loader(far, tmp_path, **options)
    assert_same_batches(batches(loader), batches(open_loader(near, **options)))
    assert not server.sent[f"/{index[0].flow_path.name}"] and not loader.skipped
    counts = loader._ahead.cache.counts
    assert (counts["missed"], counts["fetched_unplanned"]) == (0, 0)
    assert counts["fetched"] == server.sent.total() == sum(len(server.files[f"/{row.path.name}"]) for row in rows)
    again = open_loader(far, tmp_path / "empty", **options)  # what was learnt of the files of RGB is not enough
    batches(again)
    assert (again._ahead.cache.counts["missed"], again._ahead.cache.counts["fetched_unplanned"]) == (0, 0)


def test_a_second_loader_of_a_process_reads_without_the_cache(index, server, tmp_path):
    far = on_server(index, server)
    first, second = open_loader(far, tmp_path), open_loader(far, tmp_path)
    assert first._ahead is not None and second._ahead is None
    reference = batches(open_loader(index))
    begun = first.epoch(0)
    found = [next(begun)]
    assert_same_batches(batches(second), reference)
    assert_same_batches(found + list(begun) + batches(first, range(1, EPOCHS)), reference)


def test_evaluation_and_local_files_need_no_cache(index, server, tmp_path):
    loader = open_loader(index, tmp_path / "none")
    assert loader._ahead is None and not (tmp_path / "none").exists()
    loader.close()
    far = on_server(index, server)
    loader = open_loader(far, tmp_path / "c", views=("rgb",))
    path = far[0].flow_path  # no view of the loader
    assert REMOTE.read_range(path, 3, 50) == server.files[f"/{path.name}"][3:53]
    assert loader.sample(1, 4).video.tolist() == [4]
    loader.close()
    with pytest.raises(InputError, match="data.disk_cache: cannot write to"):
        (tmp_path / "file").write_text("x")
        open_loader(far, tmp_path / "file")
