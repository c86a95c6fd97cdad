"""Batches contain the planned clips, with the right frames and boxes, bitwise equal for every way of making them."""

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_sets.clips import DATA, assert_same_batches, collect, levels, neutral, resized
from support.numbered_videos import decode_linearly, write_video

pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")

from cpr_fast.data.clips.loader import TrainLoader, plan_digests
from cpr_fast.data.clips.reader import FrameCache
from cpr_fast.data.clips.sampling import Sources, clip_frames, epoch_order, plan_labelled, plan_pairs
from cpr_fast.data.clips.stream import run_ahead
from cpr_fast.data.index.index import Index


class TestBatches:
    def test_what_a_batch_is(self, index):
        loader = TrainLoader(index, DATA, ["rgb", "flow"], seed=0)
        assert len(loader) == 2
        batches = collect(loader)
        order = epoch_order(10, 0, 0)
        for step, batch in enumerate(batches):
            assert batch.video.tolist() == order[4 * step : 4 * step + 4].tolist()
            assert batch.label.tolist() == index.labels[batch.video].tolist()
            assert batch.source.tolist() == index.source_ids[batch.video].tolist()
            for view in ("rgb", "flow"):
                assert batch.clips[view].shape == (4, 2, 3, 4, 32, 32) and batch.clips[view].dtype == torch.float32
                for clip in (0, 1):
                    assert batch.clips[view][:, clip].is_contiguous(memory_format=torch.channels_last_3d)

    @pytest.mark.parametrize("augment", ["none", "coclr"])
    def test_frames_boxes_and_flips_are_the_planned_ones(self, index, augment):
        """Compares with a linear decode and PIL: frames, both views, padding. Colour changes are not tested here."""
        data = dataclasses.replace(DATA, augment=augment, flow_colour=False)
        checked = 0
        for batch in collect(TrainLoader(index, data, ["rgb", "flow"], seed=1), epoch=2):
            plan = plan_pairs(Sources.of(index), batch.video.numpy(), data, 1, 2)
            plain = neutral(plan)
            for row in range(8):
                video, (clip, place) = index[plan.video[row]], divmod(row, 4)
                assert batch.start[place, clip] == max(0, plan.start[row])
                frames = clip_frames(plan.start[row], data)
                flow = decode_linearly(video.flow_path)[frames, ..., 0]
                u, v = flow[:, : video.height], flow[:, video.height :]
                expected = np.stack([np.full_like(u, 128), v, u], axis=-1)
                got = levels(batch.clips["flow"][place, clip])
                assert (got[..., 0].round() == 128).all()
                assert np.abs(got - resized(expected, plan.box[row], plan.flip[row], 32)).max() <= 2.01
                if plain[row]:
                    rgb = resized(decode_linearly(video.path)[frames], plan.box[row], plan.flip[row], 32)
                    assert np.abs(levels(batch.clips["rgb"][place, clip]) - rgb).max() <= 2.01
                    checked += 1
        assert checked >= 6

    def test_another_plan_gives_its_clips(self, index):
        """Training with labels uses one clip per video: frames, boxes and flips are those of `plan_labelled`."""
        checked = 0
        for batch in collect(TrainLoader(index, DATA, ["rgb"], seed=1, plan=plan_labelled)):
            assert batch.clips["rgb"].shape == (4, 1, 3, 4, 32, 32) and batch.start.shape == (4, 1)
            plan = plan_labelled(Sources.of(index), batch.video.numpy(), DATA, 1, 0)
            for row in np.nonzero(neutral(plan))[0]:
                frames = decode_linearly(index[plan.video[row]].path)[clip_frames(plan.start[row], DATA)]
                expected = resized(frames, plan.box[row], plan.flip[row], 32)
                assert np.abs(levels(batch.clips["rgb"][row, 0]) - expected).max() <= 1.01
                checked += 1
        assert checked >= 3

    def test_rgb_and_flow_share_the_draw(self, index):
        """The flow videos are the RGB videos' red channel: the clips must be the same picture."""
        checked = 0
        for batch in collect(TrainLoader(index, DATA, ["rgb", "flow"], seed=3)):
            plain = neutral(plan_pairs(Sources.of(index), batch.video.numpy(), DATA, 3, 0)).reshape(2, 4)
            for clip, place in zip(*np.nonzero(plain), strict=True):
                red = levels(batch.clips["rgb"][place, clip])[..., 0]
                _, v, u = np.moveaxis(levels(batch.clips["flow"][place, clip]), -1, 0)
                assert np.abs(red - u).mean() < 5 and np.corrcoef(red.ravel(), u.ravel())[0, 1] > 0.98
                assert np.abs(u + v - 255).mean() < 3
                checked += 1
        assert checked >= 6

    def test_one_view_alone_is_the_same_as_beside_the_other(self, index):
        both = collect(TrainLoader(index, DATA, ["rgb", "flow"], seed=0))
        for view in ("rgb", "flow"):
            for a, b in zip(both, collect(TrainLoader(index, DATA, [view], seed=0)), strict=True):
                assert torch.equal(a.clips[view], b.clips[view])

    def test_a_video_shorter_than_the_clip_repeats_frame_0_on_the_left(self, index):
        short = Index([index[3]])
        data = dataclasses.replace(DATA, batch_size=1, augment="none")
        batch = collect(TrainLoader(short, data, ["rgb"], seed=0))[0]
        assert batch.start.tolist() == [[0, 0]]
        clip = batch.clips["rgb"][0, 0]
        # 3 frames, of which 2 have flow: T = 4 shows 0 0 0 1
        assert torch.equal(clip[:, 0], clip[:, 1]) and torch.equal(clip[:, 0], clip[:, 2])
        assert not torch.equal(clip[:, 2], clip[:, 3])

    @pytest.mark.parametrize("kind", ["stride", "size"])
    def test_other_settings(self, index, kind):
        data = dataclasses.replace(DATA, **{"stride": {"stride": 2}, "size": {"size": 17, "frames": 1}}[kind])
        batch = collect(TrainLoader(index, data, ["rgb", "flow"], seed=0))[0]
        assert batch.clips["flow"].shape == (4, 2, 3, data.frames, data.size, data.size)
        assert torch.isfinite(batch.clips["rgb"]).all()

    def test_the_digest_of_a_plan_sees_every_draw_of_its_video_and_no_other(self, index):
        plan = plan_pairs(Sources.of(index), np.arange(5), DATA, 0, 3)  # M = 10
        before = plan_digests(plan, 5)
        assert before.dtype == np.int64 and len(set(before.tolist())) == 5
        assert np.array_equal(before[[4, 1]], plan_digests(plan[[4, 1, 9, 6]], 2))
        for field in dataclasses.fields(plan):
            changed = getattr(plan, field.name).copy()
            changed[7, ...] = changed[7] == 0  # of the second clip of video 2
            after = plan_digests(dataclasses.replace(plan, **{field.name: changed}), 5)
            assert (before != after).tolist() == [False, False, True, False, False], field.name

    def test_a_batch_has_the_digests_of_the_plans_of_its_videos(self, index):
        batches = [collect(TrainLoader(index, DATA, ["rgb"], seed=0), epoch=epoch) for epoch in (0, 1)]
        for epoch, made in enumerate(batches):
            for batch in made:
                plan = plan_pairs(Sources.of(index), batch.video.numpy(), DATA, 0, epoch)
                assert batch.plan.tolist() == plan_digests(plan, 4).tolist()
        first, second = (torch.cat([batch.plan for batch in made]).tolist() for made in batches)
        assert not set(first) & set(second)


class TestSameBits:
    def test_threads_and_prefetch_change_nothing(self, index):
        reference = collect(TrainLoader(index, DATA, ["rgb", "flow"], seed=5), epoch=1)
        for workers, prefetch in ((1, 1), (5, 4)):
            data = dataclasses.replace(DATA, workers=workers, prefetch=prefetch)
            assert_same_batches(collect(TrainLoader(index, data, ["rgb", "flow"], seed=5), epoch=1), reference)

    def test_the_cache_changes_nothing(self, index):
        """Clips are equal with a cache that holds every video and with one that becomes full, also in the first read
        after
        that.
        """
        plain = TrainLoader(index, dataclasses.replace(DATA, cache_gib=0), ["rgb", "flow"], seed=5)
        reference = [list(plain.epoch(epoch)) for epoch in (0, 1)]
        plain.close()
        for cache_gib in (1, 3e-4):
            loader = TrainLoader(index, dataclasses.replace(DATA, cache_gib=cache_gib), ["rgb", "flow"], seed=5)
            for epoch in (0, 1):
                assert_same_batches(list(loader.epoch(epoch)), reference[epoch])
            loader.close()

    def test_no_cache_is_filled_that_holds_less_than_a_tenth_of_the_videos(self, index, monkeypatch):
        pixels = sum(video.num_frames * video.width * video.height for video in index)
        whole = []
        monkeypatch.setattr(FrameCache, "_keep", lambda self, video, frames: whole.append(video))
        for views, channels in ((["rgb"], 3), (["rgb", "flow"], 5), (["residual"], 3)):
            for share, kept in ((0.09, False), (0.11, True)):
                data = dataclasses.replace(DATA, cache_gib=share * channels * pixels / 2**30)
                whole.clear()
                collect(TrainLoader(index, data, views, seed=5))
                assert bool(whole) == kept

    def test_batch_size_and_rank_change_nothing(self, index):
        whole = collect(TrainLoader(index, DATA, ["rgb"], seed=5))
        for world_size in (2, 4):
            data = dataclasses.replace(DATA, batch_size=4 // world_size)
            ranks = [
                collect(TrainLoader(index, data, ["rgb"], seed=5, rank=rank, world_size=world_size))
                for rank in range(world_size)
            ]
            for step, batch in enumerate(whole):
                assert torch.equal(torch.cat([r[step].clips["rgb"] for r in ranks]), batch.clips["rgb"])
                assert torch.equal(torch.cat([r[step].start for r in ranks]), batch.start)
                assert torch.equal(torch.cat([r[step].video for r in ranks]), batch.video)
                assert torch.equal(torch.cat([r[step].plan for r in ranks]), batch.plan)

    def test_resumed_in_the_middle(self, index):
        data = dataclasses.replace(DATA, batch_size=2)
        loader = TrainLoader(index, data, ["rgb", "flow"], seed=0)
        whole = list(loader.epoch(4))
        assert len(whole) == 5
        assert_same_batches(list(loader.epoch(4, start_step=3)), whole[3:])
        assert list(loader.epoch(4, start_step=5)) == []
        loader.close()

    def test_epochs_differ_and_old_batches_stay_as_they_were(self, index):
        loader = TrainLoader(index, DATA, ["rgb"], seed=0)
        kept = list(loader.epoch(0))
        copies = [batch.clips["rgb"].clone() for batch in kept]
        other = list(loader.epoch(1))
        assert not torch.equal(other[0].clips["rgb"], copies[0])
        assert all(torch.equal(batch.clips["rgb"], copy) for batch, copy in zip(kept, copies, strict=True))
        assert_same_batches(list(loader.epoch(0)), kept)
        loader.close()


class TestEnd:
    def loader_threads(self):
        return [t for t in threading.enumerate() if t.name.startswith("cpr-fast")]

    def test_no_thread_is_left_after_an_epoch_was_abandoned(self, index):
        data = dataclasses.replace(DATA, batch_size=1, prefetch=3)
        loader = TrainLoader(index, data, ["rgb"], seed=0)
        for _ in loader.epoch(0):
            break
        batches = loader.epoch(1)
        next(batches)
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
        assert len(list(loader.epoch(2))) == 10  # and it still works
        loader.close()
        loader.close()
        assert self.loader_threads() == []

    def test_an_epoch_never_started_costs_nothing(self, index):
        loader = TrainLoader(index, DATA, ["rgb"], seed=0)
        loader.epoch(0)
        assert self.loader_threads() == []
        loader.close()

    def test_errors_behind_are_raised_in_front(self):
        closed = threading.Event()

        def items():
            try:
                yield 1
                raise ValueError("behind")
            finally:
                closed.set()

        ahead = run_ahead(items(), depth=1)
        assert next(ahead) == 1
        with pytest.raises(ValueError, match="behind"):
            next(ahead)
        assert closed.is_set() and self.loader_threads() == []

    def test_an_error_while_the_items_are_closed_ends_the_thread_and_the_wait_for_it(self):
        class Items:
            """An iterator whose thread is told to stop, and fails at that."""

            def __iter__(self):
                yield 1

            def close(self) -> None:
                raise ValueError("while it closed")

        found = []

        def read() -> None:
            try:
                found.extend(run_ahead(Items(), depth=1))
            except ValueError as error:
                found.append(str(error))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(5)
        assert not reader.is_alive() and found == [1, "while it closed"] and self.loader_threads() == []


FAULTS = """
import resource
import numpy as np
from cpr_fast.data.clips.stream import ClipStream
ClipStream(None, None, workers=1, prefetch=1).close()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    frames = [np.full(2**21, 1, np.uint8) for _ in range(16)]
    del frames
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library than glibc")
@pytest.mark.parametrize("variable", [None, "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_memory_of_frames_is_used_again_unless_the_user_has_set_malloc_up(variable):
    """Counts the page faults of arrays of 32 MiB in all, 8192 pages, that are freed and allocated again."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUN"))}
    if variable is not None:
        environment[variable] = "131072" if variable.startswith("MALLOC_") else "glibc.malloc.trim_threshold=131072"
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    faults = int(done.stdout)
    assert faults < 100 if variable is None else faults > 4000


# Prints the page faults of three short epochs, after two others.
SHORT_EPOCHS = """
import resource
import sys
from pathlib import Path

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.index import Index, Video

path = Path(sys.argv[1])
copies = [path.with_name(f"{i}.mkv") for i in range(4)]
for copy in copies:
    copy.hardlink_to(path)
index = Index(Video(copy, "a", str(i), "train", 20, 25.0, 320, 240) for i, copy in enumerate(copies))
data = DataConfig(frames=16, size=16, batch_size=4, workers=1, cache_gib=0)
loader = TrainLoader(index, data, ["rgb"], seed=0)
for epoch in range(5):
    if epoch == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for batch in loader.epoch(0):
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
loader.close()
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library than glibc")
def test_short_epochs_use_the_memory_of_frames_again(tmp_path):
    """Memory that each epoch returns to the system costs 3,000 page faults here, and memory that is kept about 200."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 15, 20, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    path = write_video(tmp_path / "video", frames, "mjpeg-mkv")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUN"))}
    ran = subprocess.run(
        [sys.executable, "-c", SHORT_EPOCHS, str(path)], env=environment, check=True, capture_output=True, text=True
    )
    assert int(ran.stdout) < 1000


# Prints the resident memory of the process, MiB, before the first of three loaders and after each, closed but kept.
RESIDENT = """
import os
import sys
from pathlib import Path

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.index import Index, Video

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

path = Path(sys.argv[1])
copies = [path.with_name(f"{i}.mkv") for i in range(24)]
for copy in copies:
    copy.hardlink_to(path)
index = Index(Video(copy, "a", str(i), "train", 60, 25.0, 320, 240) for i, copy in enumerate(copies))
data = DataConfig(frames=2, size=16, batch_size=6, workers=2)
loaders = []
for _ in range(4):
    loaders.append(TrainLoader(index, data, ["rgb"], seed=0))
    for batch in loaders[-1].epoch(0):
        pass
    full = resident()
    loaders[-1].close()
    print(full, resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_closed_loaders_do_not_add_up(tmp_path):
    """24 videos of 13 MiB are kept by each loader, decoded by threads of its own."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 15, 20, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    path = write_video(tmp_path / "video", frames, "mjpeg-mkv")
    ran = subprocess.run([sys.executable, "-c", RESIDENT, str(path)], check=True, capture_output=True, text=True)
    (first_full, first), *_, (full, last) = [map(float, line.split()) for line in ran.stdout.splitlines()]
    assert first_full - first > 200  # the videos were kept, and returned
    assert last < first + 60 and full < first_full + 60
