"""Evaluation windows: every window of every video appears once, with ten crops."""

import numpy as np
import pytest
import torch
from support.data_sets.clips import DATA, levels, resized
from support.numbered_videos import decode_linearly

pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")

from cpr_fast.data.clips.loader import WindowLoader
from cpr_fast.data.clips.sampling import Clips, Sources, clip_frames, plan_windows


class TestWindowLoader:
    @pytest.mark.parametrize("batch_size", [1, 7, 64])
    def test_every_window_of_every_video_once(self, index, batch_size):
        loader = WindowLoader(index, DATA, ["rgb", "flow"], batch_size=batch_size)
        batches = list(loader)
        expected = [plan_windows(Sources.of(index), video, DATA, None) for video in range(len(index))]
        videos = np.concatenate([plan.video for plan in expected])
        assert torch.cat([batch.video for batch in batches]).tolist() == videos.tolist()
        assert len(batches) == len(loader) and set(videos) == set(range(10))
        clips = torch.cat([batch.clips["rgb"] for batch in batches])
        assert batches[0].clips["flow"].is_contiguous(memory_format=torch.channels_last_3d)
        for plan, clip in zip(Clips.concatenate(expected)[np.arange(len(videos))].video, clips, strict=True):
            assert clip.shape == (3, 4, 32, 32) and index[plan] is not None
        row = int(np.flatnonzero(videos == 5)[3])
        frames = decode_linearly(index[5].path)[clip_frames(expected[5].start[3], DATA)]
        assert np.abs(levels(clips[row]) - resized(frames, expected[5].box[3], False, 32)).max() <= 2.01
        loader.close()

    def test_uniform_windows_and_repeated_passes(self, index):
        loader = WindowLoader(index, DATA, ["rgb"], clips_per_video=3)
        first, second = list(loader), list(loader)
        assert sum(len(batch.video) for batch in first) == 3 * 9 + 1  # the short video has one window
        assert all(torch.equal(a.clips["rgb"], b.clips["rgb"]) for a, b in zip(first, second, strict=True))
        loader.close()

    def test_ten_crops_of_every_window_in_one_pass(self, index):
        loader = WindowLoader(index, DATA, ["rgb"], clips_per_video=2, crops=10, batch_size=7)
        batches = list(loader)
        loader.close()
        plan = Clips.concatenate([plan_windows(Sources.of(index), video, DATA, 2, 10) for video in range(len(index))])
        assert torch.cat([batch.crop for batch in batches]).tolist() == plan.crop.tolist()
        clips = torch.cat([batch.clips["rgb"] for batch in batches])
        for row in range(10):
            frames = decode_linearly(index[0].path)[clip_frames(plan.start[row], DATA)]
            assert np.abs(levels(clips[row]) - resized(frames, plan.box[row], plan.flip[row], 32)).max() <= 2.01
