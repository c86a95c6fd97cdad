"""What each version of the synthetic actions states about itself, and that a version's pixels stay what they are."""

import dataclasses
import itertools

import numpy as np
import pytest

from cpr_fast.data.synthetic.motions import MOTIONS
from cpr_fast.data.synthetic.render import render
from cpr_fast.data.synthetic.scenes import SCENES, scene_texture
from cpr_fast.data.synthetic.sources import make_source
from cpr_fast.data.synthetic.versions import VERSIONS

LUMA = np.array([0.299, 0.587, 0.114])


# Mean red, green and blue, standard deviation, and mean change from frame to frame, in levels of 0..255.
@pytest.mark.parametrize(
    ("version", "motion", "scene", "expected"),
    [
        (2, "rotate", "stripes", (118.178, 97.023, 68.100, 43.634, 5.274)),
        (2, "glide", "zigzag", (60.992, 120.787, 102.377, 44.649, 5.005)),
        (4, "rotate", "stripes", (110.451, 117.272, 80.882, 52.313, 18.260)),
        (4, "glide", "zigzag", (115.338, 104.789, 174.990, 62.622, 18.985)),
    ],
)
def test_the_pixels_of_a_version_never_change(version, motion, scene, expected):
    rng = np.random.default_rng((0, 1))
    clip = render(make_source(motion, scene, rng, height=40, width=48, version=VERSIONS[version]), 7, 12, rng)
    change = np.abs(np.diff(clip.astype(float), axis=0)).mean()
    np.testing.assert_allclose([*clip.mean((0, 1, 2)), clip.std(), change], expected, atol=0.02)


def test_the_mean_colour_of_a_clip_tells_the_scene_less_in_version_4():
    """The scene of the source with the nearest mean colour, among 20 sources of each scene; chance is 1/6."""

    def right(version):
        colours, scenes = [], []
        for scene, number in itertools.product(SCENES, range(20)):
            rng = np.random.default_rng((SCENES.index(scene), number))
            source = make_source("rock", scene, rng, height=32, width=32, version=version)
            colours.append(render(source, int(rng.integers(0, 48)), 8, rng).mean((0, 1, 2)))
            scenes.append(scene)
        distances = np.linalg.norm(np.array(colours)[:, None] - np.array(colours), axis=-1)
        np.fill_diagonal(distances, np.inf)
        return np.mean(np.array(scenes)[distances.argmin(1)] == scenes)

    assert right(VERSIONS[2]) > 0.7
    assert right(VERSIONS[4]) < 0.5


def test_the_hue_of_version_4_changes_within_a_video_and_leaves_the_luma_and_so_the_flow():
    rng = np.random.default_rng(4)
    source = make_source("shuttle", "checks", rng, height=48, width=64, version=VERSIONS[4])
    still = dataclasses.replace(source, hue=None)
    with_hue, without = (render(each, 0, 20, np.random.default_rng(0)).astype(float) for each in (source, still))
    inside = ((with_hue > 0) & (with_hue < 255) & (without > 0) & (without < 255)).all(-1)  # not clipped
    assert inside.mean() > 0.7
    assert np.abs((with_hue - without) @ LUMA)[inside].max() < 2
    chroma = with_hue.mean((1, 2)) - (with_hue.mean((1, 2)) @ LUMA)[:, None]  # [T, 3]
    angles = chroma @ chroma.T / np.outer(*2 * [np.linalg.norm(chroma, axis=1)])
    assert angles.min() < np.cos(np.radians(20))


def test_paces_of_version_4_keep_all_motions_apart():
    version = VERSIONS[4]
    assert set(version.pace) == set(MOTIONS)
    low, high = version.pace_range
    paces = sorted(version.pace.values())
    assert all(slow * high < fast * low for slow, fast in itertools.pairwise(paces))


def test_sources_of_a_class_are_more_alike_in_version_4():
    """Sources of one class differ less from one another in what a video keeps: the luma of its mean frame's spectrum,
    which tells the pattern apart from its place, in units of its mean."""

    def spread(version):
        spectra = []
        for number in range(12):
            rng = np.random.default_rng(number)
            source = make_source("rock", "stripes", rng, height=48, width=64, version=version)
            luma = render(source, 0, 1, rng)[0] @ LUMA
            spectra.append(np.abs(np.fft.rfft2(luma - luma.mean())))
        return np.std(spectra, axis=0).mean() / np.mean(spectra)

    assert spread(VERSIONS[4]) < 0.9 * spread(VERSIONS[2])


def test_a_clip_of_the_quick_start_shows_a_whole_period_of_version_4_or_nearly():
    version = VERSIONS[4]
    ticks = 8 * version.step  # a clip of 8 frames, stride 1
    assert version.period[1] <= 1.2 * ticks


@pytest.mark.parametrize(("version", "upright"), [(2, False), (4, True)])
def test_patterns_of_version_4_stand_upright(version, upright):
    """Stripes that stand change across, not down."""
    pieces = [
        scene_texture("stripes", 0.3, 64, 64, 16, np.random.default_rng(seed), VERSIONS[version]) for seed in range(12)
    ]
    ratios = [np.abs(np.diff(piece, axis=0)).mean() / np.abs(np.diff(piece, axis=1)).mean() for piece in pieces]
    assert (max(ratios) < 1) == upright
