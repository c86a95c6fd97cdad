"""The synthetic actions: a labelled set of encoded videos, made from a seed.

**A class** is a pair of a motion programme and a kind of scene, such as "orbit-stripes". Every kind of scene occurs
with at least two motions and every motion with at least two kinds of scene. Therefore neither the motion nor the
scene alone determines the class, but both together do. With 12 classes each of four scenes occurs with three of four
motions, so knowing only the motion or only the scene leaves three possible classes.

**Videos of one class share**, as in real footage, where for example pools are blue and sprints are fast:

- of the motion, the programme (rotate, shuttle, pulse, orbit, rock, glide: see `motions.MOTIONS`) and a typical pace
  (`Version.pace`);
- of the scene, the pattern (stripes, checks, blobs, rings, dots, zigzag) of figures and background, its typical size
  and colours, and the outline of the figures.

Pace, size and colours are weak cues: those of neighbouring motions and scenes overlap, and none of them gives more
information about the class than the motion or the scene does.

**Source videos differ** in the following, drawn in the same way for every class: hues around those of the scene (dark
and bright in random order); place, angle and wavelength of each pattern; number, size, place and texture of the
figures; pace (around that of the motion); period (shorter where growing or rocking at that pace would go too far);
direction, sense and phase of each figure (so that in version 2 the direction of the mean flow gives no information
about the class; in version 5 shuttling figures go up and down, and gliding ones left or right); one or two
distractors of any kind of scene that drift without a programme; camera drift, light fall-off, change of lighting and
sensor noise. Clips of one source (siblings) share all of these. They are cut at different times, so phase, camera
position, lighting and noise differ. `versions.VERSIONS` has the ranges.

Every second source gives two clips, the others give one. A quarter of the sources of each class are the test split.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from cpr_fast.data.index.build import build_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.motions import MOTIONS
from cpr_fast.data.synthetic.render import render
from cpr_fast.data.synthetic.scenes import SCENES
from cpr_fast.data.synthetic.sources import make_source
from cpr_fast.data.synthetic.versions import DEFAULT, version_of
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import naming, one_writer, replacing
from cpr_fast.runtime.progress import as_finished, track
from cpr_fast.wording import counted

SETTINGS = "synthetic.json"  # written last, so a folder that has it holds a complete set
LOCK = ".synth.lock"
UNFINISHED = "synthetic.unfinished"  # present while a set is being written


def class_table(classes: int) -> list[tuple[str, str]]:
    """Returns (motion, scene) of each class. Raises InputError for a number of classes that cannot share every motion
    and every scene."""
    largest = min(len(MOTIONS), len(SCENES)) ** 2
    if classes != 4 and not 6 <= classes <= largest:
        raise InputError(
            f"--classes: expected 4 or 6..{largest}, so that classes share motions and scenes, got {classes}"
        )
    side = math.isqrt(classes - 1) + 1
    motions, scenes = list(MOTIONS)[:side], SCENES[:side]
    # Diagonal by diagonal: two diagonals already give every motion two scenes and every scene two motions.
    pairs = [(motion, scenes[(i + shift) % side]) for shift in range(side) for i, motion in enumerate(motions)]
    return pairs[:classes]


def write_synthetic(
    out: str | Path,
    *,
    classes: int = 12,
    videos: int = 24,
    seed: int = 0,
    frames: int = 48,
    width: int = 160,
    height: int = 120,
    version: int = DEFAULT,
    progress: bool = False,
) -> Path:
    """Writes OUT/<split>/<motion>-<scene>/gNN_cMM.mp4 (H.264) and OUT/index.csv; returns the index's path.

    `videos` is the number of source videos of each class, `frames` the length of a clip, `width` and `height` are
    pixels. `version` is one of `versions.VERSIONS`: 5 has 12.5 frames per second, 2 has 25. The files are determined,
    bit for bit, by the arguments and the versions of NumPy and x264. A complete set of the same arguments is reused,
    and an interrupted one is written again. Raises InputError for an argument out of its range, and if OUT holds
    other files.
    """
    out = Path(out)
    _check_arguments(videos, seed, frames, width, height)
    pairs = class_table(classes)
    version_of(version)  # raises an error before anything is written
    settings = {"version": version, "classes": classes, "videos": videos, "seed": seed, "frames": frames}
    settings |= {"width": width, "height": height}
    index_path = out / "index.csv"
    if not _is_complete(out, settings):
        with one_writer(out / LOCK, f"OUT: another command is writing the data set {str(out)!r}"):
            if not _is_complete(out, settings):  # another command may have ended in between
                _write_set(out, index_path, pairs, videos, frames, settings, progress)
    Index.load(index_path, require_flow=False)
    return index_path


def _write_set(
    out: Path,
    index_path: Path,
    pairs: list[tuple[str, str]],
    videos: int,
    frames: int,
    settings: dict[str, int],
    progress: bool,
) -> None:
    _start_afresh(out)
    sources = [(pair, number) for pair in pairs for number in range(videos)]

    def write(item: tuple[tuple[str, str], int]) -> int:
        return _write_source(out, *item, settings)

    # NumPy and x264 work without the interpreter's lock.
    with closing(as_finished(write, sources, os.cpu_count() or 1)) as written:
        done = track(written, "writing videos", total=len(sources), unit="sources", progress=progress)
        clips = sum(done)
    index, broken = build_index(out, "folders", out=index_path, progress=progress)
    if broken or len(index) != clips or any(video.num_frames != frames for video in index):
        wrote = f"{counted(clips, 'video')} of {counted(frames, 'frame')}"
        raise RuntimeError(f"{out}: wrote {wrote}, found {len(index)}; broken: {broken}")
    with replacing(out / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings))
    (out / UNFINISHED).unlink(missing_ok=True)


class ClipName(NamedTuple):
    """The path of a clip below the folder of the set, in its parts: SPLIT/LABEL/FILE."""

    split: str
    label: str
    file: str


def clip_names(pair: tuple[str, str], number: int, videos: int) -> list[ClipName]:
    """Returns the paths of the clips of source `number`, of the `videos` sources of a class."""
    split = "train" if number < videos - max(1, round(videos / 4)) else "test"
    return [ClipName(split, "-".join(pair), f"g{number + 1:02d}_c{clip + 1:02d}.mp4") for clip in range(1 + number % 2)]


def _write_source(out: Path, pair: tuple[str, str], number: int, settings: dict[str, int]) -> int:
    """Renders and encodes the clips of one source; returns their number."""
    motion, scene = pair
    key = (settings["seed"], list(MOTIONS).index(motion), SCENES.index(scene), number)
    rng = np.random.default_rng(key)
    version = version_of(settings["version"])
    source = make_source(motion, scene, rng, height=settings["height"], width=settings["width"], version=version)
    names = clip_names(pair, number, settings["videos"])
    start = 0
    for name in names:
        start += int(rng.integers(0, settings["frames"]))  # clips of one source do not overlap
        clip = render(source, start, settings["frames"], rng)
        start += settings["frames"]
        path = out / name.split / name.label / name.file
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path, "the set is unfinished, and the same command writes it again"):
            _encode(path, clip, version.fps)
    return len(names)


def _encode(path: Path, clip: np.ndarray, fps: float) -> None:
    """Writes uint8 RGB [T, H, W, 3] as H.264 yuv420p with a key frame every 12 frames."""
    # One thread, because the bits depend on the number of x264's frame threads. No macroblock tree, because for frames
    # of a few dozen pixels its look-ahead reads memory that was never written, and the bits change from run to run.
    options = {"preset": "veryfast", "crf": "20", "g": "12", "bf": "0", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _check_arguments(videos: int, seed: int, frames: int, width: int, height: int) -> None:
    if videos < 2:
        raise InputError(f"--videos: expected at least 2 source videos per class, one for each split, got {videos}")
    if seed < 0:
        raise InputError(f"--seed: expected a whole number of at least 0, got {seed}")
    if frames < 1:
        raise InputError(f"frames: expected at least 1, got {frames}")
    for name, value in (("width", width), ("height", height)):
        if value < 32 or value % 2:
            raise InputError(f"{name}: expected an even number of at least 32 pixels, got {value}")


def _is_complete(out: Path, settings: dict[str, int]) -> bool:
    """Returns whether OUT holds the set of these settings. Raises InputError if it holds another set or other files."""
    if (out / SETTINGS).exists():
        there = _read_settings(out / SETTINGS)
        if there != settings:
            raise InputError(f"folder {str(out)!r} holds the set {there}, asked for {settings}; choose another folder")
        return True
    if out.exists() and not (out / UNFINISHED).exists() and (not out.is_dir() or set(os.listdir(out)) - {LOCK}):
        raise InputError(f"folder {str(out)!r}: expected a new or empty folder, or a set of synthetic actions")
    return False


def _read_settings(path: Path) -> dict[str, int]:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{str(path)!r}: expected the settings of a set as JSON; choose another folder") from None


def _start_afresh(out: Path) -> None:
    """Marks OUT as unfinished and removes the files that an interrupted run left in it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).touch()
    for split in ("train", "test"):
        shutil.rmtree(out / split, ignore_errors=True)
