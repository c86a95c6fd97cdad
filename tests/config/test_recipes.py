"""Every recipe in configs/ loads, names the results that it reproduces, and trains at reduced size on random clips."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from support.stand_in_loader import RandomLoader, make_index

from cpr_fast.config import Config, load
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.state.schedule import learning_rate
from cpr_fast.report.sections.published import published_tables
from cpr_fast.runtime.metrics import read_metrics

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(FOLDER.glob("*.toml"))
# Table of the paper, as numbered in the file names of recipes -> names in published.toml.
TABLES = {1: "stages", 2: "ratio", 3: "progressive", 4: "mining", 5: "methods", 6: "retrieval_ucf101", 7: "finetune"}


def small(config: Config, out: Path) -> Config:
    """Returns the same method at a size that trains quickly: two steps per epoch; the memory fills in one epoch."""
    values = config.to_dict()
    s3d = config.model.arch == "s3d"
    values["data"] |= {"frames": 5, "size": 20, "batch_size": 4} if s3d else {"frames": 8, "size": 16, "batch_size": 4}
    values["model"] |= {"width": 0.125, "feature_dim": 8 if s3d else 64, "init": {}}
    values["memory"]["size"] = 4
    values["mining"]["top_k"] = min(values["mining"]["top_k"], 2)
    for cycle in values["schedule"]["cycles"]:
        cycle |= {"epochs": 2, "milestones": [1], "top_k": cycle["top_k"] and min(cycle["top_k"], 2)}
        if config.optim.warmup_epochs:
            cycle["warmup_epochs"] = 0.5
    values["run"] |= {"out": str(out), "device": "cpu"}
    return Config.from_dict(values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_reproduces(path):
    config, text = load(path), path.read_text()
    table = re.match(r"table(\d)_", path.stem)
    assert text.startswith(f"# Table {table[1]}, " if table else "# ")
    assert config.run.out != Config().run.out
    for cycle in config.schedule.cycles:
        assert all(0 < milestone < cycle.epochs for milestone in cycle.milestones)
    if table:
        rows = {row.id for row in published_tables()[TABLES[int(table[1])]].rows}
        name = path.stem.partition("_")[2]
        # One run gives several rows of Tables 3, 6 and 7.
        assert name in rows | {"progressive", "ucf101", "ucf101_two_cycles", "k400"}


def test_every_row_of_the_ablations_has_its_recipe():
    names = {path.stem for path in RECIPES}
    for number in (1, 2, 4, 5):
        assert {f"table{number}_{row.id}" for row in published_tables()[TABLES[number]].rows} <= names
    assert {"table3_top5", "table3_progressive", "table6_ucf101", "table7_ucf101", "table7_k400"} <= names


def pretraining(config: Config) -> tuple:
    return tuple(getattr(config, name) for name in ("data", "model", "memory", "mining", "loss", "optim", "schedule"))


def runs() -> dict[str, list[Path]]:
    """Groups recipes by the run folder that they share: one pretraining may give rows of several tables."""
    shared: dict[str, list[Path]] = {}
    for path in RECIPES:
        shared.setdefault(load(path).run.out, []).append(path)
    return shared


@pytest.mark.slow
@pytest.mark.parametrize("paths", runs().values(), ids=lambda paths: paths[0].stem)
def test_every_recipe_trains(paths, tmp_path, one_thread):
    configs = [load(path) for path in paths]
    assert all(pretraining(config) == pretraining(configs[0]) for config in configs)
    config = small(configs[0], tmp_path / "run")
    kept = dataclasses.asdict(config.mining) | {"top_k": None} == dataclasses.asdict(configs[0].mining) | {
        "top_k": None
    }
    assert kept and config.loss == configs[0].loss and config.optim == configs[0].optim
    folder = pretrain(config, index=make_index(videos=8), make_loader=RandomLoader, progress=False)
    steps = [row for row in read_metrics(folder) if row["kind"] == "step"]
    assert len(steps) == 4 * len(config.schedule.cycles)
    for number, cycle in enumerate(config.schedule.cycles):
        last = [row for row in steps if row["cycle"] == number][-1]
        assert last["loss"] is not None
        assert (last["pmr"] is not None) == (cycle.mining == "cascade")


def header(path: Path) -> str:
    """Returns the comment at the head of a recipe as one line."""
    return " ".join(line.lstrip("# ") for line in path.read_text().split("\n\n", 1)[0].splitlines())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_batch_is_the_one_that_the_header_names(path):
    """CoCLR's release has 32 videos on each of 2 GPUs, CPR's 16; IIC's has batches of 16."""
    config, text = load(path), header(path)
    stated = re.search(r"2 GPUs with (\d+) videos each.* On one GPU use --data.batch-size (\d+)\.", text)
    assert path.stem.startswith("modern_") == ("Ours, not the paper's" in text)
    if config.data.augment == "iic":
        assert stated is None and config.data.batch_size == 16 and config.memory.shuffle_bn_groups is None
    else:
        of_coclr = path.stem in ("infonce_ucf101", "coclr_ucf101")
        assert config.data.batch_size == int(stated[1]) == (32 if of_coclr else 16)
        assert int(stated[2]) == 2 * config.data.batch_size and config.memory.shuffle_bn_groups == 2


def test_the_schedules_are_those_of_the_releases():
    cycles = {path.stem: load(path).schedule.cycles for path in RECIPES}
    drops = {name: [(cycle.view, cycle.epochs, cycle.milestones) for cycle in found] for name, found in cycles.items()}
    start = [(view, 300, (250, 280)) for view in ("rgb", "flow")]
    two_cycles = [(view, 100, (80,)) for view in ("rgb", "flow")] * 2
    per_view = [(view, 400, (300, 350)) for view in ("rgb", "flow")]
    assert drops["infonce_ucf101"] == start and drops["coclr_ucf101"] == start + two_cycles
    assert drops["table5_ubernce"] == [("rgb", 300, (240,))]  # the README of CPR
    assert drops["table7_k400"] == [(view, 50, (40,)) for view in ("rgb", "flow")]
    assert drops["table5_iic"] == [("rgb", 240, (45, 90, 125, 160))]
    for name, before in (("cpr_ucf101", start), ("table6_ucf101", []), ("table7_ucf101", [])):
        assert drops[name] == before + per_view and drops[f"{name}_two_cycles"] == before + two_cycles
        for one, other in ((name, f"{name}_two_cycles"), (f"{name}_two_cycles", name)):
            text = header(FOLDER / f"{one}.toml")
            assert "can be read in two ways" in text and f" {other}: " in text
    ablations = {name for name in drops if re.match(r"table[124]_|table5_coclr", name)}
    assert len(ablations) == 12 and all(drops[name] == [("rgb", 100, (80,))] for name in ablations)


def test_kinetics_is_read_at_five_frames_per_second():
    """The videos have that rate, as the published data, so that flow is between neighbours at that rate."""
    path = FOLDER / "table7_k400.toml"
    assert load(path).data.stride == 1
    for text in (header(path), (FOLDER.parent / "docs" / "data.md").read_text()):
        assert "fps=5,scale='if(gt(iw,ih),-2,256)':'if(gt(iw,ih),256,-2)'" in text


def test_the_recipe_of_the_paper():
    config = load(FOLDER / "cpr_ucf101.toml")
    assert (config.mining.stages, config.mining.ratio, config.mining.top_k) == (7, 0.5, 5)
    assert (config.memory.size, config.memory.ema_momentum, config.loss.temperature) == (2048, 0.999, 0.07)
    assert (config.optim.lr, config.optim.weight_decay) == (1e-3, 1e-5)
    last = config.schedule.cycles[-1]
    rates = [learning_rate(epoch, last, config.optim, config.schedule.gamma) for epoch in range(400)]
    assert rates == pytest.approx([1e-3] * 300 + [1e-4] * 50 + [1e-5] * 50)
