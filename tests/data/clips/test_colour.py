"""Colours, blur and flips against the published recipe, written here with PIL: `data.exact` bit for bit, torch's (GPU)
and OpenCV's (CPU) within the levels that their modules state."""

import dataclasses
import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from support.data_sets.clips import DATA, MEAN, STD, collect, texture
from support.numbered_videos import clips_at, decode_linearly

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.colour import box_weights, finish_clips
from cpr_fast.data.clips.finish import box_window, finish_clip
from cpr_fast.data.clips.sampling import (
    NO_GRAY,
    ORDERS,
    Clips,
    Sources,
    clip_frames,
    plan_pairs,
    plan_windows,
    with_test_jitter,
)

NAMES = ("brightness", "contrast", "saturation", "hue")


# ---- the published recipe -------------------------------------------------------------------------------------------
def adjust_hue(picture, factor):
    """torchvision.transforms.functional.adjust_hue, for PIL images."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = (np.array(hue).astype(int) + int(factor * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


ADJUST = {
    "brightness": lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    "contrast": lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    "saturation": lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    "hue": adjust_hue,
}


def random_gray(picture, channel):
    """CoCLR's RandomGray, with the channel that it draws; 3 is torchvision's grayscale."""
    if channel == 3:
        return picture.convert("L").convert("RGB")
    pixels = np.array(picture)[:, :, channel]
    return Image.fromarray(np.dstack([pixels, pixels, pixels]))


def published(frames: np.ndarray, clip: Clips) -> np.ndarray:
    """Applies what the plan of one clip says to cut frames, uint8 [T, S, S, 3]."""
    out = []
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        if clip.hue[0] != 0 or (clip.brightness[0], clip.contrast[0], clip.saturation[0]) != (1, 1, 1):
            for operation in ORDERS[clip.order[0]]:
                factor = float(getattr(clip, NAMES[operation])[0])
                if factor != (operation < 3):
                    picture = ADJUST[NAMES[operation]](picture, factor)
        if clip.gray.shape[1] > 1 and clip.gray[0, number] != NO_GRAY:
            picture = random_gray(picture, clip.gray[0, number])
        if clip.sigma[0] > 0:
            picture = picture.filter(ImageFilter.GaussianBlur(radius=float(clip.sigma[0])))
        out.append(np.asarray(picture.transpose(Image.FLIP_LEFT_RIGHT) if clip.flip[0] else picture))
    return np.stack(out)


def normalised(frames: np.ndarray) -> torch.Tensor:
    """ToTensor and Normalize: uint8 [T, S, S, 3] -> float32 [3, T, S, S]."""
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(255)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)


# ---- the exact path ------------------------------------------------------------------------------------------------
def flow_image(path) -> np.ndarray:
    """The published flow images (128, v, u) of a flow file, which holds u above v: uint8 [F, H, W, 3]."""
    luma = decode_linearly(path)[..., 0]
    u, v = np.split(luma, 2, axis=1)
    return np.stack([np.full_like(u, 128), v, u], axis=-1)


@pytest.mark.parametrize(
    "settings", [{}, {"grayscale": "luma"}, {"flow_colour": False}, {"crop_attempts": 10, "stride": 2}]
)
def test_exact_clips_are_the_published_ones_bit_for_bit(index, settings):
    pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")
    from cpr_fast.data.clips.loader import TrainLoader

    data = dataclasses.replace(DATA, exact=True, **settings)
    coloured = 0
    for batch in collect(TrainLoader(index, data, ["rgb", "flow"], seed=3), epoch=1):
        plan = plan_pairs(Sources.of(index), batch.video.numpy(), data, 3, 1)
        for row in range(len(plan)):
            video, (clip, place) = index[plan.video[row]], divmod(row, len(batch.video))
            one = plan[[row]]
            changed = one.hue[0] != 0 or one.gray[0, 0] != NO_GRAY or one.sigma[0] > 0
            coloured += bool(changed)
            for view in ("rgb", "flow"):
                whole = decode_linearly(video.path) if view == "rgb" else flow_image(video.flow_path)
                top, left, bottom, right = plan.box[row].tolist()
                frames = np.stack(
                    [
                        np.asarray(Image.fromarray(whole[n]).crop((left, top, right, bottom)).resize((32, 32), 3))
                        for n in clip_frames(plan.start[row], data)
                    ]
                )
                if view == "flow" and not data.flow_colour:
                    one = dataclasses.replace(clips_at(SimpleNamespace(height=1, width=1), [0]), flip=one.flip)
                assert torch.equal(batch.clips[view][place, clip], normalised(published(frames, one))), (row, view)
    assert coloured >= 3


# ---- the fast paths ------------------------------------------------------------------------------------------------
S, T = 40, 3
SQUARE = SimpleNamespace(height=S, width=S)


def by_opencv(frames, clip, view="rgb", data=DATA):
    out = frames.copy()
    finish_clip(out, clip, view, data)
    return out.astype(int)


def by_torch(frames, clip, view="rgb", data=DATA):
    """The levels of the module that runs on a GPU, here on the CPU."""
    out = finish_clips(torch.from_numpy(frames)[None], clip, view, data)[0]
    levels = 255 * (out * torch.tensor(STD) + torch.tensor(MEAN))
    assert (levels - levels.round()).abs().max() < 1e-3
    return levels.round().int().numpy()


def noise(seed=0, frames=T, height=S, width=S):
    """Saturated pixels, the hardest for a hue."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def draws(count, **names):
    rng = random.Random(0)
    return [{name: np.float32(rng.uniform(*bounds)) for name, bounds in names.items()} for _ in range(count)]


FACTOR, HUE = (0.6, 1.4), (-0.1, 0.1)
# draws, and the largest difference from PIL in levels: of torch, and of OpenCV
CASES = [
    *[(draw, 0, 0) for draw in draws(3, brightness=FACTOR)],
    *[(draw, 0, 1) for draw in draws(3, contrast=FACTOR)],
    *[(draw, 0, 1) for draw in draws(3, saturation=FACTOR)],
    *[(draw, 0, 13) for draw in (*draws(3, hue=HUE), {"hue": np.float32(0.1)}, {"hue": np.float32(-1e-3)})],
    ({"gray": [0, 2, 1]}, 0, 0),
    ({"gray": [3, 3, 3]}, 0, 1),
    ({"flip": True}, 0, 0),
    *[({"sigma": np.float32(sigma)}, 3, 4) for sigma in (0.1, 0.3, 0.7, 1.22, 1.23, 1.6, 2.0)],
]


@pytest.mark.parametrize("pixels", [noise(), texture(0, S, S, T)], ids=["noise", "texture"])
@pytest.mark.parametrize(("draw", "torch_levels", "opencv_levels"), CASES)
def test_every_operation_is_pils(pixels, draw, torch_levels, opencv_levels):
    clip = clips_at(SQUARE, [0], **draw)
    expected = published(pixels, clip).astype(int)
    assert np.abs(by_torch(pixels, clip) - expected).max() <= torch_levels
    # a blur of .1 mixes .6 % of the neighbours, which OpenCV's weights of 1/256 round
    assert np.abs(by_opencv(pixels, clip) - expected).max() <= opencv_levels + 2 * (
        draw.get("sigma") == np.float32(0.1)
    )


@pytest.mark.parametrize("order", range(24))
def test_every_order_is_pils(order):
    """Torch gives PIL's levels bit for bit. OpenCV rounds the hue otherwise, which later operations amplify."""
    draw = draws(24, brightness=FACTOR, contrast=FACTOR, saturation=FACTOR, hue=HUE)[order]
    for pixels, mean, most in ((noise(order), 2, 26), (texture(order, S, S, T), 1.5, 16)):
        clip = clips_at(SQUARE, [0], order=order, gray=[1, 0, 2], flip=True, **draw)
        expected = published(pixels, clip)
        np.testing.assert_array_equal(by_torch(pixels, clip), expected)
        difference = np.abs(by_opencv(pixels, clip) - expected)
        assert difference.mean() < mean and difference.max() <= most
    others = [published(pixels, dataclasses.replace(clip, order=np.array([other]))) for other in range(24)]
    assert sum((other == expected).all() for other in others) < 12  # the order matters


def test_every_colour_is_pils_in_torch():
    """All 2^18 colours of six bits a channel, at the largest shifts of the hue and at a change of sector."""
    levels = np.arange(0, 256, 4, np.uint8) + np.arange(64, dtype=np.uint8) % 4
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, 512, 512, 3)
    for hue in (0.1, -0.1, 0.0837):
        clip = clips_at(SQUARE, [0], hue=np.float32(hue))
        np.testing.assert_array_equal(by_torch(colours, clip), published(colours, clip))


@pytest.mark.parametrize("view", ["rgb", "flow"])
@pytest.mark.parametrize("flow_colour", [True, False])
def test_planned_clips_are_the_published_ones(view, flow_colour):
    """Training pairs and jittered test windows with all draws; RGB and flow of a clip get the same."""
    data = DataConfig(frames=T, size=S, flow_colour=flow_colour)
    sources, videos = Sources(*(np.full(300, n) for n in (60, S, S))), np.arange(300)
    windows = Clips.concatenate([plan_windows(sources, video, data, 1, 10) for video in range(4)])
    errors = []
    for plan in (plan_pairs(sources, videos, data, 0, 0)[::20], with_test_jitter(windows, np.arange(300), 0)):
        for row in range(len(plan)):
            clip, pixels = plan[[row]], texture(row, S, S, T)
            applied = clip
            if view == "flow":
                pixels[..., 0] = 128
                if not flow_colour:
                    applied = dataclasses.replace(clips_at(SQUARE, [0]), flip=clip.flip)
            expected = published(pixels, applied)
            assert np.abs(by_torch(pixels, clip, view, data) - expected).max() <= (3 if applied.sigma[0] else 0)
            difference = np.abs(by_opencv(pixels, clip, view, data) - expected)
            assert difference.max() <= 16
            errors.append(difference.mean())
    assert np.mean(errors) < 0.2 and (np.array(errors) > 0).any() == (view == "rgb" or flow_colour)


def test_u_is_not_negated_by_a_flip():
    pixels = texture(0, S, S, T)
    pixels[..., 0] = 128
    clip = clips_at(SQUARE, [0], flip=True)
    for finish in (by_opencv, by_torch):
        np.testing.assert_array_equal(finish(pixels, clip, "flow"), pixels[:, :, ::-1])


def test_contrast_keeps_the_mean_of_each_frame_rather_than_128():
    dark = np.full((2, S, S, 3), 40, np.uint8)
    dark[1] = 90
    clip = clips_at(SQUARE, [0], contrast=np.float32(1.4))
    for finish in (by_opencv, by_torch):
        np.testing.assert_array_equal(finish(dark, clip), dark)


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.22, 1.23, 2.0])
def test_three_boxes_have_the_variance_of_the_gaussian(sigma):
    weights = box_weights(sigma)
    reach = len(weights) // 2
    offsets = np.arange(-reach, reach + 1)
    assert weights.sum() == pytest.approx(1) and (weights == weights[::-1]).all()
    assert 3 * (weights * offsets**2).sum() == pytest.approx(sigma**2)
    window = 256 * box_window(sigma)
    assert window.sum() == 256 and (window == np.round(window)).all() and len(window) % 2 == 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 40)])
def test_pictures_smaller_than_the_blur(shape):
    pixels = noise(1, 2, *shape)
    clip = clips_at(SQUARE, [0], sigma=np.float32(2.0))
    expected = published(pixels, clip).astype(int)
    assert np.abs(by_torch(pixels, clip) - expected).max() <= 3
    assert np.abs(by_opencv(pixels, clip) - expected).max() <= 4


def test_opencv_gives_the_same_with_any_number_of_threads():
    clip = clips_at(SQUARE, [0], brightness=1.2, saturation=0.7, hue=np.float32(0.06), sigma=np.float32(1.3))
    threads, pixels = cv2.getNumThreads(), noise()
    try:
        made = [(cv2.setNumThreads(count), by_opencv(pixels, clip))[1] for count in (1, 4)]
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(*made)
