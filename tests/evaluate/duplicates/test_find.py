"""The graph in a file, the features that are compared, and the index that is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="stored features are opened as clips are")

from support.data_sets.empty_videos import adopted, write_empty_videos

from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.evaluate.duplicates import find, graph
from cpr_fast.evaluate.duplicates.output import write_groups, write_index
from cpr_fast.evaluate.retrieval.ranking import Comparison, prepare_streams
from cpr_fast.ops import knn_graph


def random_features(count: int, width: int = 8) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(count)), dim=1
    )


STEPS = [range(512), range(512, 1024), range(1024, 1536), range(1536, 1700)]  # of a graph of 1,700 rows


def test_a_stopped_graph_continues_and_a_finished_one_is_kept(tmp_path, ends_after, compared):
    features, path = random_features(1700), tmp_path / "graph.safetensors"
    with ends_after(2, KeyboardInterrupt):
        graph.stored_graph(features, 4, path)
    assert compared == STEPS[:2]
    found = graph.stored_graph(features, 4, path)
    assert compared == STEPS
    again = graph.stored_graph(features, 4, path)
    assert len(compared) == 4
    for result in (found, again):
        assert all(map(torch.equal, result, knn_graph(features, 4)))


def test_a_killed_graph_continues_from_the_last_minute(tmp_path, monkeypatch, ends_after, compared):
    features, path = random_features(1700), tmp_path / "graph.safetensors"
    monkeypatch.setattr(graph, "SAVE_S", 0.0)
    with ends_after(2, SystemExit, killed=True):
        graph.stored_graph(features, 4, path)
    found = graph.stored_graph(features, 4, path)
    assert compared == STEPS and all(map(torch.equal, found, knn_graph(features, 4)))


@pytest.mark.parametrize("change", ["features", "k", "damaged", "foreign"])
def test_the_graph_of_other_features_is_computed_again(change, tmp_path, compared, caplog):
    features, path = random_features(600), tmp_path / "graph.safetensors"
    graph.stored_graph(features, 4, path)
    k = 5 if change == "k" else 4
    if change == "features":
        features = features.clone()
        features[599, 7] += 1e-6
    elif change == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    elif change == "foreign":
        graph.save_tensors({"best": torch.zeros(2)}, path)
    found = graph.stored_graph(features, k, path)
    assert compared == [range(512), range(512, 600)] * 2 and all(map(torch.equal, found, knn_graph(features, k)))
    assert ("computed again" in caplog.text) == (change == "damaged")


@pytest.mark.parametrize("metric", ["cosine", "plain_cosine"])
@pytest.mark.parametrize("views", [1, 2])
def test_the_similarity_is_that_of_retrieval(metric, views):
    draw = torch.Generator().manual_seed(0)
    streams = [3 + torch.randn(50, 5 + view, generator=draw) for view in range(views)]
    pairs = prepare_streams(streams, streams, metric)
    expected = Comparison(pairs, metric).similarity(torch.arange(50)) / len(pairs)
    features = graph.unit_features([stream.clone() for stream in streams], metric)
    torch.testing.assert_close(features @ features.T, expected, rtol=1e-5, atol=1e-5)


def make_index(folder: Path, sources: str) -> Path:
    """Writes an index of videos without content; `sources` has a letter for each."""
    rows = [(f"videos/v{number}.mp4", "run", source) for number, source in enumerate(sources)]
    return write_empty_videos(folder, rows)


def in_groups(numbers: list[int]) -> np.ndarray:
    """Features that are almost equal for equal numbers."""
    draw = np.random.default_rng(0)
    return (draw.standard_normal((9, 16))[numbers] + 0.01 * draw.standard_normal((len(numbers), 16))).astype("float32")


def test_features_of_a_store_are_those_of_the_videos_in_any_order(tmp_path, caplog):
    index = make_index(tmp_path, "abcdef")
    features = in_groups([0, 1, 2, 3, 4, 5])
    order = [4, 2, 0, 5, 1]
    store = adopted(tmp_path, [f"train/run/v{i}" for i in order] + ["train/run/other"], rgb=features[[*order, 3]])
    compared = find.of_store(index, store)
    assert compared.positions.tolist() == [0, 1, 2, 4, 5] and "1 video of the index have no features" in caplog.text
    expected = graph.unit_features([torch.from_numpy(features[[0, 1, 2, 4, 5]])], "cosine")
    torch.testing.assert_close(compared.features, expected)


def test_a_video_that_the_store_lacks_does_not_get_the_features_of_another_of_its_name(tmp_path):
    names = ("run/0001.mp4", "walk/0001.mp4", "run/0002.mp4", "walk/0002.avi", "walk/0003.mp4")
    index = write_empty_videos(tmp_path, [(name, name.split("/")[0], name) for name in names])
    store = adopted(tmp_path, ["run/0001", "run/0002.mp4", "theirs/0003"], rgb=in_groups([0, 1, 2]))
    assert find.of_store(index, store).positions.tolist() == [0, 2, 4]
    own = adopted(tmp_path / "run", ["../0001.mp4", "../0002.mp4"], rgb=in_groups([0, 1]))  # found by their files
    assert find.of_store(index, own).positions.tolist() == [0, 2]


def test_more_neighbours_than_videos_are_all_of_them(tmp_path):
    found = found_in(tmp_path, "abcd", [0, 1, 0, 2], neighbours=100_000)
    assert found.duplicates.tolist() == [0, 1, 0, 2] and found.neighbours == 100_000
    assert (tmp_path / "graph.safetensors").stat().st_size < 1000  # three of each


def test_a_store_of_other_videos_is_refused(tmp_path):
    index = make_index(tmp_path, "abc")
    store = adopted(tmp_path, ["x", "y", "z"], rgb=in_groups([0, 1, 2]))
    with pytest.raises(InputError, match="INDEX: expected features of at least 2 videos, got those of 0"):
        find.of_store(index, store)


def collapsed(count: int, dtype: str) -> np.ndarray:
    """Features that differ by rounding alone."""
    draw = np.random.default_rng(0)
    return (draw.random(512) * (1 + 1e-6 * draw.standard_normal((count, 512)))).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_features_of_a_collapsed_network_are_named(tmp_path, dtype, offset, caplog):
    index = make_index(tmp_path, "abcdef")
    store = adopted(tmp_path, [f"v{i}" for i in range(6)], rgb=offset * collapsed(6, dtype))
    compared = find.of_store(index, store)
    found = find.find_duplicates(compared, tmp_path / "g.safetensors", neighbours=3, duplicate=0.98, sibling=0.9)
    (text,) = found.doubts()
    assert text.startswith(f"The rgb features of all 6 videos are equal (store {store}), so they tell no videos apart")
    assert text in caplog.text


def test_a_collapsed_view_is_named_beside_one_that_is_not(tmp_path):
    index = make_index(tmp_path, "abcdef")
    features = {"rgb": in_groups([0, 1, 2, 3, 4, 5]), "flow": collapsed(6, "float32")}
    store = adopted(tmp_path, [f"v{i}" for i in range(6)], **features)
    assert find.of_store(index, store).equal == ["flow"]


def test_features_that_are_nearly_parallel_are_told_apart(tmp_path):
    """Those of an untrained network: cosines above .99999, which their mean does not share."""
    index = make_index(tmp_path, "abcdef")
    features = 100 + in_groups([0, 1, 2, 0, 3, 4])
    compared = find.of_store(index, adopted(tmp_path, [f"v{i}" for i in range(6)], rgb=features))
    found = find.find_duplicates(compared, tmp_path / "g.safetensors", neighbours=3, duplicate=0.98, sibling=0.9)
    assert found.doubts() == [] and found.duplicates.tolist() == [0, 1, 2, 0, 3, 4]


def found_in(tmp_path: Path, sources: str, numbers: list[int], **thresholds: float) -> find.Duplicates:
    index = make_index(tmp_path, sources)
    store = adopted(tmp_path, [f"v{i}" for i in range(len(sources))], rgb=in_groups(numbers))
    settings = {"neighbours": 3, "duplicate": 0.98, "sibling": 0.9} | thresholds
    return find.find_duplicates(find.of_store(index, store), tmp_path / "graph.safetensors", **settings)


def test_sources_are_joined_by_groups_and_the_index_is_not_changed(tmp_path):
    found = found_in(tmp_path, "abcdeef", [0, 1, 0, 2, 3, 4, 3])
    before = (tmp_path / "index.csv").read_bytes()
    assert found.duplicates.tolist() == [0, 1, 0, 2, 3, 4, 3]
    assert found.sources.tolist() == [0, 1, 0, 2, 3, 3, 3]  # the sixth shares the source of the fifth in the index
    write_index(found, tmp_path / "new.csv")
    new = Index.load(tmp_path / "new.csv")
    assert [video.source for video in new] == list("abadeee") and (tmp_path / "index.csv").read_bytes() == before
    assert [dataclasses.replace(v, source="") for v in new] == [
        dataclasses.replace(v, source="") for v in Index.load(tmp_path / "index.csv")
    ]
    assert found.agreement["pairs"] == 2 and found.agreement["known_pairs"] == 1 and found.agreement["both"] == 0
    assert len(found.doubts()) == 1 and "6 sources became 4" in found.doubts()[0]
    write_groups(found, tmp_path / "groups.csv")
    rows = (tmp_path / "groups.csv").read_text().splitlines()
    assert rows[0] == "path,label,split,source,new_source,duplicates,siblings"
    assert rows[1:3] == ["videos/v0.mp4,run,train,a,a,0,0", "videos/v2.mp4,run,train,c,a,0,0"] and len(rows) == 5


def test_nothing_is_known_where_every_video_is_its_own_source(tmp_path):
    found = found_in(tmp_path, "abcd", [0, 1, 0, 2])
    assert found.agreement is None and "precision" not in found.table[0] and found.doubts() == []
    assert found.summary()["sources"] == 3


def test_an_index_that_is_replaced_is_kept_if_it_differs(tmp_path):
    found, out, old = found_in(tmp_path, "abcd", [0, 1, 0, 2]), tmp_path / "new.csv", tmp_path / "new.old.csv"
    write_index(found, out)
    write_index(found, out)
    assert not old.exists()
    first = out.read_bytes()
    write_index(dataclasses.replace(found, sources=np.arange(4)), out)
    assert old.read_bytes() == first != out.read_bytes()
    out.write_text("something else")
    write_index(found, out)
    assert old.read_text() == "something else" and out.read_bytes() == first
