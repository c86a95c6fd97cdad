"""The page of similar, duplicated and unusual videos: known neighbours, copies and outliers are found without
labels.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support.report.run_folders import FRAMES, Text, text_of, write_run, write_video
from torch import nn

from cpr_fast.cli import main
from cpr_fast.config import Config
from cpr_fast.config.recipes import retrieve_command
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.index.summary import COPIES
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import FeatureCache, video_digest, weights_digest
from cpr_fast.evaluate.features.embedding import Embedding
from cpr_fast.evaluate.features.recipe import make_recipe
from cpr_fast.evaluate.retrieval.ranking import Comparison, leading_views, prepare_streams
from cpr_fast.report.neighbours import confidence, duplicate_pairs, find_neighbours, odd_videos, pixel_agreement
from cpr_fast.report.run_folder import features as stored
from cpr_fast.report.run_folder.features import names_of
from cpr_fast.report.run_folder.run import Run
from cpr_fast.report.similar import similar_path, write_similar
from cpr_fast.report.unlabelled import compare_videos

COUNT, ODD = 12, 7  # video 1 is a copy of 0 (in bytes), 3 of 2 (in features only); ODD is far from all


def vectors(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(16, generator=generator)
    found = centre + torch.randn(COUNT, 16, generator=generator)
    found[1], found[3] = found[0] + 0.01, found[2] + 0.01
    found[ODD] = -3 * centre
    return found


def make_run(tmp_path, monkeypatch, *, views=("rgb", "flow"), labels=False, sources=False, store=True):
    """A run folder with stored features of COUNT videos, of a trained network and of another one."""
    data = tmp_path / "data"
    data.mkdir(parents=True)
    rows = ["path,label,source,split,num_frames,fps,width,height,flow_path"]
    for i in range(COUNT):
        if i == 1:
            shutil.copy(data / "v0.mp4", data / "v1.mp4")
        else:
            write_video(data / f"v{i}.mp4", i / 2)  # the grey levels of each differ
        source = f"s{i // 2}" if sources else ""
        rows.append(f"v{i}.mp4,{'cd'[i % 2] if labels else ''},{source},,{FRAMES},25,98,54,")
    index_csv = data / "index.csv"
    index_csv.write_text("\n".join(rows) + "\n")
    config = Config.from_dict({"data": {"index": str(index_csv), "split": ""}}).to_dict()
    run = write_run(tmp_path / "run", [{"kind": "run", "config": config}])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.pt").write_bytes(b"")
    encoders = {view: nn.Linear(2, 3) for view in views}
    monkeypatch.setattr(stored, "load_pretrained", lambda path: SimpleNamespace(encoders=encoders))
    if store:
        cache = FeatureCache(run / "features", make_recipe("paper").identity(Config().data, "cpu"))
        for number, view in enumerate(views):
            for key, values in (
                (weights_digest(encoders[view]), vectors(number)),
                ("untrained", torch.randn(COUNT, 16)),
            ):
                index = Index.load(index_csv)
                found = {video_digest(video, view): (values[i], 1) for i, video in enumerate(index)}
                cache.store(Embedding(view, encoders[view], key=key), found)
    return run, index_csv


@pytest.mark.parametrize("views", [("rgb",), ("rgb", "flow")])
def test_planted_copies_and_outliers_are_shown(tmp_path, monkeypatch, views):
    run, _ = make_run(tmp_path, monkeypatch, views=views)
    page = write_similar(run, tmp_path / "p.html", compare_videos(Run(run)))
    Text(page.read_text())
    text = text_of(page)
    assert COPIES in text and "The files are identical, byte for byte." in text
    labelled, _ = make_run(tmp_path / "other", monkeypatch, views=views, labels=True)  # classes c and d by turns
    said = "The files are identical, byte for byte, but their label differs."
    assert said in text_of(write_similar(labelled, tmp_path / "q.html", compare_videos(Run(labelled))))
    parts = ("Exact copies: 1 ", "Near-copies: 0 ", "1 other pair with a", "Odd The videos")
    copies, near, rest, odd = map(text.index, parts)
    assert (
        copies
        < text.index("v0.mp4 v1.mp4", copies)
        < near
        < rest
        < text.index("v2.mp4 v3.mp4 similarity 1.000", rest)
        < odd
    )
    assert "v0.mp4 v1.mp4" not in text[near:odd] and "<details" in page.read_text().split("1 other pair")[0][-80:]
    assert "Videos compared 11 of 12; 1 exact copy of another video is left out" in text
    odd = text[text.index("Odd The videos that are far") :]
    assert odd.index("v7.mp4") < odd.index("Odd:") < odd.index("Every video")
    known = {("rgb",): "Unknown: one view", ("rgb", "flow"): "The views RGB and Flow agree for"}
    assert known[views] in text and "With 11 videos" in text
    assert not re.search(r"<script|<link|(src|href)=\"https?:", page.read_text())


def test_equal_names_in_two_folders_are_told_apart():
    paths = ["spring/IMG_1.mp4", "autumn/old/IMG_1.mp4", "clips.lmdb#a/IMG_1"]
    videos = [Video(Path("data") / path, "", "", "", 9, 25.0, 8, 8) for path in paths]
    assert names_of(videos) == dict(zip(videos, paths, strict=True))
    assert list(names_of(videos[:1]).values()) == ["IMG_1.mp4"]


def test_siblings_tell_how_far_to_trust_it(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path, monkeypatch, views=("rgb",), sources=True)
    text = text_of(write_similar(run, tmp_path / "p.html", compare_videos(Run(run))))
    assert "10 videos that share a source with another one" in text and "chance: 10%" in text
    assert "v0.mp4 v1.mp4" not in text and "Exact copies: 0" in text  # siblings need no advice


def test_the_features_of_the_trained_network_are_taken(tmp_path, monkeypatch):
    run, index_csv = make_run(tmp_path, monkeypatch, views=("rgb",))
    found = stored.stored_features(run, Index.load(index_csv))
    torch.testing.assert_close(found.streams["rgb"], vectors(0))
    assert found.recipe == "paper" and found.metric == "cosine" and len(found.videos) == COUNT
    (tmp_path / "data" / "v5.mp4").write_bytes(b"another file now")
    assert len(stored.stored_features(run, Index.load(index_csv)).videos) == COUNT - 1
    shutil.rmtree(run / "features")
    assert stored.stored_features(run, Index.load(index_csv)) is None


def test_the_command_writes_both_pages(tmp_path, monkeypatch, capsys):
    run, _ = make_run(tmp_path, monkeypatch)
    assert Run(run).unlabelled
    assert main(["report", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"report": str(run / "report.html"), "similar": str(run / "report-similar.html")}
    assert 'href="report-similar.html"' in (run / "report.html").read_text()


def test_labelled_videos_get_the_second_page_on_request(tmp_path, monkeypatch, capsys):
    run, _ = make_run(tmp_path, monkeypatch, labels=True)
    assert main(["report", str(run), "--json"]) == 0
    assert "similar" not in json.loads(capsys.readouterr().out) and not similar_path(run / "report.html").exists()
    assert main(["report", str(run), "--unlabelled", "--json"]) == 0
    assert "similar" in json.loads(capsys.readouterr().out)


def test_without_stored_features_the_command_to_run_is_named(tmp_path, monkeypatch, capsys):
    run, _ = make_run(tmp_path, monkeypatch, store=False)
    assert main(["report", str(run)]) == 0
    assert "cpr-fast retrieve" in text_of(run / "report.html")
    assert main(["report", str(run), "--unlabelled"]) == 2
    assert "cpr-fast retrieve" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"gone.csv"):
        compare_videos(Run(run), tmp_path / "gone.csv")


@pytest.mark.parametrize("views", [("rgb",), ("rgb", "flow")])
def test_after_a_stopped_evaluation_what_is_missing_is_named(tmp_path, monkeypatch, capsys, views):
    """A stopped `retrieve` has stored the features of some videos; more epochs would not show what it measures."""
    run, index_csv = make_run(tmp_path, monkeypatch, views=views)
    (tmp_path / "data" / "v5.mp4").write_bytes((tmp_path / "data" / "v6.mp4").read_bytes() + b" ")  # without features
    monkeypatch.setattr(Run, "planned_epochs", None)  # a run whose training is not known to be unfinished
    command = retrieve_command(run, index_csv)
    assert command.endswith(" --clips 5")
    assert main(["report", str(run)]) == 0
    assert f"no evaluation of this run has finished. To make it: {command}" in capsys.readouterr().out
    first, second = (text_of(run / name) for name in ("report.html", "report-similar.html"))
    head = first[: first.index("Date")]
    assert "What would show it, the comparison with the untrained network, is missing" in head
    assert f"because no evaluation of this run has finished. Run `{command}`" in head
    assert "more epochs" not in first and "No retrieval yet: the videos have no labels" not in first
    assert f"those whose features are stored; to add the others: `{command}`" in second
    evaluated(run, index_csv)
    assert main(["report", str(run)]) == 0
    assert "no evaluation" not in capsys.readouterr().out
    for name in ("report.html", "report-similar.html"):
        assert "cpr-fast retrieve" not in text_of(run / name)  # what has no features now could not be read


@pytest.mark.parametrize("count", [2, 3, 30, 700])
def test_neighbours_are_those_of_all_pairs(count):
    generator = torch.Generator().manual_seed(count)
    streams = [torch.randn(count, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
    sources = torch.arange(count) // 2 if count > 3 else torch.arange(count)
    found = find_neighbours(streams, "cosine", sources)
    centred = [nn.functional.normalize(stream - stream.mean(0), dim=1) for stream in streams]
    total = sum(stream @ stream.T for stream in centred) / 2
    for video in range(count):
        allowed = [i for i in range(count) if sources[i] != sources[video]]
        expected = sorted((total[video, i].item() for i in allowed), reverse=True)[:5]
        assert found.similarity[video, : len(expected)].tolist() == pytest.approx(expected)
        assert not set(found.index[video, : len(expected)].tolist()) - set(allowed)


@pytest.mark.parametrize("metric", ["cosine", "plain_cosine"])
@pytest.mark.parametrize("widths", [(7,), (7, 29)])
def test_neighbours_are_those_of_retrieve(metric, widths):
    """With IIC's metric retrieval concatenates the features of both views, so the views need not weigh the same."""
    count, generator = 40, torch.Generator().manual_seed(0)
    streams = [(i + 1) * torch.randn(count, width, generator=generator) + 1 for i, width in enumerate(widths)]
    sources = torch.arange(count) // 2
    found = find_neighbours(streams, metric, sources)
    if metric == "plain_cosine":
        units = nn.functional.normalize(torch.cat(streams, 1), dim=1)
        total = units @ units.T
    else:
        centred = [nn.functional.normalize(stream - stream.mean(0), dim=1) for stream in streams]
        total = sum(units @ units.T for units in centred) / len(centred)
    expected = total.masked_fill(sources[:, None] == sources, -torch.inf).topk(5)
    assert torch.equal(found.index, expected.indices)
    torch.testing.assert_close(found.similarity, expected.values)
    compared = Comparison(prepare_streams(streams, streams, metric), metric, sources, sources)
    assert [compared.nearest(i, 5) for i in range(count)] == found.index.tolist()


@pytest.mark.parametrize(
    ("views", "compared"),
    [(["rgb"], ["rgb"]), (["flow", "rgb"], ["rgb", "flow"]), (["rgb", "residual"], ["rgb", "residual"]),
     (["rgb", "flow", "residual"], ["rgb", "flow"]), (["flow", "residual"], ["residual"]), ([], [])],
)  # fmt: skip
def test_the_views_that_are_compared_are_those_of_retrieve(views, compared):
    assert leading_views(views) == compared


def test_the_first_page_says_what_the_neighbours_show(tmp_path, monkeypatch):
    """A reader of the first page need not open the second one for it."""
    run, _ = make_run(tmp_path, monkeypatch, sources=True)
    assert main(["report", str(run)]) == 0
    head = text_of(run / "report.html")
    head = head[: head.index("Date")]
    assert "The videos have no labels, so retrieval cannot be measured; " in head
    assert "Nearest neighbours, confidence " in head and "the nearest video is of the same source (chance: 10%)" in head
    assert "The views RGB and Flow agree for" in head


def test_copies_and_one_source():
    streams = [torch.eye(6).repeat_interleave(2, 0)]  # six pairs of equal features
    found = find_neighbours(streams, "plain_cosine", torch.arange(12))
    assert [(a, b) for a, b, _ in duplicate_pairs(found)] == [(2 * i, 2 * i + 1) for i in range(6)]
    found = find_neighbours(
        streams, "plain_cosine", torch.zeros(12, dtype=torch.int64)
    )  # then only the video itself is left out
    assert found.index[:, 0].tolist() == [i ^ 1 for i in range(12)]
    assert len(odd_videos(found)) == 12 and all(distance == 0 for _, _, distance in odd_videos(found))


def test_pixels_of_equal_inverted_and_flat_pictures():
    noise = Image.effect_noise((8 * 128, 96), 80)
    inverted = noise.point(lambda level: 255 - level)
    assert pixel_agreement(noise, noise, 8) == pytest.approx(1) and pixel_agreement(noise, inverted, 8) < -0.9
    assert pixel_agreement(noise, Image.new("L", noise.size, 90), 8) == pytest.approx(0)


def test_collapsed_features_are_not_to_be_trusted():
    line = torch.linspace(-1, 1, COUNT)[:, None] * torch.ones(16)
    found = find_neighbours([line], "cosine", torch.arange(COUNT))
    level, reasons = confidence({"rgb": line}, "cosine", torch.arange(COUNT), found, None)
    assert level == "low" and "hardly tells these videos apart" in reasons[0]


@pytest.mark.parametrize("sources", [torch.arange(COUNT), torch.arange(COUNT) // 2])
def test_two_collapsed_views_do_not_vouch_for_each_other(sources):
    """Equal features of two views find the same neighbours, those first in the index: agreement proves nothing."""
    streams = dict.fromkeys(("rgb", "flow"), torch.linspace(-1, 1, COUNT)[:, None] * torch.ones(16))
    found = find_neighbours(list(streams.values()), "cosine", sources)
    level, reasons = confidence(streams, "cosine", sources, found, None)
    assert level == "low" and not any("agree" in reason for reason in reasons)


def test_black_bars_do_not_make_videos_alike():
    strips = [Image.effect_noise((8 * 128, 96), 80) for _ in range(2)]
    for strip in strips:
        strip.paste(0, (0, 0, 8 * 128, 14))
        strip.paste(0, (0, 82, 8 * 128, 96))
    assert abs(pixel_agreement(*strips, 8)) < 0.2


def evaluated(run: Path, index_csv: Path, **rates) -> None:
    """Writes the rows of an evaluation of the trained and the untrained network without labels."""
    row = {"kind": "retrieval", "protocol": "leave_source_out", "recipe": "paper", "view": "rgb", "r@1": None,
           "map": None, "queries": 5, "gallery": 5, "indexes": [str(index_csv)]}  # fmt: skip
    same = {"kind": "same_video", "recipe": "paper", "view": "rgb", "chance_r@1": 0.2, "videos": 5, "copies": 1}
    rates = {"r@1": 0.8, "r@1_ci95": [0.6, 0.9], "difference": 0.4, "difference_ci95": [0.1, 0.6]} | rates
    rows = [row | {"name": "trained"}, same | {"name": "trained"} | rates, same | {"name": "untrained", "r@1": 0.4}]
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row | {"r@1_ci95": row.get("r@1_ci95")}) + "\n" for row in rows)


def test_both_pages_are_of_the_evaluated_index_and_name_it(tmp_path, monkeypatch):
    """Not of the training index, whose videos may be others."""
    run, index_csv = make_run(tmp_path, monkeypatch)
    few = index_csv.with_name("few.csv")
    few.write_text("".join(index_csv.read_text().splitlines(keepends=True)[:6]))
    evaluated(run, few)
    assert main(["report", str(run)]) == 0
    first, second = (text_of(run / name) for name in ("report.html", "report-similar.html"))
    assert f"Training index {index_csv} " in first
    assert f"Retrieval on {few}: 5 queries, 5 gallery videos, leave_source_out, test-time recipe paper" in first
    assert f"Index of these videos {few} Training index {index_csv} Videos compared 4 of 5; 1 exact copy" in second
    assert "Exact copies: 1 " in second and "v7.mp4" not in second
    assert "1 exact copy of another video is left out, because a copy is the same video." in first


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({}, "unknown"),
        ({"difference": -0.1, "difference_ci95": [-0.3, 0.2]}, "low"),
        ({"r@1": 0.15, "difference": 0.1, "difference_ci95": [0.05, 0.2]}, "low"),  # better than before, below chance
    ],
)
def test_both_pages_have_one_confidence(tmp_path, monkeypatch, rates, said):
    run, index_csv = make_run(tmp_path, monkeypatch, views=("rgb",))
    evaluated(run, index_csv, **rates)
    assert main(["report", str(run)]) == 0
    first, second = (text_of(run / name) for name in ("report.html", "report-similar.html"))
    assert f"Nearest neighbours, confidence {said}: " in first
    assert f"How reliable this page is {said.capitalize()}: " in second
    assert (
        "No view finds clips of the same video more often than both the untrained network and chance." in second
    ) == (said == "low")
    assert ("nothing below shows that this run learnt" in first) == (said == "low")


@pytest.mark.parametrize(
    ("doubts", "meaning"), [((), "So similarity is about more"), (("It failed.",), "does not show")]
)
def test_a_thumbnail_that_finds_others_proves_nothing_where_the_confidence_is_low(doubts, meaning):
    """Pairs of siblings are each other's nearest by the network, and never by the thumbnails."""
    generator = torch.Generator().manual_seed(0)
    centres, sources = torch.randn(COUNT // 2, 16, generator=generator), torch.arange(COUNT) // 2
    streams = {"rgb": centres[sources] + 0.01 * torch.randn(COUNT, 16, generator=generator)}
    pixels = torch.randn(COUNT, 16, generator=generator)
    found = find_neighbours(list(streams.values()), "cosine", sources)
    level, reasons = confidence(streams, "cosine", sources, found, pixels, doubts)
    assert level == ("low" if doubts else "high") and reasons[: len(doubts)] == list(doubts)
    assert [meaning in reason for reason in reasons if "a thumbnail of the middle frame" in reason] == [True]
