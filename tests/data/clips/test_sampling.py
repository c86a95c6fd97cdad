"""The clip plan: a pure function of (seed, epoch, video, clip), with the published distribution."""

import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from cpr_fast import _host
from cpr_fast.config import DataConfig
from cpr_fast.data.clips.sampling import (
    NO_GRAY,
    ORDERS,
    Clips,
    Sources,
    clip_frames,
    epoch_order,
    plan_first,
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


def neutral(plan: Clips) -> bool:
    """Whether no clip is flipped, coloured or blurred."""
    values = {"flip": 0, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "gray": NO_GRAY, "sigma": 0}
    return all((getattr(plan, name) == value).all() for name, value in values.items())


def share_is(mask, p):
    """The share of True is p, within five standard errors."""
    assert abs(mask.mean() - p) < 5 * np.sqrt(p * (1 - p) / mask.size), (mask.mean(), p)


def uniform(values, count):
    """Every value of 0 .. count - 1 is equally frequent, within five standard errors."""
    expected = values.size / count
    counts = np.bincount(values.ravel().astype(int), minlength=count)
    assert len(counts) == count and np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def published_boxes(n, attempts, height=240, width=320):
    """The sides (height, width) of CoCLR's random crop, drawn by NumPy; [0, 0] where no attempt fits."""
    rng, sides = np.random.default_rng(1), np.zeros((n, 2), int)
    for _ in range(attempts):
        area, ratio = rng.uniform(0.2, 1, n) * height * width, rng.uniform(3 / 4, 4 / 3, n)
        new = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=1).round().astype(int)
        new = np.where(rng.random((n, 1)) < 0.5, new[:, ::-1], new)
        use = (sides == 0).all(axis=1) & (new <= [height, width]).all(axis=1)
        sides[use] = new[use]
    return sides


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

    def test_an_order_that_is_drawn_in_parts_is_the_same(self, monkeypatch):
        whole = epoch_order(101, 3, 1)
        monkeypatch.setattr("cpr_fast.data.clips.sampling._AT_ONCE", 7)
        np.testing.assert_array_equal(epoch_order(101, 3, 1), whole)

    def test_it_is_that_of_the_first_two_words_of_each_video(self):
        words = [philox_by_hand(5, [4, video, 3, 0])[:2] for video in range(300)]  # epoch, video, stream, block
        assert epoch_order(300, 5, 4).tolist() == sorted(range(300), key=words.__getitem__)
        assert epoch_order(300, 5, 4).dtype == np.int64

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
            return plan_pairs(sources(2), np.arange(2), replace(DATA, crop_attempts=10), seed, epoch).box.tolist()

        every = [tuple(box) for seed in (0, 1) for epoch in (0, 1) for box in boxes(seed, epoch)]
        assert len(set(every)) == len(every) == 16

    def test_positions_and_augmentations_have_the_published_shares(self):
        n, slack = 40_000, 100 - 32
        plan = plan_pairs(sources(n), np.arange(n), DATA, 0, 0)
        start = plan.start.reshape(2, n)

        share_is(start[0] == start[1], 0.5 + 0.5 / slack)
        assert start.min() == 0 and start.max() == slack - 1  # the last legal start is never drawn
        assert np.abs(np.bincount(start[0]) - n / slack).max() < 5 * np.sqrt(n / slack)
        base = 0.5 * 0.3 + 0.5 * 0.5  # two different positions, or a single one with either clip as the base
        jitter, gray, blur = plan.hue != 0, (plan.gray != NO_GRAY).any(axis=1), plan.sigma > 0
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
        for factor in (plan.brightness, plan.contrast, plan.saturation):
            changed = factor[jitter]
            assert (factor[~jitter] == 1).all() and changed.min() >= 0.6 and changed.max() <= 1.4
            assert abs(changed.mean() - 1) < 0.01 and abs(changed.var() - 0.8**2 / 12) < 0.002
        assert 0.099 < np.abs(plan.hue).max() <= 0.1 and abs(plan.hue[jitter].mean()) < 0.002
        assert plan.sigma[blur].min() >= 0.1 and plan.sigma.max() <= 2 and abs(plan.sigma[blur].mean() - 1.05) < 0.02

    def test_orders_and_gray_channels_are_uniform(self):
        """ColorJitter shuffles its operations once per clip; CoCLR's RandomGray draws a channel for every frame."""
        plan = plan_pairs(sources(20_000), np.arange(20_000), DATA, 0, 0)
        jitter, gray = plan.hue != 0, (plan.gray != NO_GRAY).any(axis=1)
        uniform(plan.order[jitter], 24)
        assert (plan.order[~jitter] == 0).all() and sorted(ORDERS) == sorted({tuple(order) for order in ORDERS})
        channels = plan.gray[gray]
        assert channels.shape[1] == 32 and (plan.gray[~gray] == NO_GRAY).all()
        uniform(channels, 3)
        uniform(3 * channels[:, :-1] + channels[:, 1:], 9)  # independent from frame to frame
        luma = plan_pairs(sources(20_000), np.arange(20_000), replace(DATA, grayscale="luma"), 0, 0)
        assert np.array_equal((luma.gray == 3).all(axis=1), gray) and (luma.gray[~gray] == NO_GRAY).all()
        assert same(replace(luma, gray=plan.gray), plan)

    @pytest.mark.parametrize("attempts", [1, 2, 10])
    def test_boxes_are_the_published_random_crops(self, attempts):
        """One attempt keeps 29.6 % whole frames of 320x240, with a mean area of .645 of the frame."""
        n = 20_000
        plan = plan_first(sources(n), np.arange(n), replace(DATA, crop_attempts=attempts), 0, 0)
        top, left, bottom, right = plan.box.T
        height, width = bottom - top, right - left
        expected = published_boxes(400_000, attempts)
        none = (expected == 0).all(axis=1)
        expected[none] = [240, 320]
        whole, area = (height == 240) & (width == 320), height * width / (240 * 320)
        expected_area = expected.prod(axis=1) / (240 * 320)
        if attempts == 1:  # as measured of the published code
            assert abs(none.mean() - 0.293) < 0.005 and abs(expected_area.mean() - 0.644) < 0.002
            assert abs((expected_area > 0.8).mean() - 0.342) < 0.005
        share_is(whole, (expected == [240, 320]).all(axis=1).mean() + 1e-9)
        share_is(area > 0.8, (expected_area > 0.8).mean())
        assert abs(area.mean() - expected_area.mean()) < 5 * area.std() / np.sqrt(n)
        for got, want in ((area, expected_area), (width / height, expected[:, 1] / expected[:, 0])):
            quantiles = np.linspace(0.02, 0.98, 25)
            below = np.array([(got <= edge).mean() for edge in np.quantile(want, quantiles)])
            exact = np.array([(want <= edge).mean() for edge in np.quantile(want, quantiles)])
            assert np.abs(below - exact).max() < 5 * 0.5 / np.sqrt(n)
        assert top.min() == left.min() == 0 and bottom.max() == 240 and right.max() == 320
        small = (area < 0.5) & ~whole
        place = left[small] / (320 - width[small])
        assert abs(place.mean() - 0.5) < 0.01 and abs((place**2).mean() - 1 / 3) < 0.01

    def test_a_frame_that_no_crop_fits_is_kept_whole(self):
        plan = plan_pairs(sources(3, height=20, width=400), np.arange(3), DATA, 0, 0)
        np.testing.assert_array_equal(plan.box, [[0, 0, 20, 400]] * 6)

    def test_boxes_stay_inside_tiny_frames(self):
        for height, width in ((1, 1), (2, 3), (5, 4)):
            box = plan_pairs(sources(500, height=height, width=width), np.arange(500), DATA, 0, 0).box
            assert (box[:, :2] >= 0).all() and (box[:, :2] < box[:, 2:]).all() and (box[:, 2:] <= [height, width]).all()

    def test_short_videos_are_padded_on_the_left_with_frame_0(self):
        data = DataConfig(frames=8)
        table = Sources(np.array([1, 7, 8, 9]), np.full(4, 48), np.full(4, 64))
        start = plan_pairs(table, np.arange(4), data, 0, 0).start.reshape(2, 4)
        np.testing.assert_array_equal(start, [[-7, -1, 0, 0]] * 2)
        assert clip_frames(-7, data).tolist() == [0] * 8
        assert clip_frames(-1, data).tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
        assert clip_frames(3, replace(data, stride=2)).tolist() == [3, 5, 7, 9, 11, 13, 15, 17]

    @pytest.mark.parametrize(("frames", "stride"), [(8, 1), (8, 3), (5, 4), (32, 6)])
    def test_positions_are_those_of_coclrs_sampler(self, frames, stride):
        """Compares every set of frame numbers that training and evaluation give with the published sampler's."""
        data = DataConfig(frames=frames, stride=stride, augment="none")

        def padded(num_frames, phase):
            numbers = phase + stride * np.arange(frames)
            numbers = numbers[numbers < num_frames].tolist()
            return tuple([0] * (frames - len(numbers)) + numbers)

        for num_frames in (1, stride, frames, frames * stride - 1, frames * stride, frames * stride + 1,
                           frames * stride + 9, 2 * frames * stride + 3):  # fmt: skip
            free = num_frames - frames * stride
            firsts = range(free) if free > 0 else range(stride)
            possible = {tuple(range(n, n + frames * stride, stride)) if free > 0 else padded(num_frames, n)
                        for n in firsts}  # fmt: skip
            table, video = sources(600, num_frames), np.arange(600)
            for plan in (plan_pairs, plan_labelled):
                drawn = {tuple(clip_frames(s, data).tolist()) for s in plan(table, video, data, 0, 0).start}
                assert drawn <= possible
                assert drawn == possible or free > 60
            windows = [tuple(clip_frames(s, data).tolist()) for s in plan_windows(table, 0, data, None).start]
            if free <= 0:
                assert windows == [padded(num_frames, 0)]
            else:
                hop = frames * stride // 2 - 1
                assert windows == [tuple(range(s, s + frames * stride, stride)) for s in range(0, free + 1, hop)]

    def test_a_random_start_is_uniform(self):
        data = DataConfig(frames=8, stride=3)
        uniform(plan_labelled(sources(20_000, 24 + 10), np.arange(20_000), data, 0, 0).start, 10)
        uniform(plan_labelled(sources(20_000, 24), np.arange(20_000), data, 0, 0).start, 3)

    def test_without_augmentation_only_time_is_drawn(self):
        data = DataConfig(frames=32, augment="none")
        plan = plan_pairs(sources(100), np.arange(100), data, 0, 0)
        assert (plan.box == [8, 48, 232, 272]).all()  # 224 x 224 pixels, centred
        assert neutral(plan)
        start = plan.start.reshape(2, 100)
        assert (start[0] != start[1]).sum() > 90


class TestClassifierClips:
    def test_one_clip_with_a_random_crop_and_some_jitter(self):
        plan = plan_labelled(sources(20000), np.arange(20000), DATA, 0, 3)
        assert len(plan) == 20000 and plan.video.tolist() == list(range(20000))
        assert (plan.sigma == 0).all() and (plan.gray == NO_GRAY).all()
        share_is(plan.flip, 0.5)
        jittered = plan.hue != 0
        share_is(jittered, 0.3)
        uniform(plan.order[jittered], 24)
        assert (plan.brightness[~jittered] == 1).all() and abs(plan.brightness[jittered]).max() <= 1.4
        area = np.prod(plan.box[:, 2:] - plan.box[:, :2], axis=1) / (240 * 320)
        assert area.min() > 0.19 and abs(area.mean() - 0.496) < 0.01  # ten tries: no whole frames
        assert plan.start.min() == 0 and plan.start.max() == 67  # the last legal start, 68, is never drawn
        assert same(plan_labelled(sources(20000), np.arange(5, 9), DATA, 0, 3), plan[5:9])
        assert not same(plan_labelled(sources(20000), np.arange(20000), DATA, 0, 4), plan)

    def test_where_ten_crops_do_not_fit_it_is_the_centre_square(self):
        box = plan_labelled(sources(3, height=21, width=400), np.arange(3), DATA, 0, 0).box
        np.testing.assert_array_equal(box, [[0, 190, 21, 211]] * 3)

    def test_selection_clips_are_random_crops_and_nothing_else(self):
        plan = plan_selection(sources(500), np.arange(500), DATA, 0, 0)
        assert neutral(plan) and len(np.unique(plan.box, axis=0)) > 400

    def test_test_jitter_is_one_draw_per_video_and_crop(self):
        """The published code makes a pass over the videos for each of ten crops, with a draw for every video."""
        windows = Clips.concatenate([plan_windows(sources(2000), video, DATA, 2, 10) for video in range(2000)])
        plan = with_test_jitter(windows, np.arange(2000), 7)
        for field in ("brightness", "contrast", "saturation", "hue", "order"):
            values = getattr(plan, field).reshape(2000, 2, 10)  # video, window, crop
            assert (values[:, 0] == values[:, 1]).all()
        hue = plan.hue.reshape(2000, 2, 10)[:, 0]
        share_is(hue != 0, 0.3)
        share_is((hue[:, 0] != 0) & (hue[:, 7] != 0), 0.09)  # independent
        assert len(np.unique(hue[hue != 0])) > 5900
        uniform(plan.order.reshape(2000, 2, 10)[:, 0][hue != 0], 24)
        assert abs(plan.contrast - 1).max() <= 0.2 and abs(plan.hue).max() <= 0.1
        assert np.array_equal(plan.box, windows.box) and np.array_equal(plan.start, windows.start)
        centre = Clips.concatenate([plan_windows(sources(2000), video, DATA, 2) for video in range(2000)])
        assert same(with_test_jitter(centre, np.arange(2000), 7), plan[plan.crop == 0])
        last = plan_windows(sources(2000), 1, DATA, 2, 10)  # of a loader that has only the videos 10 and 1999
        assert same(with_test_jitter(last, np.array([10, 1999]), 7), replace(plan[-20:], video=last.video))


class TestWindows:
    def test_windows_overlap_by_half(self):
        plan = plan_windows(sources(3, num_frames=100), 2, DATA, None)
        assert plan.start.tolist() == [0, 15, 30, 45, 60] and plan.video.tolist() == [2] * 5
        assert plan_windows(sources(1, num_frames=92), 0, DATA, None).start.tolist() == [0, 15, 30, 45, 60]
        assert plan_windows(sources(1, num_frames=91), 0, DATA, None).start.tolist() == [0, 15, 30, 45]
        strided = DataConfig(frames=8, stride=3)  # a clip spans 24 frames
        assert plan_windows(sources(1, num_frames=46), 0, strided, None).start.tolist() == [0, 11, 22]
        assert plan_windows(sources(1, num_frames=45), 0, strided, None).start.tolist() == [0, 11]

    def test_uniform_windows_reach_from_the_first_frame_to_the_last(self):
        assert plan_windows(sources(1, num_frames=132), 0, DATA, 5).start.tolist() == [0, 25, 50, 75, 100]
        assert plan_windows(sources(1), 0, DATA, 1).start.tolist() == [0]
        rounded = plan_windows(sources(1, num_frames=39), 0, DATA, 4).start.tolist()
        truncated = plan_windows(sources(1, num_frames=39), 0, replace(DATA, augment="iic"), 4).start.tolist()
        assert rounded == [0, 2, 5, 7] and truncated == [0, 2, 4, 7]  # of 0, 2.33, 4.67, 7

    @pytest.mark.parametrize(
        ("height", "width", "side"),
        [(240, 320, 224), (320, 240, 224), (256, 340, 224), (512, 512, 448), (300, 400, 262), (224, 300, 224),
         (225, 301, 224), (223, 300, 223), (100, 80, 80), (1, 1, 1), (1080, 1920, 945)],
    )  # fmt: skip
    def test_the_side_of_the_test_crop(self, height, width, side):
        """224 pixels of frames of short side 224 to 256; larger frames count as resized to 256."""
        boxes = plan_windows(sources(1, height=height, width=width), 0, DATA, 1, 5).box
        assert (boxes[:, 2:] - boxes[:, :2] == side).all()
        top, left = round((height - side) / 2), round((width - side) / 2)  # as CenterCrop rounds
        np.testing.assert_array_equal(boxes[0], [top, left, top + side, left + side])

    def test_five_and_ten_crops_are_those_of_torchs_slices(self):
        height, width, side = 249, 280, 224
        pixels = np.arange(height * width).reshape(height, width)
        table = sources(1, num_frames=47, height=height, width=width)
        slices = [pixels[12:236, 28:252], pixels[:side, :side], pixels[:side, -side:], pixels[-side:, :side],
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
