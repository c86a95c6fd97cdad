"""`doctor` on stores of features: what is missing, damaged or not finite is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.data_sets.small_stores import make_store

from cpr_fast.cli import main
from cpr_fast.data.features.clips import Clip
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.index.index import Index, Video
from cpr_fast.doctor import checks
from cpr_fast.doctor.stores.check import check_store


def check(folder: Path, videos=None) -> tuple[dict | None, list[tuple[str, str]]]:
    findings: list = []
    result = check_store(folder, videos, findings)
    return result, [(finding.level, finding.text) for finding in findings]


def change(path: Path, edit) -> None:
    """Replaces the tensors of a shard by what `edit` makes of them."""
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    save_file(edit(tensors) or tensors, path)


def test_a_whole_store_has_nothing_to_change(tmp_path):
    make_store(tmp_path / "store", widths={"rgb": 16, "flow": 8})
    result, found = check(tmp_path / "store")
    assert result == {
        "folder": str(tmp_path / "store"), "clips": 61, "planned": 61, "samples": 3, "views": {"rgb": 16, "flow": 8},
        "dtype": "float16",
    }  # fmt: skip
    assert [level for level, _ in found] == ["ok", "ok"]
    assert "the views have different dimensions (rgb 16, flow 8)" in found[0][1]
    assert "61 clips, all features are finite; dimensions: rgb 16, flow 8" in found[1][1]


def test_clips_of_urls_are_found_in_an_index(tmp_path):
    urls = ["https://host/a.mp4?key=1", "s3://bucket/b.mp4", "s3://bucket/c.mp4"]
    make_store(tmp_path / "store", [*map(Clip, urls), Clip("d.mp4")])
    paths = [*map(Path, urls[:2]), Path("s3://bucket/other.mp4"), tmp_path / "store" / "d.mp4"]
    videos = Index(Video(path, "", "", "", 3, 10.0, 48, 32) for path in paths)
    result, found = check(tmp_path / "store", videos)
    assert result["missing"] == 1 and "index are not in the store: s3://bucket/other.mp4" in found[0][1]
    assert [video.path for video in StoredClips.open(tmp_path / "store")][:3] == list(map(Path, urls))


def test_an_unfinished_store_is_named(tmp_path):
    make_store(tmp_path / "store")
    about = json.loads((tmp_path / "store" / "store.json").read_text()) | {"shards": None, "digest": ""}
    (tmp_path / "store" / "store.json").write_text(json.dumps(about))
    (tmp_path / "store" / "flow-00001.safetensors").unlink()
    result, found = check(tmp_path / "store")
    assert result is None
    assert found == [("error", found[0][1])] and "is not complete, 1 of its 3 shards are missing" in found[0][1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "the shard is missing"),
        (cut, "expected a safetensors file, got a damaged one"),
        (lambda path: change(path, lambda t: t.update(samples=t["samples"][:, :, :-1].copy())), "expected samples"),
        (lambda path: path.write_bytes(b""), "expected a safetensors file, got a damaged one"),
    ],
    ids=["missing", "half written", "other dimensions", "empty"],
)
def test_a_damaged_shard_is_named(tmp_path, damage, said):
    make_store(tmp_path / "store")
    damage(tmp_path / "store" / "flow-00001.safetensors")
    result, found = check(tmp_path / "store")
    assert result is None and len(found) == 1 and found[0][0] == "error"
    assert "flow-00001.safetensors" in found[0][1] and said in found[0][1]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_feature_that_is_not_finite_is_named_with_its_clip(tmp_path, value):
    """Also one of the samples that no evaluation reads, and in every view that has one."""
    store = make_store(tmp_path / "store")
    for view in ("rgb", "flow"):
        change(tmp_path / "store" / f"{view}-00002.safetensors", lambda t: t["samples"].__setitem__((4, 2, 1), value))
    _, found = check(tmp_path / "store")
    assert [level for level, _ in found] == ["error", "error"]
    for view, (_, text) in zip(("rgb", "flow"), found, strict=True):
        assert f"{view}-00002.safetensors" in text and f"row 50, {store.table.paths[50]!r}" in text


def test_equal_features_of_all_clips_are_an_error(tmp_path):
    make_store(tmp_path / "store", count=20)
    change(tmp_path / "store" / "rgb-00000.safetensors", lambda t: t["samples"].fill(0.5))
    _, found = check(tmp_path / "store")
    assert found == [("error", f"{tmp_path / 'store'}: all 20 clips have the same feature of the view 'rgb'")]


def placed(store, folder: Path) -> list:
    """Returns the clips of a store as the rows of an index, with paths as if the store were `folder`."""
    return [
        dataclasses.replace(video, path=folder / path)
        for video, path in zip(StoredClips(store), store.table.paths, strict=True)
    ]


def test_the_videos_that_a_store_lacks_are_named(tmp_path):
    large, small = make_store(tmp_path / "a" / "large", count=30), make_store(tmp_path / "a" / "small", count=25)
    videos = placed(large, small.folder)
    result, found = check(small.folder, videos)
    assert result["missing"] == 5
    texts = [text for level, text in found if level == "warning"]
    assert len(texts) == 1 and "5 of the 30 videos of the index are not in the store: " in texts[0]
    assert str(videos[25].path) in texts[0] and texts[0].endswith(", ...")
    videos = placed(small, large.folder)
    videos[3] = dataclasses.replace(videos[3], label="another")
    result, found = check(large.folder, videos)
    assert result["missing"] == 0
    assert [text for level, text in found if level == "warning"] == [
        f"{large.folder}: 1 of the 25 videos of the index have another label or split in the store: {videos[3].path}",
        f"{large.folder}: 5 clips of the store are not in the index",
    ]


def test_the_command_takes_a_store_alone_or_beside_an_index(tmp_path, capsys, monkeypatch):
    store = make_store(tmp_path / "a store").folder
    for name in ("codecs", "machine", "optional_parts", "kernels", "packages"):
        monkeypatch.setattr(checks, name, lambda *_: {})
    assert main(["doctor", str(store)]) == 0
    printed = capsys.readouterr().out
    assert "61 clips, all features are finite" in printed
    assert f"cpr-fast pretrain RECIPE --data.features '{store}'" in printed
    cut(store / "rgb-00000.safetensors")
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(store), "--json"])
    assert left.value.code == 1 and json.loads(capsys.readouterr().out)["store"] is None
    assert main(["doctor", str(store), "--features", str(store)]) == 2
    assert "INDEX: expected the index that --features is compared with" in capsys.readouterr().err
    assert main(["doctor", "--features", str(tmp_path)]) == 2
    assert "--features: expected a store of features" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert "INDEX: expected a file" in capsys.readouterr().err
