"""Compares retrieval with brute force in NumPy float64; a stand-in for the loader returns known windows."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cpr_fast.commands.evaluation.retrieve import lines_of
from cpr_fast.config import DataConfig
from cpr_fast.data.index.index import Index, IndexFileError, Video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import embed_index
from cpr_fast.evaluate.features.embedding import Embedding, calibrate_batch_norm, encoder_embeddings
from cpr_fast.evaluate.features.recipe import make_recipe
from cpr_fast.evaluate.retrieval import ranking
from cpr_fast.evaluate.retrieval.queries import QueryScores, hits_at_1
from cpr_fast.evaluate.retrieval.ranking import Comparison, prepare
from cpr_fast.evaluate.retrieval.retrieve import evaluate


def video(number: int, label: str, source: str, split: str) -> Video:
    return Video(Path(f"{number}.mp4"), label, source, split, 40, 25.0, 64, 48, None)


class Windows:
    """Gives 1 to 3 noisy windows per video around a point that depends on its path; videos in `broken` give none."""

    def __init__(self, index: Index, broken: tuple[str, ...] = (), batch_size: int = 5) -> None:
        windows, self.skipped, self.closed = [], [], False
        for position, entry in enumerate(index):
            rng = np.random.default_rng(int(entry.path.stem))
            if entry.path.stem in broken:
                self.skipped.append((entry.path, "does not decode"))
            else:
                centre = rng.normal(size=12) + (0 if entry.label == "" else 2 * len(entry.label))
                windows += [(position, centre + 0.3 * rng.normal(size=12)) for _ in range(rng.integers(1, 4))]
        self.windows = windows
        self.batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]

    def __len__(self):
        return len(self.batches)

    def close(self):
        self.closed = True

    def __iter__(self):
        for batch in self.batches:
            values = torch.tensor(np.stack([value for _, value in batch]), dtype=torch.float32)
            clips = values.view(-1, 3, 4, 1, 1)
            yield SimpleNamespace(
                clips={"rgb": clips, "flow": clips.flip(1) ** 2},
                video=torch.tensor([position for position, _ in batch]),
            )


EMBEDDINGS = {
    "net/rgb": Embedding("rgb", lambda clips: clips.flatten(1)),
    "net/flow": Embedding("flow", lambda clips: clips.flatten(1)),
    "mean/rgb": Embedding("rgb", lambda clips: clips.mean((2, 3, 4)), "euclidean"),
}


def reference_features(index, name):
    """Mean over windows of the (L2-normalised for cosine) window features, float64."""
    rows = [[] for _ in index]
    for batch in Windows(index):
        clips = batch.clips[EMBEDDINGS[name].view].double().numpy()
        for clip, position in zip(clips, batch.video.tolist(), strict=True):
            value = clip.reshape(-1) if name.startswith("net") else clip.reshape(3, -1).mean(1)
            rows[position].append(value / np.linalg.norm(value) if name.startswith("net") else value)
    return np.stack([np.mean(row, 0) for row in rows])


def reference_similarity(queries, gallery, name):
    if name == "net/two_stream":
        return sum(reference_similarity(queries, gallery, f"net/{view}") for view in ("rgb", "flow"))
    q, g = reference_features(queries, name), reference_features(gallery, name)
    if name.startswith("net"):
        q, g = q - q.mean(0), g - g.mean(0)
        return (q / np.linalg.norm(q, axis=1)[:, None]) @ (g / np.linalg.norm(g, axis=1)[:, None]).T
    return -np.linalg.norm(((q[:, None] - g[None]) / g.std(0)), axis=2)


def brute_force(queries, gallery, name, leave_source_out):
    """Computes R@k and mAP by sorting every row, one query at a time."""
    hits, precisions, without = {k: [] for k in (1, 5, 10, 20, 50)}, [], 0
    for query, row in zip(queries, reference_similarity(queries, gallery, name), strict=True):
        order = [gallery[int(i)] for i in np.argsort(-row, kind="stable")]
        if leave_source_out:
            order = [entry for entry in order if entry.source != query.source]
            if query.label not in {entry.label for entry in order}:
                continue
        if query.label:
            right = np.array([entry.label == query.label for entry in order])
            for k in hits:
                hits[k].append(right[:k].any())
            places = right.nonzero()[0] + 1
            precisions += [np.mean([right[:place].mean() for place in places])] if len(places) else []
            without += not len(places)
    rates = {f"r@{k}": np.mean(h) if k <= len(gallery) else None for k, h in hits.items()}
    return rates | {
        "map": np.mean(precisions) if precisions else None,
        "map_left_out": without,
        "queries": len(hits[1]),
    }


def data_set(train: int, test: int, classes: int, unlabelled: int = 0) -> Index:
    rng = np.random.default_rng(train)
    labels = ["a" * (1 + int(rng.integers(classes))) for _ in range(train + test)]
    for i in range(unlabelled):
        labels[-1 - 2 * i] = ""
    splits = ["train"] * train + ["test"] * test
    return Index(
        [video(i, label, f"s{i // 3}", split) for i, (label, split) in enumerate(zip(labels, splits, strict=True))]
    )


@pytest.mark.parametrize(("train", "test", "classes", "unlabelled"), [(61, 23, 5, 2), (7, 3, 2, 0), (3, 2, 1, 0)])
def test_train_test_equals_brute_force(train, test, classes, unlabelled):
    index = data_set(train, test, classes, unlabelled)
    rows, _, scores = evaluate(index, EMBEDDINGS, Windows)
    assert [f"{row['name']}/{row['view']}" for row in rows] == [*EMBEDDINGS, "net/two_stream"]
    for row in rows:
        name = f"{row['name']}/{row['view']}"
        expected = brute_force(index.select("test"), index.select("train"), name, False)
        assert {k: row[k] for k in expected} == pytest.approx(expected)
        assert row["gallery"] == train
        known = expected["map"] is not None
        assert scores.average_precision[name].nanmean() == pytest.approx(
            expected["map"] if known else np.nan, nan_ok=True
        )
        assert hits_at_1(scores.first_hit[name]).mean() == pytest.approx(expected["r@1"])
    counted = [entry for entry in index.select("test") if entry.label]
    assert scores.paths == [str(entry.path.absolute()) for entry in counted]
    assert scores.sources == [entry.source for entry in counted]


@pytest.mark.parametrize("count", [57, 6])
def test_leave_source_out_equals_brute_force(count):
    index = data_set(count, 0, 4)
    rows, examples, scores = evaluate(index, EMBEDDINGS, Windows, protocol="leave_source_out")
    for row in rows:
        name = f"{row['name']}/{row['view']}"
        expected = brute_force(index, index, name, True)
        assert {k: row[k] for k in expected} == pytest.approx(expected)
        assert len(scores.paths) == row["queries"] and row["map_left_out"] == 0
        shares = []
        for query in index:
            others = [entry.label == query.label for entry in index if entry.source != query.source]
            shares += [np.mean(others)] if any(others) else []
        assert row["chance_r@1"] == pytest.approx(np.mean(shares))
    source = {str(entry.path.absolute()): entry.source for entry in index}
    for example in examples:
        assert source[example["query"]["path"]] not in {source[found["path"]] for found in example["nearest"]}


def test_examples_are_the_nearest_entries_of_the_two_streams():
    index = data_set(30, 9, 3)
    _, examples, _ = evaluate(index, EMBEDDINGS, Windows)
    train, test = index.select("train"), index.select("test")
    similarity = reference_similarity(test, train, "net/two_stream")
    position = {str(entry.path.absolute()): i for i, entry in enumerate(test)}
    assert len(examples) == 8 and {example["view"] for example in examples} == {"two_stream"}
    for example in examples:
        order = np.argsort(-similarity[position[example["query"]["path"]]], kind="stable")[:5]
        assert [found["path"] for found in example["nearest"]] == [str(train[int(i)].path.absolute()) for i in order]


def test_a_video_without_windows_is_named_and_left_out(caplog):
    index = data_set(20, 6, 2)
    loaders = []

    def open_loader(part):
        loaders.append(Windows(part, broken=("3", "21")))
        return loaders[-1]

    rows, _, _ = evaluate(index, EMBEDDINGS, open_loader)
    for name in ("3.mp4", "21.mp4"):
        said = f"1 file could not be read and was left out: 1 file: does not decode: {name}"
        assert [line for line in caplog.messages if said in line]
    assert len(loaders) == 2 and all(loader.closed for loader in loaders)
    assert (rows[0]["gallery"], rows[0]["queries"]) == (19, 5)


def test_sources_in_both_splits_are_reported(caplog):
    evaluate(data_set(20, 6, 2), EMBEDDINGS, Windows)  # s6 holds videos 18, 19 (train) and 20 (test)
    assert "1 source is in both splits" in caplog.text


@pytest.mark.parametrize(
    ("index", "protocol", "error", "message"),
    [
        (data_set(5, 0, 2), "train_test", IndexFileError, "test"),
        (data_set(5, 3, 2), "loo", InputError, "'loo'"),
        (
            Index([video(i, "a", "s0", "train") for i in range(4)]),
            "leave_source_out",
            InputError,
            "at least two sources",
        ),
    ],
)
def test_bad_input_is_named(index, protocol, error, message):
    with pytest.raises(error, match=message):
        evaluate(index, EMBEDDINGS, Windows, protocol=protocol)


@pytest.mark.parametrize(("protocol", "expected"), [("train_test", 2), ("leave_source_out", 5)])
def test_queries_with_an_exact_copy_in_the_gallery_are_counted(tmp_path, protocol, expected):
    """Video 1 is a sibling of 0 and a copy; 4 and 5, which has no label, are copies of 0; 2 and 6 are copies."""
    splits, sources = ["train"] * 3 + ["test"] * 4, ["s", "s", "t", "u", "v", "w", "x"]
    labels, contents = ["a", "a", "b", "b", "a", "", "b"], ["0", "0", "2", "3", "0", "0", "2"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.mp4").write_text(content)
    index = Index([dataclasses.replace(video(i, label, source, split), path=tmp_path / f"{i}.mp4")
                   for i, (label, source, split) in enumerate(zip(labels, sources, splits, strict=True))])  # fmt: skip
    rows, *_ = evaluate(index, EMBEDDINGS, Windows, protocol=protocol)
    assert {row["queries_with_copy"] for row in rows} == {expected}


def test_videos_without_labels_have_neighbours_and_no_rates():
    index = Index([video(i, "", f"s{i}", "train") for i in range(4)])
    rows, examples, scores = evaluate(index, EMBEDDINGS, Windows, protocol="leave_source_out")
    measures = ("r@1", "r@1_ci95", "map", "map_ci95", "chance_r@1", "chance_map")
    assert all(row[name] is None for row in rows for name in measures) and scores is None
    assert all(row["queries"] == 4 for row in rows)
    assert all(len(example["nearest"]) == 3 for example in examples)  # all but the query's own source


def test_ranks_and_nearest_agree_with_a_sort_over_many_chunks(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(1100, 7, generator=rng), torch.randn(83, 7, generator=rng)
    labels, gallery_labels = torch.arange(1100) % 11, torch.arange(83) % 11
    comparison = Comparison([prepare(queries, gallery, "cosine")], "cosine")
    order = comparison.similarity(torch.arange(1100)).argsort(dim=1, descending=True, stable=True)
    expected = (gallery_labels[order] == labels[:, None]).int().argmax(1)
    monkeypatch.setattr(ranking, "CHUNK", 83 * 100)
    assert torch.equal(comparison.rank(labels, gallery_labels).first_hit, expected)
    assert comparison.nearest(1099, 90) == order[1099].tolist()


def test_a_constant_feature_does_not_drown_the_others():
    features = torch.tensor([[0.3 + 1e-8 * i, float(i)] for i in range(5)])
    queries, gallery = prepare(features, features, "euclidean")
    assert gallery[:, 0].abs().max() == 0 and gallery[:, 1].std(correction=0) == pytest.approx(1)


def test_an_index_without_a_window_is_refused():
    index = data_set(3, 0, 2)
    with pytest.raises(InputError, match="no window of any of the 3 videos"):
        embed_index(index, EMBEDDINGS, lambda part: Windows(part, broken=("0", "1", "2")))


def test_untrained_batch_norm_takes_the_statistics_of_the_data_and_keeps_the_weights():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv3d(3, 4, 1), torch.nn.BatchNorm3d(4)

        def features(self, clips):
            return self.norm(self.conv(clips)).flatten(1)

    net, loader = Net().eval(), Windows(data_set(30, 0, 3))
    weight = net.conv.weight.detach().clone()
    calibrate_batch_norm({"rgb": net}, loader)
    seen = [net.conv(batch.clips["rgb"]).detach() for batch in loader]
    assert torch.allclose(net.norm.running_mean, torch.stack([s.mean((0, 2, 3, 4)) for s in seen]).mean(0), atol=1e-5)
    assert not net.norm.training and net.norm.momentum == 0.1 and torch.equal(net.conv.weight, weight)
    embedding = encoder_embeddings("net", {"rgb": net}, make_recipe("paper"), {"rgb": ""})["net/rgb"]
    assert embedding.function(next(iter(loader)).clips["rgb"]).shape == (5, 16)


def _assert_comparison_without_labels(checkpoint, index_csv, folder, caplog):
    """Without labels the features of the references are not stored, because only R@k is read from them; the networks
    are compared by their clips of the same video, where videos hold two. What will be done is told first."""
    from cpr_fast.evaluate.retrieval.retrieve import retrieve
    from cpr_fast.runtime.metrics import read_metrics

    bare = Index([dataclasses.replace(video, label="") for video in Index.load(index_csv)])
    bare.save(folder / "bare.csv")
    with caplog.at_level("INFO"):
        result = retrieve(checkpoint, folder / "bare.csv", protocol="auto", run_dir=folder / "bare", cache=False,
                          device="cpu", progress=True)  # fmt: skip
    assert [row["name"] for row in result["results"]] == ["trained"] and result["r@1"] is None
    sizes = {name: len(Index.load(index_csv).select(name)) for name in ("train", "test")}
    windows = {name: 5 * size for name, size in sizes.items()}  # 20 frames: windows of 8 start at 0, 3, 6, 9 and 12
    assert caplog.messages[0] == (
        f"retrieval, protocol train_test: {sizes['train']} videos in {windows['train']} windows (gallery) and "
        f"{sizes['test']} videos in {windows['test']} windows (queries)"
    )
    assert caplog.messages[1].endswith(f"compared with the untrained network, on {len(bare)} videos")
    batches = -(-windows["train"] // DataConfig().batch_size)
    assert f"gallery: {sizes['train']} videos in {windows['train']} windows, {batches} batches" in caplog.messages
    names = ["trained", "untrained", "single_frame", "mean_colour"]
    assert [row["name"] for row in result["same_video"]] == names
    stored = [row for row in read_metrics(folder / "bare") if row["kind"] == "same_video"]
    assert [row["r@1"] for row in stored] == [row["r@1"] for row in result["same_video"]]
    printed = "\n".join(lines_of(result))
    assert "R@k and mAP cannot be measured" in printed and re.search(r"\nTrained · RGB +\d+\.\d ", printed)
    whole = Index.load(index_csv)
    one = whole[0].label
    few = Index([dataclasses.replace(video, label=one if video.label == one else "") for video in whole])
    few.save(folder / "few.csv")
    result = retrieve(checkpoint, folder / "few.csv", protocol="auto", cache=False, device="cpu")
    assert [row["name"] for row in result["same_video"]] == [row["name"] for row in result["results"]] == names
    assert result["r@1"] is not None and "figures say little about the network" in "\n".join(lines_of(result))
    short = Index([dataclasses.replace(video, num_frames=12) for video in bare])
    short.save(folder / "short.csv")
    result = retrieve(checkpoint, folder / "short.csv", protocol="auto", cache=False, device="cpu")
    assert result["same_video"] == [] and "Too few videos hold two clips" in "\n".join(lines_of(result))


def test_a_checkpoint_is_evaluated_on_encoded_videos(tmp_path, caplog):
    pytest.importorskip("nvidia.dali")
    from cpr_fast.config import Config
    from cpr_fast.data.synthetic.videos import write_synthetic
    from cpr_fast.evaluate.retrieval.retrieve import retrieve
    from cpr_fast.models import build_encoder
    from cpr_fast.runtime.metrics import read_metrics
    from cpr_fast.weights.checkpoint import save_checkpoint

    index_csv = write_synthetic(tmp_path / "data", classes=4, videos=2, frames=20, width=64, height=48)
    config = Config.from_dict({"data": {"frames": 8, "size": 32, "workers": 1}, "model": {"width": 0.0625}})
    encoder = build_encoder(config.model)
    path = save_checkpoint(
        tmp_path / "run" / "checkpoints" / "c.pt",
        {"config": config.to_dict(), "encoders": {"rgb": encoder.state_dict()}},
    )
    result = retrieve(path, index_csv, run_dir=tmp_path / "run", device="cpu")
    stored = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "features").iterdir()}
    again = retrieve(path, index_csv, run_dir=tmp_path / "run", device="cpu")
    assert result == again  # the untrained network is initialised from a fixed seed
    assert {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "features").iterdir()
    } == stored  # nothing is computed again
    fresh = retrieve(path, index_csv, device="cpu", cache=False)
    assert {k: fresh[k] for k in ("r@1", "r@5", "map")} == {k: result[k] for k in ("r@1", "r@5", "map")}
    iic = retrieve(path, index_csv, device="cpu", recipe="iic", clips_per_video=2)
    assert iic["recipe"] == "iic" and len(iic["results"]) == len(result["results"])
    _assert_comparison_without_labels(path, index_csv, tmp_path, caplog)
    index = Index.load(index_csv)
    names = ["trained", "untrained", "single_frame", "mean_colour"]
    assert [row["name"] for row in result["results"]] == names
    assert result["view"] == "rgb" and result["r@1"] == result["results"][0]["r@1"]
    assert result["results"][0]["queries"] == len(index.select("test")) and result["r@50"] is None
    scores = QueryScores.load(Path(result["queries_file"]))
    assert scores.paths == [str(video.path.absolute()) for video in index.select("test")]
    for row in result["results"]:
        name = f"{row['name']}/{row['view']}"
        assert scores.average_precision[name].mean().item() == pytest.approx(row["map"])
        assert hits_at_1(scores.first_hit[name]).mean().item() == row["r@1"]
        low, high = row["map_ci95"]
        assert low <= row["map"] <= high
    printed = re.sub("  +", "  ", "\n".join(lines_of(result))).splitlines()
    first = result["summary"][0]
    map_interval, r1_interval = (
        " – ".join(f"{100 * bound:.1f}" for bound in first[f"{key}_ci95"]) for key in ("map", "r@1")
    )
    compared = f"{len(index.select('test'))} test videos search among {len(index.select('train'))} training videos"
    assert printed[0] == f"{compared} (protocol train_test, test-time recipe paper)"
    assert printed[2] == "Network · view, in %  mAP  95 % interval  R@1  95 % interval  R@5  R@10  R@20  R@50"
    start = f"Trained · RGB  {100 * first['map']:.1f}  {map_interval}  {100 * first['r@1']:.1f}  {r1_interval}"
    assert printed[4].startswith(start) and f"chance mAP {100 * first['chance_map']:.1f} %, R@1 25.0 %" in "".join(
        printed
    )
    rows = read_metrics(tmp_path / "run")
    places = {row["queries_file"] for row in rows if row["kind"] == "retrieval"}
    assert places == {f"evaluations/{Path(result['queries_file']).name}"}  # relative, so that the run can be moved
    assert {(row["protocol"], row["recipe"]) for row in rows if row["kind"] == "retrieval"} == {("train_test", "paper")}
    assert [row["name"] for row in rows if row["kind"] == "retrieval"] == 2 * names
    shown = [row for row in rows if row["kind"] == "retrieved"]
    assert shown and all(Path(found["path"]).exists() for row in shown for found in row["nearest"])


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (100, []),
        (99, ["  the other one has no label, or no video of another source has the same label, so that there is "
              "nothing to find"]),
        (61, ["  the other 39 have no label, or no video of another source has the same label, so that there is "
              "nothing to find"]),
    ],
)  # fmt: skip
def test_videos_that_are_no_queries_are_explained(queries, said):
    row = dict.fromkeys((f"{k}{end}" for k in ("map", "r@1") for end in ("", "_ci95", "_std")), 0.5)
    row |= {f"r@{k}": 0.5 for k in (5, 10, 20, 50)} | {"map_ci95": [0.4, 0.6], "r@1_ci95": [0.4, 0.6], "splits": 1}
    row |= {"name": "trained", "view": "rgb", "queries": queries, "gallery": 100, "map_left_out": 0}
    row |= {"chance_map": 0.1, "chance_r@1": 0.1, "queries_with_copy": 3}
    lines = lines_of({"summary": [row], "protocol": "leave_source_out", "recipe": "paper", "file": "f"})
    start = f"{queries} of 100 videos search, each among the videos of all other sources (protocol leave_source_out"
    assert lines[0].startswith(start) and lines[1 : lines.index("")] == said
    assert "3 queries have an exact copy in the gallery, found whatever the network has learnt." in lines
