"""Compares clips with the published recipes in PIL: IIC's crops and residuals; `data.exact` bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_sets.clips import DATA, MEAN, STD, collect, levels, neutral
from support.numbered_videos import decode_linearly

pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")

from cpr_fast.data.clips.loader import TrainLoader, WindowLoader
from cpr_fast.data.clips.sampling import Clips, Sources, clip_frames, plan_pairs, plan_windows
from cpr_fast.errors import InputError


class TestIIC:
    """Compares IIC's clips with the published recipe (PIL's bilinear resize to 128x171, a crop of 112, x / 255) and its
    residuals.
    """

    DATA = dataclasses.replace(DATA, augment="iic", size=112)

    def expected(self, frames: np.ndarray, row: int, column: int) -> np.ndarray:
        resized = [np.asarray(Image.fromarray(frame).resize((171, 128), Image.BILINEAR)) for frame in frames]
        return np.stack(resized)[:, row : row + 112, column : column + 112]

    def test_training_clips_and_residuals(self, index):
        corners = set()
        for batch in collect(TrainLoader(index, self.DATA, ["residual", "rgb"], seed=0)):
            plan = plan_pairs(Sources.of(index), batch.video.numpy(), self.DATA, 0, 0)
            for row in range(8):
                video, (clip, place) = index[plan.video[row]], divmod(row, 4)
                corner = plan.box[row, :2] * [128, 171] / [video.height, video.width]
                np.testing.assert_allclose(corner, corner.round(), atol=1e-9)
                corners.add(tuple(corner.round().astype(int)))
                frames = decode_linearly(video.path)[clip_frames(plan.start[row], self.DATA)]
                rgb = batch.clips["rgb"][place, clip].permute(1, 2, 3, 0).numpy()
                want = self.expected(frames, *corner.round().astype(int)) / 255
                assert np.abs(rgb - want).max() <= 2.01 / 255 and np.abs(rgb - want).mean() < 0.6 / 255
                moved = batch.clips["residual"][place, clip].permute(1, 2, 3, 0).numpy()
                np.testing.assert_allclose(moved, (rgb - np.roll(rgb, 1, axis=0) + 1) / 2, atol=1e-6)
        assert len(corners) > 12 and not plan.flip.any() and neutral(plan).all()

    def test_windows_are_the_centre_crop(self, index):
        loader = WindowLoader(index, self.DATA, ["rgb"], clips_per_video=1)
        clip = next(iter(loader)).clips["rgb"][0].permute(1, 2, 3, 0).numpy()
        loader.close()
        want = self.expected(decode_linearly(index[0].path)[:4], 8, 30) / 255
        assert np.abs(clip - want).max() <= 2.01 / 255

    def test_the_residual_of_normalised_clips(self, index):
        data = dataclasses.replace(DATA, augment="none")
        batch = collect(TrainLoader(index, data, ["rgb", "residual"], seed=0))[0]
        pixels, moved = (levels(batch.clips[view][0, 0]) / 255 for view in ("rgb", "residual"))
        np.testing.assert_allclose(moved, (pixels - np.roll(pixels, 1, axis=0) + 1) / 2, atol=1e-6)
        alone = collect(TrainLoader(index, data, ["residual"], seed=0))[0]
        assert list(alone.clips) == ["residual"] and torch.equal(alone.clips["residual"], batch.clips["residual"])

    def test_a_view_that_does_not_exist(self, index):
        with pytest.raises(InputError, match="views: expected some of rgb, flow, residual, got depth"):
            TrainLoader(index, DATA, ["rgb", "depth"], seed=0)


class TestExact:
    """`data.exact` equals torchvision's recipe on PIL bit for bit; also checks how much DALI differs from it."""

    @pytest.mark.parametrize("augment", ["coclr", "iic", "none"])
    def test_clips_are_the_reference_and_dalis_are_near(self, index, augment):
        data = dataclasses.replace(DATA, augment=augment, exact=True)
        exact = collect(TrainLoader(index, data, ["rgb", "flow", "residual"], seed=1), epoch=2)
        dali = collect(
            TrainLoader(index, dataclasses.replace(data, exact=False), ["rgb", "flow", "residual"], seed=1), 2
        )
        for a, b in zip(exact, dali, strict=True):
            plain = torch.from_numpy(
                neutral(plan_pairs(Sources.of(index), a.video.numpy(), data, 1, 2)).reshape(2, 4)
            ).T
            for view in a.clips:
                assert a.clips[view].shape == b.clips[view].shape
                assert a.clips[view][:, 1].is_contiguous(memory_format=torch.channels_last_3d)
                assert 58 * (a.clips[view] - b.clips[view])[plain].abs().mean() < 2  # levels
            assert torch.equal(a.start, b.start) and torch.equal(a.label, b.label)

    def test_windows_equal_torchvisions_recipe_bit_for_bit(self, index):
        data = dataclasses.replace(DATA, exact=True)
        loader = WindowLoader(index, data, ["rgb"], clips_per_video=2, crops=10)
        clips = torch.cat([batch.clips["rgb"] for batch in loader])
        loader.close()
        plan = Clips.concatenate([plan_windows(Sources.of(index), v, data, 2, 10) for v in range(len(index))])
        for row in (0, 7, 19, 33, 60):
            frames = decode_linearly(index[plan.video[row]].path)[clip_frames(plan.start[row], data)]
            top, left, bottom, right = plan.box[row].tolist()
            crops = [Image.fromarray(frame).crop((left, top, right, bottom)) for frame in frames]
            resized = [np.asarray(crop.resize((32, 32), Image.BICUBIC)) for crop in crops]
            pixels = torch.from_numpy(np.stack(resized)).permute(3, 0, 1, 2).float().div(255)  # ToTensor
            expected = (pixels - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
            expected = expected.flip(-1) if plan.flip[row] else expected
            assert torch.equal(clips[row], expected)
