"""Compares the mining lab with a float64 brute force, on realistic two-view features and on small difficult ones."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from cpr_fast.cli import main
from cpr_fast.errors import InputError
from cpr_fast.mining.auto import choose
from cpr_fast.mining.lab import choose_cascade, load_two_view_features, sweep
from cpr_fast.ops import cascade_select

RATES = ("pmr", "r1", "cmr_median", "cmr_mean", "cmr_median_video")


def score_matrices(arrays, *, raw=False):
    """Similarity of all rows in each view, float64."""
    scores = {}
    for view in ("rgb", "flow"):
        x = arrays[view].astype(np.float64)
        if not raw:
            x = x - x.mean(0)
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        scores[view] = x @ x.T
    return scores


def alternating(n, query_view):
    """Returns the views of n stages that end in the other view, for `brute_force`."""
    other = {"rgb": "flow", "flow": "rgb"}[query_view]
    return [other if (n - s) % 2 == 0 else query_view for s in range(1, n + 1)]


def brute_force(arrays, scores, views, ratio, top_k):
    """Computes the mining quality of one cascade by sorting, one query at a time."""
    label, group = arrays["label"], arrays["group"]
    n = len(views)
    pmr, first, sources, videos = [], [], set(), set()
    for q in range(len(label)):
        left = np.flatnonzero((label != label[q]) | (group != group[q]))
        for s, view in enumerate(views, 1):
            keep = top_k if s == n else max(top_k, int(len(label) * ratio**s))
            row = scores[view][q]
            left = np.sort(left)  # of equal scores the lower row wins
            left = left[np.argsort(-row[left], kind="stable")][:keep]
        if label[q] == -1 or not (label[left] != -1).any():
            continue
        right = label[left] == label[q]
        pmr.append(right.sum() / (label[left] != -1).sum())
        if label[left[0]] != -1:
            first.append(right[0])
        videos |= set(left[right].tolist())
        sources |= {(label[i], group[i]) for i in left[right]}
    classes = [c for c in np.unique(label) if c != -1]
    of_source = [sum(c == a for a, _ in sources) / len(np.unique(group[label == c])) for c in classes]
    of_video = [sum(label[i] == c for i in videos) / (label == c).sum() for c in classes]
    values = (np.mean(pmr), np.mean(first), np.median(of_source), np.mean(of_source), np.median(of_video))
    return dict(zip(RATES, map(float, values), strict=True))


def small_arrays(rows=61, width=5, seed=0, unknown=0):
    """Features on a lattice, so that scores are exact and many are equal; group numbers are reused across classes."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 4, rows) * 10  # class numbers may have gaps
    label[:unknown] = -1
    return {
        "rgb": (draw.integers(-2, 3, (rows, width)) + (label[:, None] == np.arange(width) * 10)).astype(np.float32),
        "flow": (draw.integers(-2, 3, (rows, width)) + (label[:, None] == np.arange(width) * 10)).astype(np.float32),
        "label": label,
        "group": draw.integers(0, 6, rows),
    }


def save(folder, arrays):
    np.savez(folder / "features.npz", **arrays)
    return folder / "features.npz"


def rates(row):
    return {name: row[name] for name in RATES}


@pytest.mark.slow
def test_more_stages_mine_better_on_real_features(shared_data, capsys):
    path = shared_data / "ucf101_two_view_scores.npz"
    arguments = ["mine", str(path), "--stages", "1", "3", "5", "7", "--ratio", ".5", "--top-k", "5", "--json"]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [row["stages"] for row in results] == [1, 3, 5, 7]
    assert [round(row["pmr"], 4) for row in results] == [0.6210, 0.6350, 0.6619, 0.7079]
    arrays = np.load(path)
    arrays = {name: arrays[name] for name in ("rgb", "flow", "label", "group")}
    scores = score_matrices(arrays)
    assert {(row["ratio"], row["top_k"], row["query_view"]) for row in results} == {(0.5, 5, "rgb")}
    for row in (results[0], results[-1]):  # brute force takes 4 s a row
        # One more true positive changes PMR by 5e-5, so agreement within 1e-6 means equal counts.
        assert rates(row) == pytest.approx(
            brute_force(arrays, scores, alternating(row["stages"], "rgb"), 0.5, 5), abs=1e-6
        )


@pytest.mark.parametrize("unknown", [0, 7])
def test_every_setting_of_a_sweep_is_the_brute_force(tmp_path, unknown):
    arrays = small_arrays(unknown=unknown)
    data = load_two_view_features(save(tmp_path, arrays), raw=True)
    stages, ratios, top_ks, views = (1, 2, 3, 6), (0.3, 0.8, 1.0), (1, 4, 61), ("rgb", "flow")
    rows = sweep(data, stages=stages, ratios=ratios, top_ks=top_ks, query_views=views)
    settings = list(itertools.product(views, top_ks, ratios, stages))
    assert [(row["query_view"], row["top_k"], row["ratio"], row["stages"]) for row in rows] == settings
    scores = score_matrices(arrays, raw=True)
    for row, (view, top_k, ratio, n) in zip(rows, settings, strict=True):
        assert rates(row) == pytest.approx(brute_force(arrays, scores, alternating(n, view), ratio, top_k), abs=1e-6), (
            row
        )


@pytest.mark.parametrize("order", ["f", "rr", "ffr", "rffrf"])
def test_any_order_of_views_is_the_brute_force(tmp_path, capsys, order):
    arrays = small_arrays(seed=3)
    arguments = ["--order", order, "r", "--ratio", ".6", "--top-k", "3", "--raw", "--json"]
    assert main(["mine", str(save(tmp_path, arrays)), *arguments]) == 0
    row, single = json.loads(capsys.readouterr().out)["results"]
    assert (row["order"], row["stages"], row["query_view"]) == (order, len(order), view_of(order))
    assert (single["order"], single["query_view"]) == ("r", "flow")
    views = [{"r": "rgb", "f": "flow"}[letter] for letter in order]
    assert rates(row) == pytest.approx(brute_force(arrays, score_matrices(arrays, raw=True), views, 0.6, 3), abs=1e-6)


def view_of(order):
    return {"r": "flow", "f": "rgb"}[order[-1]]


def test_features_are_centred_and_normalised_unless_raw(tmp_path):
    draw = np.random.default_rng(1)
    arrays = small_arrays(seed=1) | {view: draw.normal(3, 1, (61, 8)).astype(np.float32) for view in ("rgb", "flow")}
    path = save(tmp_path, arrays)
    for raw in (False, True):
        (row,) = sweep(load_two_view_features(path, raw=raw), stages=[3], top_ks=[3])
        assert rates(row) == pytest.approx(
            brute_force(arrays, score_matrices(arrays, raw=raw), ["flow", "rgb", "flow"], 0.5, 3), abs=1e-6
        )
    moved = arrays | {"rgb": 4 * arrays["rgb"] - 16, "flow": arrays["flow"].astype(np.float64)}
    assert sweep(load_two_view_features(save(tmp_path, moved)), stages=[3], top_ks=[3]) == sweep(
        load_two_view_features(save(tmp_path, arrays)), stages=[3], top_ks=[3]
    )


def test_labels_and_groups_may_be_names(tmp_path):
    arrays = small_arrays()
    named = arrays | {name: np.char.add("x", arrays[name].astype(str)) for name in ("label", "group")}
    numbered = sweep(load_two_view_features(save(tmp_path, arrays)))
    assert sweep(load_two_view_features(save(tmp_path, named))) == numbered


def test_without_labels_there_are_no_rates(tmp_path, capsys):
    arrays = small_arrays(unknown=61)
    path = save(tmp_path, arrays)
    rows = sweep(load_two_view_features(path))
    assert all(value is None for row in rows for value in rates(row).values())
    assert all(0 < row["view_agreement"] < 1 and 0 < row["mutual_neighbours"] < 1 for row in rows)
    assert main(["mine", str(path), "--heatmap", str(tmp_path / "map.png")]) == 0
    table = capsys.readouterr().out
    assert "–" in table and f"{100 * rows[0]['view_agreement']:.2f}" in table


def test_a_cascade_chosen_without_labels_is_measured_with_them(tmp_path, capsys):
    arrays = small_arrays(rows=83, width=6)
    path = save(tmp_path, arrays)
    command = ["mine", str(path), "--auto", "--stages", "1", "--top-k", "2", "4"]
    assert main([*command, "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["auto"]
    assert 1 <= chosen["top_k"] <= 4 and chosen["text"].startswith(
        "-".join({"r": "rgb", "f": "flow"}[letter] for letter in chosen["order"])
    )
    settings = {"orders": [chosen["order"]], "ratios": [chosen["ratio"]], "top_ks": [chosen["top_k"]]}
    (row,) = sweep(load_two_view_features(path), **settings)
    assert {name: chosen[name] for name in row} == row
    unlabelled = save(tmp_path, arrays | {"label": np.full(83, -1)})
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Chosen without labels: " in printed and "cpr-fast pretrain RECIPE --mining.stages auto" in printed
    assert unlabelled == path and "PMR 0" not in printed


def test_rows_of_one_source_are_siblings_whatever_their_labels(tmp_path):
    """As in training. Rates over classes still count the pairs of label and group."""
    arrays = small_arrays(rows=83, width=6)
    data = load_two_view_features(save(tmp_path, arrays), raw=True)
    sources = torch.arange(83) // 3
    with_sources = dataclasses.replace(data, groups=sources, sources=sources)
    features = torch.stack([data.rgb, data.flow])
    mined = cascade_select(features, features, [1, 0, 1], [41, 20, 4], query_ids=sources, memory_ids=sources)[0]
    assert not (sources[mined] == sources[:, None]).any()
    (row,) = sweep(with_sources, stages=[3], top_ks=[4])
    assert row["pmr"] == pytest.approx((data.labels[mined] == data.labels[:, None]).double().mean().item(), abs=1e-6)
    without = dataclasses.replace(with_sources, sources=None)
    assert sweep(without, stages=[3], top_ks=[4])[0]["pmr"] != row["pmr"]
    chosen, wanted = choose_cascade(with_sources, 4), choose(features, sources, 4)
    assert chosen["order"] == "".join("rf"[view] for view in wanted.views)
    assert chosen["criteria"] == wanted.criteria
    assert choose_cascade(without, 4)["criteria"] != wanted.criteria


def test_table_and_heat_map(tmp_path, capsys):
    path, picture = save(tmp_path, small_arrays()), tmp_path / "new" / "map.png"
    arguments = ["mine", str(path), "--stages", "1", "3", "--ratio", ".5", ".8", "--top-k", "2", "4"]
    assert main([*arguments, "--query-view", "rgb", "flow", "--heatmap", str(picture)]) == 0
    table = capsys.readouterr().out
    pmr = sweep(load_two_view_features(path), stages=[3], ratios=[0.8], top_ks=[4], query_views=["flow"])[0]["pmr"]
    assert f"{100 * pmr:.2f}" in table
    assert table.count(" frf ") == table.count(" rfr ") == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in picture.parent.iterdir()] == ["map.png"]


def test_details_are_those_of_the_chain(tmp_path, capsys):
    path = save(tmp_path, small_arrays(seed=5))
    plain = sweep(load_two_view_features(path), stages=[5], top_ks=[4])
    (row,) = sweep(load_two_view_features(path), stages=[5], top_ks=[4], details=True)
    assert {name: row[name] for name in plain[0]} == plain[0]
    assert row["survivor_precision_5"] == pytest.approx(row["pmr"])
    recalls = [row[f"survivor_recall_{s}"] for s in range(1, 6)]
    assert recalls == sorted(recalls, reverse=True)
    assert main(["mine", str(path), "--stages", "5", "--top-k", "4", "--details"]) == 0
    table = capsys.readouterr().out
    assert all(f"{100 * row[name]:.2f}" in table for name in ("pmr_chance", "survivor_recall_1", "mutual_neighbours"))


def broken(name, value):
    return lambda arrays: arrays | {name: value(arrays[name]) if callable(value) else value}


def with_nan(array):
    array = array.copy()
    array[7, 2] = np.nan
    return array


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays: {"rgb": arrays["rgb"], "label": arrays["label"]}, "missing flow, group"),
        (broken("flow", lambda x: x[:-1]), "flow: expected the shape of rgb (61, 5), got (60, 5)"),
        (broken("flow", lambda x: x[:, 1:]), "flow: expected the shape of rgb (61, 5), got (61, 4)"),
        (broken("rgb", lambda x: x[0]), "rgb: expected floating point [N, D], got float32 [5]"),
        (broken("rgb", lambda x: x[:0]), "rgb: expected floating point [N, D], got float32 [0, 5]"),
        (broken("rgb", lambda x: x.astype(int)), "rgb: expected floating point [N, D], got int64 [61, 5]"),
        (broken("label", lambda x: x[:-1]), "label: expected integers or strings [N=61], got int64 [60]"),
        (broken("group", lambda x: x.astype(float)), "group: expected integers or strings [N=61], got float64 [61]"),
        (broken("flow", with_nan), "flow: expected finite float32 features, row 7 has NaN or infinity"),
        (broken("rgb", lambda x: x.astype(np.float64) * 1e300), "rgb: expected finite float32 features"),
        (broken("label", lambda x: x.astype(object)), "but it cannot be read as one"),
    ],
)
def test_bad_arrays_are_named(tmp_path, damage, message):
    path = save(tmp_path, damage(small_arrays()))
    with pytest.raises(InputError) as raised:
        load_two_view_features(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)


def test_files_that_are_no_npz_are_named(tmp_path, capsys):
    whole = save(tmp_path, small_arrays()).read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("rgb,flow\n")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:700] + bytes(64) + whole[764:])
    for name in ("array.npy", "empty.npz", "text.npz", "cut.npz", "flipped.npz", "nowhere.npz"):
        assert main(["mine", str(tmp_path / name)]) == 2, name
        captured = capsys.readouterr()
        assert captured.out == ""
        said = captured.err.replace("\n", "")
        assert str(tmp_path / name) in said and "expected" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "5", "62"], "--top-k: expected 1 to 61 (the number of rows), got 62"),
        (["--top-k", "0"], "--top-k: expected 1 to 61 (the number of rows), got 0"),
        (["--stages", "0"], "--stages: expected at least 1, got 0"),
        (["--ratio", "1.5"], "--ratio: expected a fraction in (0, 1], got 1.5"),
        (["--ratio", "nan"], "--ratio: expected a fraction in (0, 1], got nan"),
        (["--stages"], "--stages: expected at least one value, got none"),
        (["--order", "frx"], "--order: expected letters r (RGB) and f (flow), such as 'frf', got 'frx'"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    assert main(["mine", str(save(tmp_path, small_arrays())), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"Loading PyTorch ...\ncpr-fast: {message}\n"
