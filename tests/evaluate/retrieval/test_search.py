"""Searching encoded videos with an untrained network: copies find their source after every change made to them."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from support.videos.timed_videos import mixed_times, write_timed

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from cpr_fast.cli import main
from cpr_fast.config import Config
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.data.video.decode import frame_times, read_frames
from cpr_fast.data.video.probe import probe_video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.embedding import calibrate_batch_norm
from cpr_fast.evaluate.features.recipe import make_recipe
from cpr_fast.evaluate.features.windows import open_windows
from cpr_fast.evaluate.retrieval.ranking import encoders_together
from cpr_fast.evaluate.retrieval.search import _open_queries, search
from cpr_fast.models import build_encoder
from cpr_fast.report.figures.contact_sheet import WIDTH, sheet_height
from cpr_fast.weights.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
# A residual network: a deep plain network with random weights turns a small difference in pixels into a large one in
# features.
MODEL = {"arch": "r3d", "width": 0.125, "head": "pooled", "feature_dim": 64}
CONFIG = Config.from_dict({"data": {"frames": 8, "size": 32, "workers": 1}, "model": MODEL})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    """(an index of 12 videos with flow, a two-view checkpoint of random weights whose BatchNorm has seen them)."""
    folder = tmp_path_factory.mktemp("search")
    index_csv = write_synthetic(folder / "data", classes=4, videos=2, frames=20, width=64, height=48)
    write_flow(index_csv, folder / "flow")
    torch.manual_seed(0)
    encoders = {view: build_encoder(CONFIG.model).eval() for view in ("rgb", "flow")}
    windows = open_windows(Index.load(index_csv), CONFIG.data, list(encoders), make_recipe("paper", 1), "cpu")
    with closing(windows):
        calibrate_batch_norm(encoders, windows)
    payload = {"config": CONFIG.to_dict(), "encoders": {view: e.state_dict() for view, e in encoders.items()}}
    return index_csv, save_checkpoint(folder / "run" / "checkpoints" / "last.pt", payload)


def write_copy(source: Path, target: Path, *, frames: int = 20, crop: int = 0, scale: int = 1, crf: str = "30") -> Path:
    """Encodes the video again with another codec setting, cropped by `crop` pixels on every side and scaled by
    `scale`.
    """
    pixels = read_frames(source, np.arange(frames), "rgb", 20)
    if crop:
        pixels = pixels[:, crop:-crop, crop:-crop]
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"crf": crf})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return target


def test_videos_of_the_index_find_themselves_and_copies_their_source(data, tmp_path, capsys):
    index_csv, checkpoint = data
    index = Index.load(index_csv)
    asked = [index[3].path, write_copy(index[7].path, tmp_path / "again.mp4"),
             write_copy(index[6].path, tmp_path / "cropped.mkv", crop=2),
             write_copy(index[11].path, tmp_path / "large.mp4", scale=3)]  # fmt: skip
    command = ["search", *map(str, asked), "--index", str(index_csv), "--checkpoint", str(checkpoint), "--top", "4"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["views"] == ["rgb", "flow"] and result["note"] is None and result["videos"] == len(index)
    assert [query["path"] for query in result["queries"]] == list(map(str, asked))
    for query, source in zip(result["queries"], (3, 7, 6, 11), strict=True):
        found = query["results"]
        assert [row["rank"] for row in found] == [1, 2, 3, 4]
        assert found[0]["path"] == str(index[source].path) and found[0]["label"] == index[source].label
        similarities = [row["similarity"] for row in found]
        assert similarities == sorted(similarities, reverse=True) and -1 <= similarities[-1] <= similarities[0] < 1.0001
        with Image.open(query["picture"]) as picture:
            picture.load()
            assert picture.size == (WIDTH, sheet_height(4)) and picture.format == "JPEG"
    assert result["queries"][0]["results"][0]["similarity"] == pytest.approx(1, abs=1e-3)
    stored = {path: path.stat().st_mtime_ns for path in checkpoint.parents[1].joinpath("features").iterdir()}
    assert main([*command, "--out", str(tmp_path / "sheets")]) == 0
    assert "again.mp4" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {
        f"{name}.jpg" for name in (asked[0].stem, "again", "cropped", "large")
    }
    assert {path: path.stat().st_mtime_ns for path in stored} == stored  # the features of the queries are not stored


def test_without_flow_in_the_index_rgb_alone_is_compared_and_said(data, tmp_path):
    index_csv, checkpoint = data
    index = Index.load(index_csv)
    (tmp_path / "a").mkdir()
    same_name = [write_copy(index[i].path, tmp_path / folder / "v.mp4") for i, folder in ((0, ""), (5, "a"))]
    lines = index_csv.read_text().splitlines()
    plain = index_csv.with_name("plain.csv")
    plain.write_text("\n".join([lines[0]] + [line.rpartition(",")[0] + "," for line in lines[1:]]) + "\n")
    names = []

    def draw(name, query, found):
        assert query.path.exists()
        names.append(name)
        return Path(name)

    result = search(same_name, plain, checkpoint, top=100, draw=draw, device="cpu", cache=False)
    assert result["views"] == ["rgb"] and result["note"].startswith("flow is left out: it is missing for 12 of 12")
    assert [query["results"][0]["path"] for query in result["queries"]] == [str(index[i].path) for i in (0, 5)]
    assert {len(query["results"]) for query in result["queries"]} == {12} and names == ["v-1", "v-2"]


@pytest.mark.parametrize(
    ("views", "flow", "compared", "note"),
    [
        (("rgb", "flow"), True, ["rgb", "flow"], None),
        (
            ("rgb", "flow", "residual"),
            True,
            ["rgb", "flow"],
            "residual is left out: retrieval compares two views, rgb and",
        ),
        (("flow", "residual"), True, ["residual"], "flow is left out: retrieval does not compare it together with"),
        (
            ("rgb", "flow", "residual"),
            False,
            ["rgb", "residual"],
            "flow is left out: it is missing for 1 of 1 video of the index",
        ),
    ],
)
def test_the_views_of_a_search_are_those_that_retrieve_compares(views, flow, compared, note):
    """The similarities of three views are never added, because no evaluation measures that order."""
    index = Index([Video(Path("v.mp4"), "", "s", "", 9, 25.0, 8, 8, Path("v.flow") if flow else None)])
    found, said = encoders_together(dict.fromkeys(views), index, True, "--index")
    assert list(found) == compared and (said is None if note is None else said.startswith(note))
    assert encoders_together(dict.fromkeys(views), index, False, "--index")[0].keys() >= set(compared) & {"rgb"}
    with pytest.raises(InputError, match="--index: expected stored flow of every video, got none of 1 of 1 video"):
        encoders_together({"flow": None}, Index([replace(index[0], flow_path=None)]), True, "--index")


def test_a_bad_query_is_named(data, tmp_path):
    index_csv, checkpoint = data
    source = Index.load(index_csv)[0].path
    whole = source.read_bytes()
    (tmp_path / "torn.mp4").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "empty.mp4").touch()
    write_copy(source, tmp_path / "short.mp4", frames=5)
    for name, message in {
        "gone.mp4": "gone.mp4' does not exist",
        "torn.mp4": "torn.mp4': expected a video, got",
        "empty.mp4": "empty.mp4': expected a video, got",
        "short.mp4": "short.mp4': expected more than 5 frames, half a clip, got 5",
    }.items():
        with pytest.raises(InputError, match=message):
            search([source, tmp_path / name], index_csv, checkpoint, device="cpu")
    for arguments, message in {(): "QUERIES: expected at least one", (source,): "--top: expected at least 1"}.items():
        with pytest.raises(InputError, match=message):
            search(arguments, index_csv, checkpoint, top=0, device="cpu")


def test_the_length_of_a_query_counts_samples_of_its_time(data, tmp_path):
    index = Index.load(data[0])
    query = write_copy(index[0].path, tmp_path / "q.mp4")  # 20 frames, 25 per second
    for fps, message in {0.0: None, 6.8: None, 6.5: "more than 5 frames at 6.5 per second, half a clip, got 5"}.items():
        settings = replace(CONFIG.data, fps=fps, flow="vectors")
        if message is None:
            assert _open_queries([query], tmp_path, index, settings)[0].num_frames == 20
            continue
        with pytest.raises(InputError, match=message):
            _open_queries([query], tmp_path, index, settings)


def _times_s(path: Path) -> list[Fraction]:
    ticks, clock = frame_times(path, 30)
    return [(tick - ticks[0]) * clock for tick in ticks.tolist()]


def test_a_query_that_is_scaled_keeps_the_times_of_its_frames(data, tmp_path):
    query = write_timed(tmp_path / "q", mixed_times(30))
    small = replace(Index.load(data[0])[0], width=40, height=32)
    (opened,) = _open_queries([query], tmp_path, Index([small]), replace(CONFIG.data, fps=10.0))
    assert opened.path != query and opened.height == 32
    assert _times_s(opened.path) == _times_s(query)
    assert opened.fps == pytest.approx(probe_video(query).fps) and probe_video(query).variable_rate
