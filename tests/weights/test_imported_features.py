"""An imported checkpoint gives the published features: from the frames of a video to the feature of retrieval.

The reference cuts the decoded frames with PIL as the published code does, and computes the published network in
float64. No option is given: the clips, the views and the recipe come from the imported checkpoint.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.numbered_videos import decode_linearly, write_video
from support.published.files import coclr_file, iic_file, milnce_file
from support.published.networks import MODELS, iic_maps, milnce_features
from torch import Tensor
from torch.nn import functional as F

from cpr_fast.cli import main
from cpr_fast.data.clips.sampling import Sources, plan_windows
from cpr_fast.data.index.index import Index, Video
from cpr_fast.evaluate.features.cache import embed_index
from cpr_fast.evaluate.features.embedding import encoder_embeddings
from cpr_fast.evaluate.features.pretrained import load_pretrained
from cpr_fast.evaluate.features.recipe import default_recipe, make_recipe
from cpr_fast.evaluate.features.windows import open_windows
from cpr_fast.weights.checkpoint import load_checkpoint, save_checkpoint
from cpr_fast.weights.importing import import_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def moving_textures(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """Smooth random colours that move: uint8 [F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    wide = np.asarray(picture.resize((width + 4 * frames, height), Image.Resampling.BICUBIC))
    return np.stack([wide[:, (2 + seed % 3) * i : (2 + seed % 3) * i + width] for i in range(frames)])


def write_index(folder, videos: int, frames: int, height: int, width: int) -> Index:
    rows = []
    for number in range(videos):
        path = write_video(folder / f"{number}", moving_textures(number, frames, height, width), "mpeg4-avi")
        split = "train" if number % 2 else "test"
        label = f"class{number // 2 % 2}"
        rows.append(Video(path, label, f"source{number}", split, frames, 25.0, width, height))
    index = Index(rows)
    index.save(folder / "index.csv")
    return Index.load(folder / "index.csv")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Index:
    """A video of the size that CoCLR's and MIL-NCE's crop of 224 is published for, with two windows of 32 frames."""
    return write_index(tmp_path_factory.mktemp("large"), 1, 47, 256, 320)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Index:
    """Videos of two classes and splits; IIC resizes their frames anyway."""
    return write_index(tmp_path_factory.mktemp("small"), 4, 34, 48, 80)


def imported(theirs, folder) -> str:
    """Imports a published file; `data.exact` makes the clips independent of the machine."""
    torch.save(theirs, folder / "theirs.pth")
    import_checkpoint(folder / "theirs.pth", folder / "ours.pt")
    payload = load_checkpoint(folder / "ours.pt")
    payload["config"]["data"] |= {"exact": True, "workers": 1}
    payload.pop("format"), payload.pop("version")
    return str(save_checkpoint(folder / "ours.pt", payload))


def retrieved_features(checkpoint: str, index: Index) -> dict[str, Tensor]:
    """Returns the features that `retrieve` compares: {view: [M, F]}."""
    pretrained = load_pretrained(checkpoint)
    recipe = make_recipe(default_recipe(pretrained.data))
    embeddings = encoder_embeddings("net", pretrained.encoders, recipe, dict.fromkeys(pretrained.encoders, ""))
    views = list(pretrained.encoders)
    found, _ = embed_index(index, embeddings, lambda part: open_windows(part, pretrained.data, views, recipe, "cpu"))
    return {name.split("/")[1]: value for name, value in found.items()}


def windows(checkpoint: str, index: Index, video: int, clips: int | None = None) -> list[np.ndarray]:
    """Returns the decoded frames of every window of a video, uint8 [T, H, W, 3]. `tests/data/clips` checks which
    windows there are."""
    data = load_pretrained(checkpoint).data
    clips = make_recipe(default_recipe(data), clips).clips_per_video
    frames = decode_linearly(index[video].path)
    starts = plan_windows(Sources.of(index, data), video, data, clips).start
    return [frames[start : start + data.frames] for start in starts]


def pixels(frames: np.ndarray, cut) -> Tensor:
    """Cuts frames with PIL: uint8 [T, H, W, 3] -> float64 [1, 3, T, S, S] in 0..1."""
    cut_frames = np.stack([np.asarray(cut(Image.fromarray(frame))) for frame in frames])
    return torch.from_numpy(cut_frames).permute(3, 0, 1, 2)[None].double() / 255


def centre_224(picture: Image.Image) -> Image.Image:
    left, top = round((picture.width - 224) / 2), round((picture.height - 224) / 2)
    return picture.crop((left, top, left + 224, top + 224))


def resized_112(picture: Image.Image) -> Image.Image:
    """Resize((128, 171)), CenterCrop(112) of torchvision."""
    left, top = round((171 - 112) / 2.0), round((128 - 112) / 2.0)
    return picture.resize((171, 128), Image.Resampling.BILINEAR).crop((left, top, left + 112, top + 112))


def doubles(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("kind", "gated"), [("infonce", False), ("ubernce", True), ("cpr", False)])
def test_coclr_and_cpr(tmp_path, large, kind, gated):
    torch.manual_seed(0)
    theirs = coclr_file(kind, gated=gated)
    model = MODELS[kind](0.125, 16, 32, gated)
    model.load_state_dict(theirs["state_dict"])
    backbone = model.encoder_q[0].double().eval()
    checkpoint = imported(theirs, tmp_path)
    checkpoint = checkpoint if kind != "cpr" else f"rgb={checkpoint}"
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = []
    with torch.no_grad():
        for frames in windows(checkpoint, large, 0):
            clip = pixels(frames, lambda picture: centre_224(picture).resize((128, 128), Image.Resampling.BICUBIC))
            wanted.append(F.normalize(backbone((clip - mean) / std).mean((2, 3, 4)), dim=1))
    assert len(wanted) == 2
    found = retrieved_features(checkpoint, large)
    assert list(found) == ["rgb"] and found["rgb"].shape == (1, 128)  # 1,024 at width 1
    assert relative_difference(found["rgb"], torch.stack(wanted).mean(0)) < 1e-5


def test_milnce(tmp_path, large):
    torch.manual_seed(1)
    theirs = milnce_file(8)
    checkpoint = imported(theirs, tmp_path)
    state = doubles(theirs)
    wanted = [
        F.normalize(milnce_features(state, pixels(frames, centre_224)), dim=1)
        for frames in windows(checkpoint, large, 0)
    ]
    assert len(wanted) == 2
    found = retrieved_features(checkpoint, large)["rgb"]
    assert relative_difference(found, torch.stack(wanted).mean(0)) < 1e-5


def iic_reference(
    checkpoint: str, state: dict[str, Tensor], index: Index, video: int, clips: int | None = None
) -> dict[str, Tensor]:
    """Returns the features of IIC's `retrieve_clips.py` for one video, [1, F] of each view and merged."""
    state, features = doubles(state), {"rgb": [], "residual": []}
    for frames in windows(checkpoint, index, video, clips):
        rgb = pixels(frames, resized_112)
        residual = (rgb - torch.roll(rgb, 1, 2) + 1) / 2
        for view, clip in (("rgb", rgb), ("residual", residual)):
            features[view].append(F.max_pool3d(iic_maps(state, clip), (1, 2, 2)).flatten(1))
    assert len(features["rgb"]) == (clips or 10)
    means = {view: torch.stack(values).mean(0) for view, values in features.items()}
    return means | {"merged": torch.cat([means["rgb"], means["residual"]], 1)}


@pytest.mark.parametrize(
    "arch", ["r3d", pytest.param("r21d", marks=pytest.mark.slow), pytest.param("c3d", marks=pytest.mark.slow)]
)
def test_iic(tmp_path, small, arch):
    torch.manual_seed(2)
    theirs = iic_file(arch)
    checkpoint = imported(theirs, tmp_path)
    found = retrieved_features(checkpoint, Index([small[0]]))
    wanted = iic_reference(checkpoint, theirs["model"], small, 0)
    assert list(found) == ["rgb", "residual"]
    for view, features in found.items():
        assert features.shape == (1, 64 * 2 * 3 * 3)  # 9,216 at width 1
        assert relative_difference(features, wanted[view]) < 1e-5


@pytest.fixture(scope="module")
def iic(tmp_path_factory):
    torch.manual_seed(3)
    theirs = iic_file("r3d")
    return imported(theirs, tmp_path_factory.mktemp("iic")), theirs["model"]


def test_retrieve_measures_rgb_residual_and_both_merged(iic, small, capsys):
    checkpoint, state = iic
    index = str(small[0].path.with_name("index.csv"))
    assert main(["retrieve", checkpoint, "--index", index, "--clips", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["view"]: row for row in result["results"] if row["name"] == "trained"}
    assert (list(rows), result["recipe"], result["view"]) == (["rgb", "residual", "merged"], "iic", "merged")
    reference = [iic_reference(checkpoint, state, small, video, 2) for video in range(len(small))]
    train, test = ([i for i, video in enumerate(small) if video.split == split] for split in ("train", "test"))
    labels = np.array([video.label for video in small])
    for view, row in rows.items():
        features = F.normalize(torch.cat([each[view] for each in reference]), dim=1)
        nearest = np.array(train)[(features[test] @ features[train].T).argmax(1).numpy()]
        assert row["r@1"] == (labels[nearest] == labels[test]).mean(), view
    assert main(["retrieve", f"residual={checkpoint}", "--index", index, "--clips", "2"]) == 0
    assert "Trained · Residual" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["probe", "finetune"])
def test_classifiers_use_the_published_clips_of_both_views(iic, small, capsys, task):
    index = str(small[0].path.with_name("index.csv"))
    assert main([task, iic[0], "--index", index, "--epochs", "1", "--batch-size", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["recipe"], result["crops"]) == ("iic", 1)
    assert [row["view"] for row in result["results"]][:3] == ["rgb", "residual", "merged"]
