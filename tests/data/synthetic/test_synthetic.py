"""The synthetic actions are reproducible, only the motion tells the class, and the data set can be written twice."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import pytest

from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.motions import MOTIONS, Motion
from cpr_fast.data.synthetic.render import render
from cpr_fast.data.synthetic.scenes import SCENES
from cpr_fast.data.synthetic.sources import make_source
from cpr_fast.data.synthetic.versions import DEFAULT, VERSIONS
from cpr_fast.data.synthetic.videos import class_table, write_synthetic
from cpr_fast.errors import InputError

TINY = {"classes": 4, "videos": 4, "frames": 10, "width": 48, "height": 40}


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "set"
    return write_synthetic(out, **TINY)


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("classes", [4, 6, 7, 9, 10, 12, 17, 35, 36])
def test_every_motion_and_scene_is_shared(classes):
    pairs = class_table(classes)
    assert len(set(pairs)) == len(pairs) == classes
    scenes_of, motions_of = defaultdict(set), defaultdict(set)
    for motion, scene in pairs:
        assert motion in MOTIONS and scene in SCENES
        scenes_of[motion].add(scene)
        motions_of[scene].add(motion)
    assert min(map(len, scenes_of.values())) >= 2
    assert min(map(len, motions_of.values())) >= 2


@pytest.mark.parametrize("classes", [-1, 0, 1, 3, 5, 37])
def test_class_counts_that_cannot_share_are_refused(classes, tmp_path):
    with pytest.raises(InputError, match=f"^--classes: expected 4 or 6..36.*{classes}"):
        write_synthetic(tmp_path / "out", classes=classes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "value"), [("videos", 1), ("seed", -1), ("frames", 0), ("width", 33), ("height", 16), ("width", -2)]
)
def test_arguments_out_of_range_are_refused(setting, value, tmp_path):
    option = f"--{setting}" if setting in ("videos", "seed") else setting
    with pytest.raises(InputError, match=f"^{option}: expected .* got {value}"):
        write_synthetic(tmp_path / "out", **{**TINY, setting: value})


def test_index_holds_every_clip_and_siblings_stay_in_one_split(tiny_set):
    index = Index.load(tiny_set)
    assert len(index) == 4 * (4 + 2)  # every second source gives two clips
    assert index.classes == sorted("-".join(pair) for pair in class_table(4))
    splits, labels, clips = defaultdict(set), defaultdict(set), defaultdict(int)
    for video in index:
        splits[video.source].add(video.split)
        labels[video.source].add(video.label)
        clips[video.source] += 1
        assert (video.num_frames, video.width, video.height, video.fps) == (10, 48, 40, 25)
    assert all(len(where) == 1 for where in splits.values()) and all(len(which) == 1 for which in labels.values())
    assert len(splits) == 4 * 4 and sorted(clips.values()) == [1] * 8 + [2] * 8
    for label in index.classes:
        sources = {video.source: video.split for video in index if video.label == label}
        assert sorted(sources.values()) == ["test", "train", "train", "train"]


def test_files_are_h264_that_decodes_to_what_was_rendered(tiny_set):
    path = tiny_set.parent / "train" / "rotate-stripes" / "g01_c01.mp4"
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    rng = np.random.default_rng((0, 0, 0, 0))
    source = make_source("rotate", "stripes", rng, height=40, width=48, version=VERSIONS[DEFAULT])
    rendered = render(source, int(rng.integers(0, 10)), 10, rng)
    assert decoded.shape == rendered.shape
    # colour is stored at half resolution, so brightness is compared
    difference = decoded.astype(float).mean(-1) - rendered.astype(float).mean(-1)
    assert np.sqrt(np.mean(difference**2)) < 12
    assert np.corrcoef(decoded.mean(-1).ravel(), rendered.mean(-1).ravel())[0, 1] > 0.95


def test_same_seed_same_bits_on_one_core_and_many(tiny_set, tmp_path):
    out = str(tmp_path / "set")
    code = f"from cpr_fast.data.synthetic.videos import write_synthetic; write_synthetic({out!r}, **{TINY})"
    if hasattr(os, "sched_setaffinity"):
        code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.cpu_count = lambda: 1\n" + code
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert digest(tmp_path / "set") == digest(tiny_set.parent)


def test_another_seed_gives_other_videos(tiny_set, tmp_path):
    other = digest(write_synthetic(tmp_path / "set", seed=1, **TINY).parent)
    same = digest(tiny_set.parent)
    assert other.keys() == same.keys()
    assert not any(other[name] == same[name] for name in same if name.endswith(".mp4"))


def test_a_complete_set_is_reused_and_other_settings_are_refused(tiny_set):
    video = next(tiny_set.parent.rglob("*.mp4"))
    before = video.stat().st_mtime_ns
    assert write_synthetic(tiny_set.parent, **TINY) == tiny_set
    assert video.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="'seed': 0.*asked for.*'seed': 5"):
        write_synthetic(tiny_set.parent, seed=5, **TINY)


def test_a_reused_set_with_a_missing_video_is_an_error(tmp_path):
    index = write_synthetic(tmp_path / "set", **TINY)
    victim = next((tmp_path / "set").rglob("*.mp4"))
    victim.unlink()
    with pytest.raises(InputError, match=victim.name):
        write_synthetic(index.parent, **TINY)


def test_a_reused_set_may_have_lost_its_flow(tmp_path):
    path = write_synthetic(tmp_path / "set", **TINY)
    index = Index.load(path)
    (tmp_path / "lost.mp4").touch()
    Index(dataclasses.replace(video, flow_path=tmp_path / "lost.mp4") for video in index).save(path)
    (tmp_path / "lost.mp4").unlink()
    assert write_synthetic(tmp_path / "set", **TINY) == path


def test_an_interrupted_set_is_made_anew(tiny_set, tmp_path, monkeypatch):
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(
            "cpr_fast.data.synthetic.videos.build_index", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            write_synthetic(out, seed=3, **TINY)
    (out / "train" / "rotate-stripes" / "g01_c01.mp4").write_bytes(b"half a file")
    write_synthetic(out, **TINY)
    assert digest(out) == digest(tiny_set.parent)


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.mp4").write_bytes(b"precious")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        write_synthetic(tmp_path, **TINY)
    assert (tmp_path / "train" / "mine.mp4").read_bytes() == b"precious"


@pytest.mark.parametrize("version", [-1, 0, 1, 3, 6])
def test_an_unknown_version_is_refused(version, tmp_path):
    with pytest.raises(InputError, match=f"^--version: expected one of 2, 5, got {version}$"):
        write_synthetic(tmp_path / "out", version=version)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_programme_keeps_the_pace_it_is_given(motion):
    """The rms speed over figure and time, from finite differences on a disc of points, is the given one. The amount
    of motion therefore does not tell the class.
    """
    pace = Motion(speed=2.0, period=18.0, radius=20.0, direction=0.7, sign=-1.0, phase=0.3)
    time = np.linspace(0, 4000, 400_001)
    pose = MOTIONS[motion](pace, time)
    x, y, scale = pose.dx, pose.dy, np.exp(pose.log_scale) * np.ones(len(time))
    speeds = []
    for radius in 20 * np.sqrt([0.1, 0.3, 0.5, 0.7, 0.9]):  # rings of equal area
        angle = pose.angle + 1.1
        px, py = x + radius * scale * np.cos(angle), y + radius * scale * np.sin(angle)
        speeds.append(np.mean(np.gradient(px, time) ** 2 + np.gradient(py, time) ** 2))
    assert np.sqrt(np.mean(speeds)) == pytest.approx(2.0, rel=0.2)


def test_siblings_share_the_take_but_not_the_moment():
    rng = np.random.default_rng(0)
    source = make_source("glide", "blobs", rng, height=60, width=80, version=VERSIONS[2])
    first, later = (render(source, start, 8, np.random.default_rng(1)) for start in (0, 40))
    colour = [clip.reshape(-1, 3).mean(0) for clip in (first, later)]
    other = render(
        make_source("glide", "blobs", rng, height=60, width=80, version=VERSIONS[2]), 0, 8, np.random.default_rng(1)
    )
    assert np.abs(colour[0] - colour[1]).max() < np.abs(colour[0] - other.reshape(-1, 3).mean(0)).max()
    assert np.abs(first.astype(int) - later).mean() > 5


@pytest.mark.parametrize("version", VERSIONS.values(), ids=lambda version: f"version {version.number}")
def test_frames_do_not_depend_on_where_a_clip_is_cut(version):
    source = make_source("orbit", "checks", np.random.default_rng(2), height=40, width=48, version=version)
    quiet = source.__class__(**{**source.__dict__, "noise": 0.0})
    whole = render(quiet, 0, 30, np.random.default_rng(0))
    part = render(quiet, 13, 9, np.random.default_rng(0))
    np.testing.assert_array_equal(whole[13:22], part)
