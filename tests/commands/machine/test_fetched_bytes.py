"""What commands fetch of videos on a server: no byte twice, whatever they read the videos for."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from support import own_networks
from support.data_sets.tar_files import write_tar
from support.machine.http_server import Served, serving
from support.machine.new_process import as_a_new_process
from support.videos.odd_videos import write_streams

pytest.importorskip("nvidia.dali", reason="the videos are decoded")
pytest.importorskip("fsspec", reason="fsspec is an extra: pip install fsspec aiohttp")
pytest.importorskip("aiohttp", reason="aiohttp is an extra: pip install fsspec aiohttp")

from cpr_fast.cli import main
from cpr_fast.data.files import remote
from cpr_fast.data.files.cached.recent import RecentRanges
from cpr_fast.data.files.ranges import FIRST_BYTES
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.index import catalogue
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.media import read_frames
from cpr_fast.report.figures.film_strip import strip_image

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 30
RECIPE = """
[data]
frames = 8
size = 16
workers = 2
batch_size = 3
[model]
arch = "net.py:Tokens"
args = { depth = 1 }
"""


def noise(seed: int, height: int, width: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(FRAMES)]


def write_avi(path: Path, frames: list[np.ndarray]) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=25, options={"g": "30"})
        stream.bit_rate = 2**24
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    """Videos of several hundred kB, so that the ranges of FFmpeg's first reads do not hold all of one: MP4s, whose
    table of frames is at the end, an AVI file, which is decoded from its start, and Matroska."""
    folder = tmp_path_factory.mktemp("videos")
    made = [write_streams(folder / "a.mp4", noise(0, 96, 128)), write_streams(folder / "b.mp4", noise(1, 112, 112))]
    made += [write_streams(folder / "c.mkv", noise(2, 96, 128)), write_avi(folder / "d.avi", noise(3, 144, 160))]
    assert min(path.stat().st_size for path in made) > 2 * FIRST_BYTES
    return made


@pytest.fixture
def server(videos, tmp_path, monkeypatch):
    """A server of the videos, which the folder "set" of it lists, and an index of them in the current folder."""
    with serving({f"/set/class/{path.name}": path.read_bytes() for path in videos}) as served:
        urls = [Path(f"{served.url}{name}") for name in served.files]
        monkeypatch.setattr(catalogue, "remote_files", lambda root: urls)
        monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01, 0.01))
        monkeypatch.chdir(tmp_path)
        own_networks.write(tmp_path)
        (tmp_path / "clips.toml").write_text(RECIPE)
        assert main(["index", f"{served.url}/set", "--out", "index.csv", "--no-verify"]) == 0
        as_a_new_process()
        served.sent.clear()
        yield served
        as_a_new_process()


def shares(served: Served) -> dict[str, float]:
    """Returns by file the bytes that were sent of it over its size."""
    return {name: round(served.sent[name] / len(data), 2) for name, data in served.files.items()}


# Each reads every video whole: to count or decode its packets, or because a first read proves which frame is where.
COMMANDS = {
    "index": "index {root} --out new.csv --verify",
    "index, packets": "index {root} --out new.csv --no-verify",
    "index, copies": "index {root} --out new.csv --transcode copies --short-side 32",
    "flow": "flow index.csv --out flow",
    "embed": "embed index.csv --encoder clips.toml --samples 4 --out store --device cpu",
    "doctor": "doctor index.csv --config clips.toml --seconds 0",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_fetches_every_video_once(server, name, capsys):
    try:
        code = main(COMMANDS[name].format(root=f"{server.url}/set").split())
    except SystemExit as left:
        code = left.code
    assert code == (name == "doctor"), capsys.readouterr().err  # which finds too few videos
    found = shares(server)
    assert all(1.0 <= share <= 1.1 for share in found.values()), found


def test_pictures_of_a_report_fetch_every_video_once(server):
    for video in Index.load("index.csv"):
        assert strip_image(video.path, video.num_frames, 0, video.num_frames) is not None
        assert strip_image(video.path, video.num_frames, 3, 8) is not None
    assert all(1.0 <= share <= 1.1 for share in shares(server).values()), shares(server)


def test_tar_files_are_listed_and_their_videos_read_once(server, videos):
    shard = write_tar(Path("s.tar"), {f"class/{path.name}": path.read_bytes() for path in videos})
    server.files = {"/s.tar": shard.read_bytes()}
    assert main(["index", f"{server.url}/s.tar", "--layout", "tar", "--out", "tar.csv", "--verify"]) == 0
    for video in Index.load("tar.csv"):
        assert strip_image(video.path, video.num_frames, 0, video.num_frames) is not None
    assert 0.9 <= shares(server)["/s.tar"] <= 1.1


def test_copies_of_a_server_are_those_of_the_files(server, videos, monkeypatch):
    monkeypatch.setattr(REMOTE, "_recent", RecentRanges(0))  # as if the videos were too large for it
    assert main(["index", f"{server.url}/set", "--out", "far.csv", "--transcode", "far", "--short-side", "32"]) == 0
    assert all(1.0 <= share <= 1.1 for share in shares(server).values()), shares(server)
    for path in videos:
        (Path("near/class") / path.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, Path("near/class") / path.name)
    assert main(["index", "near", "--out", "near.csv", "--transcode", "copies", "--short-side", "32"]) == 0
    far, near = Index.load("far.csv"), Index.load("near.csv")
    assert len(far) == len(near) == len(videos)
    for one, other in zip(far, near, strict=True):
        assert (one.num_frames, one.fps, one.label) == (other.num_frames, other.fps, other.label)
        frames = [read_frames(v.path, np.arange(FRAMES), "rgb", FRAMES) for v in (one, other)]
        assert np.array_equal(*frames)
    assert sorted(path.name for path in Path("far/class").iterdir()) == sorted(
        path.name for path in Path("copies/class").iterdir()
    )  # nothing temporary is left
