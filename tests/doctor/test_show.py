"""`show-sample`: the picture contains exactly the pixels of the training batch."""

import numpy as np
import pytest
from PIL import Image
from support.numbered_videos import decode_linearly, write_video

pytest.importorskip("nvidia.dali")

from cpr_fast.cli import main
from cpr_fast.config import DataConfig
from cpr_fast.config.pixels import IMAGENET_MEAN, IMAGENET_STD
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.build import build_index
from cpr_fast.data.index.index import Index
from cpr_fast.doctor.sample import LABEL_HEIGHT, show_sample
from cpr_fast.errors import InputError

DATA = DataConfig(frames=18, size=32, batch_size=3)


@pytest.fixture(scope="module")
def index_csv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    (folder / "a").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        blocks = rng.integers(0, 256, (40, 6, 8, 3)).astype(np.uint8)
        write_video(folder / "a" / f"v{i}", blocks.repeat(8, 1).repeat(8, 2), "mjpeg-mkv")
    (folder / "a" / "v0.mkv").rename(folder / "a" / "gone.mkv")
    build_index(folder, out=folder / "index.csv")
    (folder / "a" / "gone.mkv").write_bytes(b"")
    return folder / "index.csv"


def test_the_sheet_is_the_batch(index_csv, tmp_path):
    index = Index.load(index_csv)
    loader = TrainLoader(index, DATA, ["rgb", "residual"], seed=3)
    batch = next(loader.epoch(2))
    loader.close()
    place = next(i for i, video in enumerate(batch.video.tolist()) if video != 0)
    video = int(batch.video[place])
    said = show_sample(index, DATA, seed=3, epoch=2, position=video, out=tmp_path / "s.png", views=["rgb", "residual"])
    assert said["starts"] == batch.start[place].tolist() and said["path"] == str(index[video].path)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (4 * (LABEL_HEIGHT + 2 * 32), 16 * 32, 3)  # 18 frames take two rows of 16
    for strip, (view, clip) in enumerate([(view, clip) for view in ("rgb", "residual") for clip in (0, 1)]):
        pixels = batch.clips[view][place, clip].permute(1, 2, 3, 0).numpy()
        levels = np.rint(np.clip(255 * (pixels * IMAGENET_STD + IMAGENET_MEAN), 0, 255))
        for t in (0, 15, 16, 17):
            top, left = strip * (LABEL_HEIGHT + 64) + LABEL_HEIGHT + t // 16 * 32, t % 16 * 32
            error = np.abs(sheet[top : top + 32, left : left + 32] - levels[t])
            assert error.max() <= (view == "residual")  # half levels may be rounded up or down
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_the_video_has_every_frame_of_both_clips(index_csv, tmp_path, suffix):
    out = tmp_path / f"s.{suffix}"
    show_sample(Index.load(index_csv), DATA, seed=0, epoch=0, position=1, out=out, views=["rgb", "residual"])
    assert decode_linearly(out).shape == (18, 64, 64, 3)


def test_the_recipe_of_the_index_is_used(index_csv, tmp_path, capsys, monkeypatch):
    """As `doctor` does: the picture of other settings would not be what the network sees."""
    monkeypatch.chdir(tmp_path)
    rows = index_csv.read_text().splitlines()
    split = rows[0].split(",").index("split")
    cells = [row.split(",") for row in rows[1:]]
    for number, row in enumerate(cells):
        row[0], row[split] = str(index_csv.parent / row[0]), "train" if number > 1 else "test"
    (tmp_path / "i.csv").write_text("\n".join([rows[0], *map(",".join, cells)]))
    arguments = ["show-sample", "i.csv", "--out", "s.png"]
    recipe = "[data]\nindex = 'i.csv'\nframes = 6\nsize = 32\nsplit = 'train'\n"
    (tmp_path / "r.toml").write_text(recipe)
    assert main(arguments) == 0
    assert Image.open(tmp_path / "s.png").size == (6 * 32, 2 * (LABEL_HEIGHT + 32))
    out = capsys.readouterr().out
    assert f"path: {cells[2][0]}\n" in out  # number 0 of the split that the recipe trains on
    assert "settings: r.toml, which names this index; to use others: --config RECIPE.toml\n" in out
    assert "next: open s.png, which shows what the network sees\n" in out
    (tmp_path / "r2.toml").write_text(recipe)
    assert main([*arguments, "--index", "1"]) == 0
    out = capsys.readouterr().out
    assert f"path: {cells[1][0]}\n" in out  # number 1 of the index
    assert "the defaults; several recipes name this index (r.toml, r2.toml); to use others: --config" in out
    assert "what the network sees" not in out


def test_the_command_and_bad_input(index_csv, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text("[data]\nframes = 6\nsize = 32\naugment = 'iic'\nsplit = ''\n")
    arguments = ["show-sample", str(index_csv), "--index", "2", "--epoch", "1", "--views", "rgb"]
    assert main([*arguments, "--config", str(config), "--out", str(tmp_path / "x" / "s.png")]) == 0
    assert Image.open(tmp_path / "x" / "s.png").size == (6 * 32, 2 * (LABEL_HEIGHT + 32))
    out = capsys.readouterr().out
    assert "starts: " in out and f"settings: {config}\n" in out and f"next: open {tmp_path}/x/s.png" in out
    assert main([*arguments, "--out", str(tmp_path / "defaults.png")]) == 0
    assert "settings: the defaults; to use others: --config RECIPE.toml\n" in capsys.readouterr().out
    for bad, message in [
        (["--out", str(tmp_path / "s.txt")], "expected the name of a picture"),
        (["--out", str(tmp_path / "s.png"), "--index", "4"], "expected a video in 0..3, got 4"),
        (["--out", str(tmp_path / "s.png"), "--index", "0"], "gone.mkv"),
        (
            ["--out", str(tmp_path / "s.png"), "--views", "flow"],
            "--views: expected views that every video has, got 'flow', but 4 of 4 videos have no flow_path in the "
            f"index (first: '{index_csv.parent}/a/gone.mkv'); to compute their flow: cpr-fast flow {index_csv} --out ",
        ),
    ]:
        assert main([*arguments, *bad]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="got -1"):
        show_sample(Index.load(index_csv), DATA, seed=0, epoch=0, position=-1, out=tmp_path / "s.png", views=["rgb"])
