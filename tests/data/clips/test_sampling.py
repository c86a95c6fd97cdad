"""The clip plan: a pure function of (seed, epoch, video, clip), with the published distribution."""

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from cpr_fast import _host
from cpr_fast.config import DataConfig
from cpr_fast.data.clips.sampling import (
    CROP_RATIO,
    Clips,
    Sources,
    clip_frames,
    epoch_order,
    plan_labelled,
    plan_pairs,
    plan_selection,
    plan_windows,
    step_videos,
    with_test_jitter,
)
from cpr_fast.errors import InputError

DATA = DataConfig(frames=32)


def sources(num_videos, num_frames=100, height=240, width=320):
    return Sources(*(np.full(num_videos, value, np.int64) for value in (num_frames, height, width)))


def same(a: Clips, b: Clips) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Clips))


def philox_by_hand(seed, counter):
    """Computes Philox4x32-10 (Salmon et al. 2011) for one counter, with Python integers."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right & 0xFFFFFFFF, (left >> 32) ^ c[3] ^ k[1], left & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


class TestGenerator:
    @pytest.mark.parametrize(
        ("counter", "key", "words"),
        [  # the known answers published with Random123
            ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
            ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
            (
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                0x299F31D0A4093822,
                [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            ),
        ],
    )
    def test_known_answers(self, counter, key, words):
        assert philox_by_hand(key, counter) == words
        assert _host.philox(key, np.array([counter], np.uint32))[0].tolist() == words

    def test_uniforms_are_the_words_of_stream_and_block(self):
        rng = np.random.default_rng(0)
        streams = rng.integers(0, 2**32, (7, 3), dtype=np.uint64)
        seed = int(rng.integers(0, 2**63))
        draws = _host.philox_uniform(seed, streams, 3)
        expected = [[w for b in range(3) for w in philox_by_hand(seed, [*map(int, s), b])] for s in streams]
        np.testing.assert_array_equal(draws, np.array(expected) * 2.0**-32)


class TestOrder:
    def test_a_permutation_of_its_own_for_every_epoch_and_seed(self):
        orders = [epoch_order(101, seed, epoch) for seed in (0, 1, 2**40) for epoch in range(3)]
        for order in orders:
            assert sorted(order) == list(range(101))
        assert len({tuple(order) for order in orders}) == len(orders)
        np.testing.assert_array_equal(epoch_order(101, 1, 2), orders[5])
        assert epoch_order(1, -3, 0).tolist() == [0]

    def test_every_place_is_equally_likely(self):
        places = np.array([epoch_order(6, 7, epoch) for epoch in range(3000)])
        for place in places.T:
            assert np.abs(np.bincount(place, minlength=6) - 500).max() < 5 * np.sqrt(500)

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_ranks_cut_one_global_batch(self, world_size):
        order = epoch_order(50, 0, 0)
        per_rank = 12 // world_size
        for step in range(4):
            parts = [step_videos(order, step, per_rank, rank, world_size) for rank in range(world_size)]
            np.testing.assert_array_equal(np.concatenate(parts), order[12 * step : 12 * step + 12])


class TestPairs:
    def test_a_clip_does_not_depend_on_the_batch_it_is_in(self):
        table = Sources(*(np.random.default_rng(0).integers(20, 400, 64) for _ in range(3)))
        video = epoch_order(64, 5, 3)
        whole = plan_pairs(table, video, DATA, 5, 3)
        for size in (1, 7, 64):
            parts = [plan_pairs(table, video[i : i + size], DATA, 5, 3) for i in range(0, 64, size)]
            first = Clips.concatenate([p[: len(p) // 2] for p in parts])
            second = Clips.concatenate([p[len(p) // 2 :] for p in parts])
            assert same(Clips.concatenate([first, second]), whole)

    def test_seed_epoch_video_and_clip_all_matter(self):
        def boxes(seed, epoch):
            return plan_pairs(sources(2), np.arange(2), DATA, seed, epoch).box.tolist()

        every = [tuple(box) for seed in (0, 1) for epoch in (0, 1) for box in boxes(seed, epoch)]
        assert len(set(every)) == len(every) == 16

    def test_positions_and_augmentations_have_the_published_shares(self):
        n, slack = 40_000, 100 - 32
        plan = plan_pairs(sources(n), np.arange(n), DATA, 0, 0)
        start = plan.start.reshape(2, n)

        def share_is(mask, p):
            assert abs(mask.mean() - p) < 5 * np.sqrt(p * (1 - p) / mask.size), (mask.mean(), p)

        share_is(start[0] == start[1], 0.5 + 0.5 / slack)
        assert start.min() == 0 and start.max() == slack - 1  # the last legal start is never drawn
        assert np.abs(np.bincount(start[0]) - n / slack).max() < 5 * np.sqrt(n / slack)
        base = 0.5 * 0.3 + 0.5 * 0.5  # two different positions, or a single one with either clip as the base
        jitter, gray, blur = plan.hue != 0, plan.saturation == 0, plan.sigma > 0
        share_is(plan.flip, 0.5)
        share_is(jitter, base * 0.8)
        share_is(gray, base * 0.2)
        share_is(blur, base * 0.5)
        touched = (jitter | gray | blur).reshape(2, n)
        one_position = start[0] == start[1]
        rare = (
            touched.all(axis=0) & one_position
        )  # both clips are the base: only in pairs whose two positions happen to be equal
        share_is(rare, 0.5 / slack * (0.3 * (1 - 0.2 * 0.8 * 0.5)) ** 2)
        for factor in (plan.brightness, plan.contrast, plan.saturation[~gray]):
            changed = factor[factor != 1]
            assert changed.min() >= 0.6 and changed.max() <= 1.4 and abs(changed.mean() - 1) < 0.01
        assert np.abs(plan.hue).max() <= 36 and abs(plan.hue[jitter].mean()) < 0.5
        assert plan.sigma[blur].min() >= 0.1 and plan.sigma.max() <= 2 and abs(plan.sigma[blur].mean() - 1.05) < 0.02

    def test_boxes_are_random_resized_crops(self):
        n = 20_000
        plan = plan_pairs(sources(n), np.arange(n), DATA, 0, 0)
        top, left, bottom, right = plan.box.T
        height, width = bottom - top, right - left
        assert top.min() == 0 and left.min() == 0 and bottom.max() == 240 and right.max() == 320
        area, ratio = height * width / (240 * 320), width / height
        assert DATA.crop_area * 0.98 < area.min() and area.max() <= 1
        assert CROP_RATIO[0] * 0.98 < ratio.min() and ratio.max() < CROP_RATIO[1] * 1.02
        small = area < 0.5  # crops of this size fit at every aspect ratio, so size and ratio are both uniform
        assert abs(area[small].mean() - 0.35) < 0.005 and abs(np.log(ratio[small]).mean()) < 0.01
        place = left[small] / (320 - width[small])
        assert abs(place.mean() - 0.5) < 0.01 and abs((place**2).mean() - 1 / 3) < 0.01

    def test_a_frame_no_crop_fits_is_cut_in_its_centre(self):
        plan = plan_pairs(sources(3, height=20, width=400), np.arange(3), DATA, 0, 0)
        np.testing.assert_array_equal(plan.box, [[0, 186, 20, 213]] * 6)  # ratio 4/3

    def test_boxes_stay_inside_tiny_frames(self):
        for height, width in ((1, 1), (2, 3), (5, 4)):
            box = plan_pairs(sources(500, height=height, width=width), np.arange(500), DATA, 0, 0).box
            assert (box[:, :2] >= 0).all() and (box[:, :2] < box[:, 2:]).all() and (box[:, 2:] <= [height, width]).all()

    def test_short_videos_are_padded_on_the_left_with_frame_0(self):
        data = DataConfig(frames=8, stride=2)  # a clip spans 15 frames
        table = Sources(np.array([1, 10, 15, 16]), np.full(4, 48), np.full(4, 64))
        start = plan_pairs(table, np.arange(4), data, 0, 0).start.reshape(2, 4)
        np.testing.assert_array_equal(start, [[-14, -5, 0, 0]] * 2)
        assert clip_frames(-14, data).tolist() == [0] * 8
        assert clip_frames(-5, data).tolist() == [0, 0, 0, 1, 3, 5, 7, 9]
        assert clip_frames(3, data).tolist() == [3, 5, 7, 9, 11, 13, 15, 17]

    def test_without_augmentation_only_time_is_drawn(self):
        data = DataConfig(frames=32, augment="none")
        plan = plan_pairs(sources(100), np.arange(100), data, 0, 0)
        assert (plan.box == [15, 55, 225, 265]).all()  # 7/8 of the short side, centred
        for field, value in {"flip": 0, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "sigma": 0}.items():
            assert (getattr(plan, field) == value).all(), field
        start = plan.start.reshape(2, 100)
        assert (start[0] != start[1]).sum() > 90


class TestClassifierClips:
    def test_one_clip_with_null_augmentation_and_some_jitter(self):
        plan = plan_labelled(sources(20000), np.arange(20000), DATA, 0, 3)
        assert len(plan) == 20000 and plan.video.tolist() == list(range(20000))
        assert (plan.sigma == 0).all() and (plan.saturation >= 0.6).all()  # neither blur nor grayscale
        assert abs(plan.flip.mean() - 0.5) < 0.015
        jittered = plan.hue != 0
        assert abs(jittered.mean() - 0.3) < 0.015
        assert (plan.brightness[~jittered] == 1).all() and abs(plan.brightness[jittered]).max() <= 1.4
        area = np.prod(plan.box[:, 2:] - plan.box[:, :2], axis=1) / (240 * 320)
        assert area.min() > 0.19 and area.max() <= 1
        assert plan.start.min() == 0 and plan.start.max() == 67  # the last legal start, 68, is never drawn
        assert same(plan_labelled(sources(20000), np.arange(5, 9), DATA, 0, 3), plan[5:9])
        assert not same(plan_labelled(sources(20000), np.arange(20000), DATA, 0, 4), plan)

    def test_selection_clips_are_random_crops_and_nothing_else(self):
        plan = plan_selection(sources(500), np.arange(500), DATA, 0, 0)
        assert not plan.flip.any() and len(np.unique(plan.box, axis=0)) > 400
        for field, value in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "sigma": 0}.items():
            assert (getattr(plan, field) == value).all(), field

    def test_test_jitter_is_one_draw_per_video(self):
        windows = Clips.concatenate([plan_windows(sources(3000), video, DATA, 2) for video in range(3000)])
        plan = with_test_jitter(windows, 7)
        for field in ("brightness", "contrast", "saturation", "hue"):
            pairs = getattr(plan, field).reshape(3000, 2)
            assert (pairs[:, 0] == pairs[:, 1]).all()
        assert abs((plan.hue != 0).mean() - 0.3) < 0.03 and abs(plan.contrast - 1).max() <= 0.2
        assert np.array_equal(plan.box, windows.box) and np.array_equal(plan.start, windows.start)


class TestWindows:
    def test_windows_overlap_by_half(self):
        plan = plan_windows(sources(3, num_frames=100), 2, DATA, None)
        assert plan.start.tolist() == [0, 15, 30, 45, 60] and plan.video.tolist() == [2] * 5
        assert plan_windows(sources(1, num_frames=92), 0, DATA, None).start.tolist() == [0, 15, 30, 45, 60]
        assert plan_windows(sources(1, num_frames=91), 0, DATA, None).start.tolist() == [0, 15, 30, 45]
        strided = DataConfig(frames=8, stride=3)
        assert plan_windows(sources(1, num_frames=40), 0, strided, None).start.tolist() == [0, 9, 18]

    def test_uniform_windows_reach_from_the_first_frame_to_the_last(self):
        assert plan_windows(sources(1, num_frames=132), 0, DATA, 5).start.tolist() == [0, 25, 50, 75, 100]
        assert plan_windows(sources(1), 0, DATA, 1).start.tolist() == [0]

    def test_five_and_ten_crops_are_those_of_torchs_slices(self):
        height, width, side = 49, 80, 43
        pixels = np.arange(height * width).reshape(height, width)
        table = sources(1, num_frames=47, height=height, width=width)
        slices = [pixels[3:46, 18:61], pixels[:side, :side], pixels[:side, -side:], pixels[-side:, :side],
                  pixels[-side:, -side:]]  # fmt: skip
        slices += [cut[:, ::-1] for cut in slices]
        for crops in (1, 5, 10):
            plan = plan_windows(table, 0, DATA, None, crops)
            assert plan.start.tolist() == [0] * crops + [15] * crops
            assert plan.crop.tolist() == 2 * list(range(crops))
            for row, expected in enumerate(2 * slices[:crops]):
                top, left, bottom, right = plan.box[row]
                cut = pixels[top:bottom, left:right]
                np.testing.assert_array_equal(cut[:, ::-1] if plan.flip[row] else cut, expected)
        with pytest.raises(
            InputError, match="--crops: expected 1 .centre., 5 .centre and corners. or 10 .these also flipped., got 3"
        ):
            plan_windows(table, 0, DATA, None, 3)

    def test_a_short_video_gives_one_padded_window(self):
        for clips_per_video in (None, 10):
            for num_frames in (1, 31, 32):
                plan = plan_windows(sources(1, num_frames=num_frames), 0, DATA, clips_per_video)
                assert plan.start.tolist() == [num_frames - 32]


def test_planning_and_decoding_need_no_dali():
    code = """
import sys
sys.modules["nvidia"] = None
import cpr_fast.data.clips.sampling, cpr_fast.data.video
try:
    import cpr_fast.data.clips.loader
except ImportError as error:
    assert "nvidia-dali" in str(error), error
else:
    raise AssertionError("imported without DALI")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
