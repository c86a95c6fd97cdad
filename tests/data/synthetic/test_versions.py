"""What each version of the synthetic actions states about itself, and that a version's pixels stay what they are."""

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
        (5, "rotate", "stripes", (121.392, 99.084, 69.968, 45.108, 7.339)),
        (5, "glide", "zigzag", (60.195, 115.812, 101.031, 43.206, 7.619)),
    ],
)
def test_the_pixels_of_a_version_never_change(version, motion, scene, expected):
    rng = np.random.default_rng((0, 1))
    clip = render(make_source(motion, scene, rng, height=40, width=48, version=VERSIONS[version]), 7, 12, rng)
    change = np.abs(np.diff(clip.astype(float), axis=0)).mean()
    np.testing.assert_allclose([*clip.mean((0, 1, 2)), clip.std(), change], expected, atol=0.02)


def test_the_mean_colour_of_a_clip_tells_the_scene_less_in_version_5():
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
    assert right(VERSIONS[5]) < 0.6


def test_sources_of_a_class_are_more_alike_in_version_5():
    """Sources of one class differ less from one another in what a video keeps: the spectrum of a frame's luma, which
    holds the pattern without its place, in units of its mean."""

    def spread(version):
        spectra = []
        for number in range(12):
            rng = np.random.default_rng(number)
            source = make_source("rock", "stripes", rng, height=48, width=64, version=version)
            luma = render(source, 0, 1, rng)[0] @ LUMA
            spectra.append(np.abs(np.fft.rfft2(luma - luma.mean())))
        return np.std(spectra, axis=0).mean() / np.mean(spectra)

    assert spread(VERSIONS[5]) < 0.9 * spread(VERSIONS[2])


def test_paces_of_version_5_overlap_less():
    """Of two motions that follow each other in pace, the share of the slower one's range that both have."""

    def overlap(version):
        assert set(version.pace) == set(MOTIONS)
        low, high = version.pace_range
        paces = sorted(version.pace.values())
        return max(
            0, max((slow * high - fast * low) / (slow * (high - low)) for slow, fast in itertools.pairwise(paces))
        )

    assert overlap(VERSIONS[5]) < 0.7 * overlap(VERSIONS[2])


def test_a_clip_of_the_quick_start_shows_a_whole_period_of_version_5_or_nearly():
    version = VERSIONS[5]
    ticks = 8 * version.step  # a clip of 8 frames, stride 1
    assert version.period[1] <= 1.2 * ticks


@pytest.mark.parametrize(("version", "upright"), [(2, False), (5, True)])
def test_patterns_of_version_5_stand_upright(version, upright):
    """Stripes that stand change across, not down."""
    pieces = [
        scene_texture("stripes", 0.3, 64, 64, 16, np.random.default_rng(seed), VERSIONS[version]) for seed in range(12)
    ]
    ratios = [np.abs(np.diff(piece, axis=0)).mean() / np.abs(np.diff(piece, axis=1)).mean() for piece in pieces]
    assert (max(ratios) < 1) == upright
