"""The graph of neighbours in shards: parts that machines compute apart are merged into the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the parts are stored")

from cpr_fast.errors import InputError
from cpr_fast.evaluate.duplicates import graph
from cpr_fast.evaluate.duplicates.graph import Unfinished, part_path, shard_rows, stored_graph
from cpr_fast.ops import knn_graph
from cpr_fast.runtime.files import one_writer

SIZE, K = 1403, 4


@pytest.fixture
def features() -> torch.Tensor:
    """Unit features of which some are equal, so that some scores are."""
    found = torch.randn(SIZE, 12, generator=torch.Generator().manual_seed(3))
    found[::9] = found[:1].clone()
    return torch.nn.functional.normalize(found, dim=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new [1]-graph.safetensors"  # signs that a pattern of names would read as its own


def files(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()}


@pytest.mark.parametrize("size", [2, 3, 17, 1000, 999_983])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_shards_cover_all_rows_once_with_equal_work(size, count):
    ranges = [shard_rows(size, (number, count)) for number in range(count)]
    assert [rows.start for rows in ranges] == [0, *(rows.stop for rows in ranges[:-1])] and ranges[-1].stop == size
    pairs = [sum(size - 1 - row for row in (rows.start, rows.stop - 1)) * len(rows) / 2 for rows in ranges]
    assert sum(pairs) == size * (size - 1) / 2
    assert max(abs(found - sum(pairs) / count) for found in pairs) <= 2 * size  # the pairs of a row at each end


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_last_of_three_shards_merges_them(order, features, path, tmp_path):
    left = {0, 1, 2}
    for number in order[:2]:
        found = stored_graph(features, K, path, shard=(number, 3))
        left.remove(number)
        assert found == Unfinished(sorted(left))
    found = stored_graph(features, K, path, shard=(order[2], 3))
    assert all(map(torch.equal, found, knn_graph(features, K))) and files(path) == {path.name}
    stored_graph(features, K, tmp_path / "whole.safetensors")
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_more_shards_than_rows_have_nothing_to_do(path):
    features = torch.nn.functional.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    found = [stored_graph(features, 2, path, shard=(number, 8)) for number in range(8)]
    assert found[6] == Unfinished([7]) and all(map(torch.equal, found[7], knn_graph(features, 2)))


def test_a_shard_that_is_repeated_or_comes_late_compares_nothing(features, path, compared):
    stored_graph(features, K, path, shard=(1, 2))
    before = len(compared)
    assert stored_graph(features, K, path, shard=(1, 2)) == Unfinished([0]) and len(compared) == before
    stored_graph(features, K, path, shard=(0, 2))
    done = len(compared)
    for shard in ((0, 2), (1, 2), (0, 5), (0, 1)):  # the graph is finished
        assert all(map(torch.equal, stored_graph(features, K, path, shard=shard), knn_graph(features, K)))
    assert sum(map(len, compared[:done])) == SIZE
    assert sum(map(len, compared[done:])) == 4 * SIZE  # those of `knn_graph`


def test_a_shard_that_was_killed_continues_from_what_it_stored(features, path, compared, ends_after, monkeypatch):
    """The process dies in its second step, after a state was stored; another one takes its place."""
    monkeypatch.setattr(graph, "SAVE_S", 0.0)
    with ends_after(1, SystemExit, killed=True):
        stored_graph(features, K, path, shard=(1, 2))
    assert files(path) == {part_path(path, (1, 2)).name}
    assert stored_graph(features, K, path, shard=(1, 2)) == Unfinished([0])
    rows = shard_rows(SIZE, (1, 2))
    assert compared[0].start == rows.start and sum(map(len, compared)) == len(rows) > len(compared[0])
    assert all(map(torch.equal, stored_graph(features, K, path, shard=(0, 2)), knn_graph(features, K)))


def test_a_call_without_a_shard_computes_the_parts_that_are_missing(features, path, compared):
    for number in (0, 3):
        stored_graph(features, K, path, shard=(number, 4))
    before = len(compared)
    found = stored_graph(features, K, path)
    middle = range(shard_rows(SIZE, (1, 4)).start, shard_rows(SIZE, (2, 4)).stop)
    assert [row for rows in compared[before:] for row in rows] == list(middle)
    assert all(map(torch.equal, found, knn_graph(features, K))) and files(path) == {path.name}


def test_a_damaged_part_is_computed_again(features, path, caplog):
    stored_graph(features, K, path, shard=(1, 2))
    part = part_path(path, (1, 2))
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    assert stored_graph(features, K, path, shard=(0, 2)) == Unfinished([1])
    stored_graph(features, K, path, shard=(1, 2))
    assert f"{part} cannot be read" in caplog.text and "computed again" in caplog.text
    assert all(map(torch.equal, stored_graph(features, K, path), knn_graph(features, K)))


@pytest.mark.parametrize("shard", [(0, 2), (1, 2), (0, 1)])
@pytest.mark.parametrize("change", ["features", "k", "shard"])
def test_a_part_of_other_features_is_refused_by_name_and_kept(change, shard, features, path, compared):
    stored_graph(features, K, path, shard=(1, 2))
    part, k = part_path(path, (1, 2)), K
    if change == "features":
        features[SIZE - 1, 3] += 1e-6
    elif change == "k":
        k = K + 1
    else:  # the file of another shard under this name
        stored_graph(features, K, path, shard=(0, 3))
        part_path(path, (0, 3)).replace(part)
    before, steps = part.read_bytes(), len(compared)
    with pytest.raises(InputError, match="--out: .*other features or of another --neighbours") as refused:
        stored_graph(features, k, path, shard=shard)
    assert str(part) in str(refused.value) and part.read_bytes() == before and len(compared) == steps


def test_parts_of_different_numbers_of_shards_are_refused_by_name(features, path):
    for count in (2, 3):
        stored_graph(features, K, path, shard=(0, count))
    with pytest.raises(InputError, match="--shard: expected parts of one number of shards") as refused:
        stored_graph(features, K, path)
    assert all(part_path(path, (0, count)).name in str(refused.value) for count in (2, 3))
    found = stored_graph(features, K, path, shard=(1, 2))  # which says its number itself
    assert all(map(torch.equal, found, knn_graph(features, K)))


def test_two_processes_do_not_compute_the_same_part(features, path):
    part = part_path(path, (0, 2))
    with one_writer(part.with_name(f".{part.stem}.lock"), "busy"):
        with pytest.raises(InputError, match=r"--out: another process is computing .*0-of-2"):
            stored_graph(features, K, path, shard=(0, 2))
        assert stored_graph(features, K, path, shard=(1, 2)) == Unfinished([0])
    stored_graph(features, K, path, shard=(0, 2))
    with one_writer(path.with_name(f".{path.stem}.lock"), "busy"):  # two shards may end at the same time
        assert all(map(torch.equal, stored_graph(features, K, path, shard=(0, 2)), knn_graph(features, K)))
