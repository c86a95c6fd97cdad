"""The study: finished rows stay, stopped runs go on, odd rows are marked, and claims are judged as registered."""

import dataclasses
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.evaluate.retrieval.queries import QueryScores
from cpr_fast.evaluate.retrieval.retrieve import retrieve
from cpr_fast.runtime.interrupt import Interrupted

ROOT = Path(__file__).resolve().parents[3]
SOURCES = torch.arange(40) // 2
TRAINING_VIDEOS = {"synthetic": 324, "jhmdb": 654, "shrec17": 1670}


@pytest.fixture(scope="module")
def study(bench_script):
    return bench_script("training/study")


@pytest.fixture
def parts(study):
    return sys.modules["evidence.rows"], sys.modules["evidence.claims"], sys.modules["evidence.settings"]


def scores(average_precision, first_hit=None, name="cpr_n7") -> QueryScores:
    """The scores of one network with the same values in every view."""
    count = len(average_precision)
    hits = torch.zeros(count, dtype=torch.int64) if first_hit is None else torch.tensor(first_hit)
    views = [f"{name}/{view}" for view in ("rgb", "flow", "two_stream")]
    return QueryScores(
        [f"v{i}" for i in range(count)], ["a"] * count, [str(i) for i in SOURCES[:count].tolist()],
        torch.ones(count, dtype=torch.int64), ["g"],
        {view: torch.as_tensor(average_precision, dtype=torch.float64) for view in views}, dict.fromkeys(views, hits),
    )  # fmt: skip


def measures(parts, setting, average_precision, pmr=(0.2, 0.3)):
    rows, _, settings = parts
    view = {"map": float(np.mean(average_precision)), "r@1": 0.5, "r@5": 0.7, "r@10": 0.8, "probe": 0.4}
    found = {"views": {name: dict(view) for name in ("rgb", "flow", "two_stream")}}
    if settings.ALL[setting].mining == "cascade":
        quality = {"pmr": list(pmr), "pmr_chance": [0.1, 0.1], "cmr_median": [0.5, 0.6]}
        found["mining"] = {"rgb": quality, "flow": quality}
    return {**found, **rows.packed(scores(average_precision, name=setting), setting),
            "training": {"cpu_s": 100.0, "processes": 1}, "evaluation_cpu_s": 9.0}  # fmt: skip


@pytest.fixture
def stand_in(study, parts, monkeypatch, tmp_path):
    """Replaces data and training by constants; returns what was trained, and a function that calls the script."""
    ran, world = [], {"commit": "aaa", "device": "cpu", "torch": "2", "command": "c"}
    about = {"digest": "d", "videos": 60}
    monkeypatch.setattr(study, "prepare", lambda name, folder, progress: folder / "index.csv")
    monkeypatch.setattr(study, "description", lambda index: about)
    monkeypatch.setattr(study, "world", lambda device: dict(world))

    def run_setting(base, setting, seed, index, data, runs):
        ran.append((runs.name, setting, seed))
        values = np.linspace(0.2, 0.8, 40) + 0.01 * seed
        return measures(parts, setting, values), scores(values, name=setting)

    monkeypatch.setattr(study, "run_setting", run_setting)

    monkeypatch.setattr(study, "choose_base", lambda args, name, *rest: parts[2].CANDIDATES[name][0])
    monkeypatch.setattr(study, "base_of", lambda name, *rest: parts[2].CANDIDATES[name][0])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path / "w"), "--results", str(tmp_path), *arguments])
        study.main()

    return ran, world, call


def test_finished_rows_are_neither_run_again_nor_replaced(study, stand_in, tmp_path):
    ran, world, call = stand_in
    call("--sets", "jhmdb", "--seeds", "0", "1", "--settings", "start", "cpr_n3")
    assert ran == [("jhmdb", "start", 0), ("jhmdb", "cpr_n3", 0), ("jhmdb", "start", 1), ("jhmdb", "cpr_n3", 1)]
    before = (tmp_path / study.ROWS).read_text()
    world["commit"] = "bbb"
    call("--sets", "jhmdb", "--seeds", "0", "1", "2", "--settings", "cpr_n3")
    after = (tmp_path / study.ROWS).read_text()
    assert ran[4:] == [("jhmdb", "cpr_n3", 2)] and after.startswith(before)
    row = json.loads(after.splitlines()[-1])
    assert row["commit"] == "bbb" and row["threads"] == torch.get_num_threads() and row["base"]["memory"] > 0
    with pytest.raises(ValueError, match="never replaced"):
        study.add_row(tmp_path / study.ROWS, row)


def test_the_order_is_balanced(stand_in, study):
    ran, _, call = stand_in
    call("--sets", "synthetic", "jhmdb", "--seeds", "0", "1")
    settings = list(study.SETTINGS)
    assert settings == ["start", "untrained", "infonce", "coclr", "cpr_n3", "cpr_n5", "cpr_n7", "ubernce"]
    assert ran == [(name, each, seed) for name in ("synthetic", "jhmdb") for seed in (0, 1) for each in settings]


def test_a_row_of_another_world_is_marked(study, stand_in, tmp_path, capsys):
    _, world, call = stand_in
    marks = "<!-- written by study.py --table -->", "<!-- end -->"
    (tmp_path / "study.md").write_text(f"# Page\n{marks[0]}\nold\n{marks[1]}\nthe rest\n")
    call("--sets", "jhmdb", "--seeds", "0", "1", "--settings", "cpr_n7", "coclr")
    world["commit"] = "bbb"
    call("--sets", "jhmdb", "--seeds", "2", "--settings", "cpr_n7")
    call("--table")
    page = (tmp_path / "study.md").read_text()
    assert page.startswith("# Page") and page.endswith("the rest\n") and "old" not in page
    assert "| CPR n = 7 | 0 1 2† | .510 ± .006 |" in page and "| CoCLR (n = 1) | 0 1 |" in page
    assert "† measured with another commit" in page and "cpr_n7, seed 2: bbb, cpu, 2, " in page
    assert "partial (2 of 5 seeds)" in page and "jhmdb: 5 of 40 rows" in page
    assert (tmp_path / "study_jhmdb.png").stat().st_size > 1000 and "| .300 ± .000 |" in page  # PMR of the last epoch


def test_a_line_cut_short_is_no_row(study, stand_in, tmp_path):
    ran, _, call = stand_in
    call("--sets", "jhmdb", "--seeds", "0", "--settings", "start")
    whole = (tmp_path / study.ROWS).read_text()
    (tmp_path / study.ROWS).write_text(whole + whole[:50])
    call("--sets", "jhmdb", "--seeds", "0", "1", "--settings", "start")
    lines = (tmp_path / study.ROWS).read_text().splitlines()
    assert len(ran) == 2 and [json.loads(line)["seed"] for line in lines] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "100"], r"--settings: trials .* got \['coclr', 'cpr_n3', 'cpr_n5', 'cpr_n7'\]"),
        (["--seeds", "0", "--base", "size=32"], "--base: the base of seeds below 100 is the registered one"),
        (["--seeds", "7"], r"--seeds: expected registered seeds \(0, 1, 2, 3, 4\)"),
    ],
)
def test_what_the_protocol_forbids_is_refused(stand_in, arguments, message, capsys):
    with pytest.raises(SystemExit):
        stand_in[2](*arguments)
    assert re.search(message, capsys.readouterr().err) and not stand_in[0]


def test_trials_go_to_a_file_of_their_own(study, stand_in, tmp_path):
    stand_in[2]("--sets", "jhmdb", "--seeds", "100", "--settings", "infonce", "ubernce", "--base", "size=32",
                "start=3,5")  # fmt: skip
    found = study.read_rows(tmp_path / study.TRIALS)
    assert [row["base"]["size"] for row in found] == [32, 32] and found[0]["base"]["start"] == [3, 5]
    assert not (tmp_path / study.ROWS).exists() and "size 32" in study.table(tmp_path)


TRIED = {"untrained": 0.2, "start": 0.3, "infonce": 0.28, "ubernce": 0.33}


@pytest.mark.parametrize(
    ("trials", "ran", "chosen"),
    [
        ([TRIED], 1, 0),
        ([TRIED | {"ubernce": 0.31}, TRIED], 2, 1),  # labels did not help
        ([TRIED | {"untrained": 0.29}, TRIED | {"ubernce": 0.25}, TRIED], 3, 2),
        ([TRIED | {"untrained": 0.29}, TRIED | {"ubernce": 0.25}, TRIED | {"ubernce": 0.1, "start": 0.2}], 3, 1),
    ],
)
def test_the_first_candidate_that_learns_is_the_base(study, parts, monkeypatch, tmp_path, trials, ran, chosen):
    candidates, done = parts[2].CANDIDATES["jhmdb"], []
    about = {"digest": "d"}

    def run_row(args, name, base, setting, seed, *rest):
        done.append((candidates.index(base), setting))
        row = {"set": name, "setting": setting, "seed": seed, "settings": study.settings_digest(base, setting, "d")}
        views = {"two_stream": {"map": trials[candidates.index(base)][setting]}}
        study.add_row(tmp_path / study.TRIALS, {**row, "views": views})

    monkeypatch.setattr(study, "run_row", run_row)
    args = type("Args", (), {"results": tmp_path})
    for _ in range(2):
        assert study.choose_base(args, "jhmdb", None, about) == candidates[chosen]
    assert done == [(number, setting) for number in range(ran) for setting in study.TRIAL]
    assert not {"coclr", "cpr_n3", "cpr_n5", "cpr_n7"} & set(study.TRIAL)


def test_measures_of_queries_survive_packing(parts):
    rows = parts[0]
    values = [0.0, 1.0, 1 / 3, float("nan"), 0.123456]
    row = rows.packed(scores(values, [0, 4, 5, 2**62, 70_000]), "cpr_n7")
    found = rows.query_values(row, "map", "flow")
    np.testing.assert_allclose(found, np.nan_to_num(values), atol=0.5 / 65535)
    assert rows.query_values(row, "r@1", "rgb").tolist() == [1, 0, 0, 0, 0]
    assert rows.query_values(row, "r@5", "rgb").tolist() == [1, 1, 0, 0, 0]


def test_queries_of_other_videos_are_refused(parts, tmp_path):
    parts[0].keep_queries(tmp_path, "jhmdb", "d", scores([0.1] * 8))
    parts[0].keep_queries(tmp_path, "jhmdb", "d", scores([0.9] * 8))
    with pytest.raises(ValueError, match="'jhmdb' differ"):
        parts[0].keep_queries(tmp_path, "jhmdb", "d", scores([0.1] * 6))


@pytest.mark.parametrize(
    ("shift", "noise", "expected"),
    [
        ([0.05, 0.06, 0.04, 0.05, 0.05], 0.02, "**confirmed**"),
        ([-0.05, -0.06, -0.04, -0.05, -0.05], 0.02, "**refuted**"),
        ([0.05, 0.06, 0.04, 0.05, -0.001], 0.0, "undecided"),  # a seed contradicts
        ([0.2, 0.01, 0.01, 0.01, 0.01], 0.0, "undecided"),  # the interval over seeds holds 0
        ([0.02, 0.021, 0.02, 0.02, 0.02], 0.6, "undecided"),  # the interval over sources holds 0
        ([0.05, 0.06, 0.04, 0.05], 0.0, "partial (4 of 5 seeds)"),
    ],
)
def test_a_claim_is_judged_by_seeds_and_sources(parts, tmp_path, shift, noise, expected):
    rows, claims, _ = parts
    draw = np.random.default_rng(1)
    wave = np.repeat(draw.normal(size=20), 2) * noise / 2  # by source, equal in every seed
    wave -= wave.mean()
    table = {}
    for seed, by in enumerate(shift):
        first = np.clip(0.5 + draw.normal(size=40) * 0.001, 0, 1)
        table["coclr", seed] = measures(parts, "coclr", first)
        table["cpr_n7", seed] = measures(parts, "cpr_n7", np.clip(first + by + wave, 0, 1))
    rows.keep_queries(tmp_path, "jhmdb", "d", scores([0.1] * 40))
    found = claims.judge(claims.PRIMARY, table, tmp_path, "jhmdb")
    differences = [
        (rows.query_values(table["cpr_n7", s], "map", "two_stream")
         - rows.query_values(table["coclr", s], "map", "two_stream")).mean().item()
        for s in range(len(shift))
    ]  # fmt: skip
    interval = stats.t.interval(0.95, len(shift) - 1, np.mean(differences), stats.sem(differences))
    np.testing.assert_allclose(found["seeds"]["ci95"], interval, rtol=1e-9)
    assert found["verdict"] == expected and found["sources"]["sources"] == 20


@pytest.mark.parametrize(
    ("start", "again", "expected"),
    [("main", None, 0.02), ("new", "new", 0.05), ("new", None, None), ("new", "old", None)],
)
def test_rows_are_compared_with_those_of_the_same_start(parts, tmp_path, start, again, expected):
    _, claims, _ = parts
    table = {
        ("start", 0): measures(parts, "start", [0.5] * 40) | {"weights": "main"},
        ("cpr_n7", 0): measures(parts, "cpr_n7", [0.50] * 40),
        ("past_views", 0): measures(parts, "past_views", [0.52] * 40) | {"start_weights": start},
    }
    if again:
        table["cpr_n7_again", 0] = measures(parts, "cpr_n7_again", [0.47] * 40) | {"start_weights": again}
    (tmp_path / "study_queries.json").write_text(json.dumps({"jhmdb": {"sources": SOURCES.tolist()}}))
    claim = next(each for each in claims.CLAIMS if "past views" in each.text)
    found = claims.judge(claim, table, tmp_path, "jhmdb")
    assert found is None if expected is None else found["seeds"]["difference"] == pytest.approx(expected, abs=1e-4)


def test_the_trend_is_the_rise_of_a_fitted_line(parts, tmp_path):
    _, claims, _ = parts
    values = {"coclr": 0.21, "cpr_n3": 0.30, "cpr_n5": 0.27, "cpr_n7": 0.45}
    table = {(name, 0): measures(parts, name, [0.5] * 40, pmr=(0.1, value)) for name, value in values.items()}
    claim = next(each for each in claims.CLAIMS if each.measure == "pmr")
    slope = np.polyfit([1, 3, 5, 7], list(values.values()), 1)[0]
    found = claims.judge(claim, table, tmp_path, "jhmdb")
    assert found["seeds"]["difference"] == pytest.approx(6 * slope) and found["sources"] is None


def test_no_registered_setting_has_an_idle_stage(parts):
    settings = parts[2]
    for name, videos in TRAINING_VIDEOS.items():
        for setting in settings.ALL:
            config = settings.config_of(settings.CANDIDATES[name][-1], setting, 0, Path("i.csv"), Path("r"))
            kept = settings.keeps(config, videos)
            assert bool(kept) == (settings.ALL[setting].mining == "cascade")
    small = dataclasses.replace(settings.CANDIDATES["synthetic"][0], memory=256)
    with pytest.raises(ValueError, match=r"stages \[7\] .* \(128, 64, 32, 16, 8, 5, 5\) of 256"):
        settings.keeps(settings.config_of(small, "cpr_n7", 0, Path("i.csv"), Path("r")), 324)


def test_a_setting_continues_the_start_for_equal_epochs(parts):
    settings = parts[2]
    for family, start in (("coclr", "start"), ("iic", "iic_start")):
        base = settings.CANDIDATES["synthetic"][0]
        configs = [
            settings.config_of(base, name, 3, Path("i.csv"), Path("r"))
            for name, each in settings.ALL.items()
            if each.mining is not None and each.family == family
        ]
        assert len({sum(cycle.epochs for cycle in config.schedule.cycles) for config in configs}) == 1
        assert {config.model.init.rgb for config in configs} == {f"r/{start}/checkpoints/last.pt"}
    digests = [settings.settings_digest(base, name, "d") for name in settings.ALL]
    assert len(set(digests)) == len(digests)
    assert settings.settings_digest(dataclasses.replace(base, start=(16, 33)), "cpr_n7", "d") not in digests


def test_the_stored_rows_have_the_settings_of_today(parts):
    """Otherwise the tables leave them out and the study runs them again: new settings must not change the digest."""
    rows, _, settings = parts
    stored = [json.loads(line) for line in (ROOT / "bench" / "results" / rows.ROWS).read_text().splitlines()]
    assert len(stored) >= 120
    for row in stored:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in row["base"].items()}
        digest = settings.settings_digest(settings.Base(**values), row["setting"], row["data"]["digest"])
        assert row["settings"] == digest, (row["set"], row["setting"], row["seed"])


@pytest.mark.parametrize(("page", "headlines"), [("README.md", True), ("docs/evidence.md", False)])
def test_the_pages_have_the_claims_of_the_stored_rows(study, page, headlines):
    by_set = study.registered_rows(*(study.read_rows(study.RESULTS / name) for name in (study.ROWS, study.TRIALS)))
    text = (ROOT / page).read_text()
    assert text == study.replace_results(
        text, study.claim_summary(by_set, study.RESULTS, headlines=headlines), "study.py"
    )
    assert "| 3. mAP, CoCLR > InfoNCE | " in text and "-0.7 (-0.9 to -0.4), **refuted** |" in text


@pytest.fixture(scope="module")
def tiny_index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    index = write_synthetic(folder / "videos", version=5, classes=4, videos=4, frames=12, width=32, height=32)
    write_flow(index, folder / "flow")
    return index


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_its_row_is_what_retrieve_finds(study, parts, monkeypatch, tmp_path, tiny_index):
    runs, settings = sys.modules["evidence.runs"], parts[2]
    tiny = settings.Base(size=16, memory=24, start=(2, 2), epochs=(6, 3), iic=(2, 2))
    load = settings.load
    batch = lambda path: settings.replace(load(path), "data", batch_size=6)  # noqa: E731
    stopped = []

    def stop_once(config, **options):
        if not stopped and config.run.out.endswith("cpr_n3"):
            stopped.append(config.run.out)
            raise Interrupted(signal.SIGTERM, "after step 3")
        return runs.loop_pretrain(config, **options)

    runs.loop_pretrain = runs.pretrain
    monkeypatch.setattr(settings, "load", batch)
    monkeypatch.setattr(runs, "pretrain", stop_once)
    monkeypatch.setattr(study, "prepare", lambda name, folder, progress: tiny_index)
    monkeypatch.setattr(study, "choose_base", lambda *arguments: tiny)
    arguments = ["study.py", str(tmp_path / "w"), "--results", str(tmp_path), "--sets", "synthetic", "--seeds", "2",
                 "--settings", "start", "untrained", "cpr_n3", "iic"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        study.main()
    assert left.value.code == 128 + signal.SIGTERM
    assert [row["setting"] for row in study.read_rows(tmp_path / study.ROWS)] == ["start", "untrained"]
    study.main()
    found = {row["setting"]: row for row in study.read_rows(tmp_path / study.ROWS)}
    run = Path(stopped[0])
    for setting, name in (("cpr_n3", "trained"), ("untrained", "untrained")):
        result = retrieve(run / "checkpoints/last.pt", tiny_index, untrained_seed=2)
        for row in (row for row in result["results"] if row["name"] == name):
            own = found[setting]["views"][row["view"]]
            assert own["map"] == pytest.approx(row["map"], abs=1e-6) and own["r@1"] == row["r@1"]
            packed = parts[0].query_values(found[setting], "map", row["view"])
            assert packed.mean().item() == pytest.approx(row["map"], abs=1e-5)
    assert set(found["untrained"]["pixels"]["map"]) == {"single_frame", "mean_colour", "mean_flow"}
    mined = [len(found["cpr_n3"]["mining"][view]["pmr"]) for view in ("rgb", "flow")]
    assert mined == [4, 1]  # the epochs after the queue is full
    assert list(found["iic"]["views"]) == ["rgb", "residual", "merged"]
    assert all(0 <= value["probe"] <= 1 for row in found.values() for value in row["views"].values())
    study.table(tmp_path)
