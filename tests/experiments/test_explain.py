"""`explain` against numbers that are computed here from the TOML files alone."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib

import pytest
import torch

from cpr_fast.config import Config, ModelConfig, load
from cpr_fast.config.recipes import FOLDER, recipes
from cpr_fast.errors import InputError
from cpr_fast.experiments.explain.method import BACKBONES, parameters
from cpr_fast.experiments.explain.page import explain
from cpr_fast.experiments.fidelity import deviations
from cpr_fast.models import build_encoder

UCF101, K400 = 9537, 240_000  # training videos


def written(name: str) -> dict:
    """Returns what the file of a recipe says, with an empty table for each section that it lacks."""
    values = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    return {"data": {}, "model": {}, "memory": {}, "mining": {}, "loss": {}, "optim": {}} | values


@pytest.fixture(scope="module")
def explained() -> dict[str, tuple[list[str], dict]]:
    return {name: explain(load(FOLDER / f"{name}.toml"), name, text) for name, text in recipes().items()}


@pytest.mark.parametrize("name", recipes())
def test_steps_of_every_recipe(explained, name):
    lines, values = explained[name]
    file, text = written(name), " ".join(" ".join(lines).split())
    videos = K400 if "k400" in name else UCF101
    batch, entries = file["data"].get("batch_size", 16), file["memory"].get("size", 2048)
    bank = file["memory"].get("kind") == "bank"
    assert (values["data"]["videos"], values["schedule"]["steps_per_epoch"]) == (videos, videos // batch)
    assert f"{videos:,} training videos" in text and "does not exist here" in text
    full = math.ceil((videos if bank else entries) / batch)
    assert values["memory"]["full_after_steps"] == full
    for cycle, found in zip(file["schedule"]["cycles"], values["schedule"]["cycles"], strict=True):
        waits = cycle.get("mining", "cascade") == "cascade" and not bank
        assert found["steps"] == cycle["epochs"] * (videos // batch)
        assert found["learns_from_step"] == (full + 1 if waits else 1)
        assert found["milestones"] == cycle.get("milestones", [])
        rate = f", x{file['schedule'].get('gamma', 0.1):g} at {', '.join(map(str, found['milestones']))}"
        if file["optim"].get("schedule") == "cosine":
            own = {key: cycle.get(key, file["optim"].get(key)) for key in ("lr", "final_lr", "warmup_epochs")}
            rate = (f", learning rate {own['lr']:g} on a cosine to {own['final_lr']:.0e} after a warm-up of "
                    f"{own['warmup_epochs']:g} epochs").replace("e-0", "e-") if "lr" in cycle else ""  # fmt: skip
        assert f"{cycle['epochs']} epochs{rate}; {found['steps']:,} steps" in text
    total = sum(cycle["epochs"] for cycle in file["schedule"]["cycles"]) * (videos // batch)
    assert f"{total:,} steps on one process" in text


@pytest.mark.parametrize("name", recipes())
def test_cascade_of_every_recipe(explained, name):
    _, values = explained[name]
    file = written(name)
    mined = [cycle for cycle in file["schedule"]["cycles"] if cycle.get("mining", "cascade") == "cascade"]
    if not mined:
        assert values["mining"] is None
        return
    stages, ratio = file["mining"]["stages"], file["mining"].get("ratio", 0.5)
    bank = file["memory"].get("kind") == "bank"
    size = UCF101 if bank else file["memory"]["size"]
    expected = []
    for cycle in mined:
        top_k = cycle.get("top_k", file["mining"]["top_k"])
        keep, left = [], float(size)
        for _ in range(stages - 1):
            left *= ratio
            keep.append(int(left))
        own = cycle["view"]
        pair = (own, cycle.get("other", "rgb" if own == "flow" else "flow"))
        for query, other in [pair, pair[::-1]] if file["model"].get("shared") else [pair]:
            views = [other, query] * (stages // 2) + [other]  # all published cascades have an odd number of stages
            row = {"view": query, "views": views, "keep": [*keep, top_k], "idle_stages": []}
            expected += [] if row in expected else [row]
    assert values["mining"]["cascades"] == expected


def test_a_cascade_that_is_chosen_in_training():
    config = load(FOLDER / "table3_progressive.toml")
    config = dataclasses.replace(config, mining=dataclasses.replace(config.mining, stages="auto"))
    lines, values = explain(config, "table3_progressive")
    text = " ".join(" ".join(lines).split())
    assert "last view, n = 1, 3, 5, 7, r = .3, .5, .8, top-k of 5 or less" in text
    assert "cascade, up to top-1: " in text or "up to top-1: " in text
    assert values["mining"]["stages"] == "auto" and values["mining"]["candidates"]["largest_top_k"] == 5


@pytest.mark.parametrize("name", recipes())
def test_page_of_every_recipe(explained, name):
    lines, values = explained[name]
    file, text = written(name), "\n".join(lines)
    assert max(map(len, lines)) <= 110 and len(lines) <= 55  # one screen
    assert not re.search(r"\b[DSNMTE]\d+\b", text)  # no code of docs/fidelity.md without its words
    frames, stride = file["data"].get("frames", 32), file["data"].get("stride", 1)
    fps = 5 if "k400" in name else 25
    assert f"{frames * stride / fps:.2f} s at {fps} fps" in text
    assert f"{file['model'].get('arch', 's3d')}, " in text
    assert f"protocol: {file['loss'].get('protocol', 'paper')}; temperature .07" in text
    optim = file["optim"]
    assert f"{optim.get('name', 'adam')}, learning rate {optim.get('lr', 0.001):g}" in text
    for path in file["model"].get("init", {}).values():
        assert path in text
    assert values["config"] == load(FOLDER / f"{name}.toml").to_dict()
    rows = values["deviations"]["rows"]
    assert rows and f"Deviations    {len(rows)} from the paper or the published code" in text and "`--all`" in text
    whole = " ".join(" ".join(explain(load(FOLDER / f"{name}.toml"), name, whole=True)[0]).split())
    assert all(f"{row['subject']}: {row['ours']}" in whole for row in rows)
    assert "Evaluation" in whole and "Test clips" in whole and "Evaluation" not in text


def test_deviations_are_those_of_the_method(explained):
    def said(name: str) -> str:
        return "\n".join(f"{row['subject']}: {row['ours']}" for row in explained[name][1]["deviations"]["rows"])

    assert "siblings" not in said("infonce_ucf101") and "siblings in mining" in said("table1_n1")
    assert "flow" not in said("table5_iic") and "start of the bank" in said("table5_iic")
    assert "stages, epochs per cycle" in said("table3_top5") and "stages, epochs per cycle" not in said("table5_iic")
    assert "frame rate of Kinetics-400" in said("table7_k400")
    shown = {row["id"] for _, values in explained.values() for row in values["deviations"]["rows"]}
    unseen = {row.id for row in deviations()} - shown
    assert {row.subject for row in deviations() if row.id in unseen} <= {"views for an even n", "short videos"}


def test_a_stage_that_selects_nothing_is_named():
    config = load(FOLDER / "cpr_ucf101.toml")
    small = dataclasses.replace(config, memory=dataclasses.replace(config.memory, size=256))
    lines, values = explain(small, "small")
    assert [row["keep"] for row in values["mining"]["cascades"]] == [[128, 64, 32, 16, 8, 5, 5]] * 2
    assert [row["idle_stages"] for row in values["mining"]["cascades"]] == [[7], [7]]
    assert "stage 7 selects nothing" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize("arch", BACKBONES)
@pytest.mark.parametrize("head", ["mlp", "pooled"])
def test_parameters(arch, head):
    model = ModelConfig(arch=arch, head=head, feature_dim=BACKBONES[arch][0] if head == "pooled" else 96)
    with torch.device("meta"):
        network = build_encoder(model)
    assert parameters(model) == sum(weight.numel() for weight in network.parameters())
    assert parameters(dataclasses.replace(model, width=0.5)) is None


def write_index(folder, count: int, frames: int = 60) -> str:
    rows = ["path,label,source,split,num_frames,fps,width,height,flow_path"]
    for i in range(count):
        (folder / f"{i}.mp4").touch()
        rows.append(f"{i}.mp4,class{i % 3},source{i // 2},{'train' if i < count - 5 else 'test'},{frames},25,64,48,")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "index.csv")


def with_data(config: Config, **changes) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_videos_are_counted_in_the_index(tmp_path):
    config = with_data(load(FOLDER / "cpr_ucf101.toml"), index=write_index(tmp_path, 45), batch_size=8)
    lines, values = explain(config, "mine")
    assert (values["data"]["videos"], values["data"]["assumed"], values["schedule"]["steps_per_epoch"]) == (40, None, 5)
    text = " ".join(" ".join(lines).split())
    assert "40 training videos of 20 sources, 3 classes" in text and "40 have none" in text
    with pytest.raises(InputError, match=r"data\.index: split 'val': .*'train', 'test'"):
        explain(with_data(config, split="val"), "mine")
    with pytest.raises(InputError, match=r"data\.batch_size: the index holds 40 training videos"):
        explain(with_data(config, batch_size=41), "mine")


def test_short_videos_are_counted_as_the_config_says(tmp_path):
    index = write_index(tmp_path, 45, frames=17)
    lines = (
        (tmp_path / "index.csv").read_text().replace(",17,25,", ",18,25,", 9)
    )  # nine of 40 training videos are longer
    (tmp_path / "index.csv").write_text(lines)
    config = with_data(load(FOLDER / "cpr_ucf101.toml"), index=index, batch_size=4)
    for how, count, text in (("keep", 40, "short videos: those shorter"), ("drop", 9, "those of 17 frames or fewer")):
        lines, values = explain(with_data(config, short_videos=how), "mine")
        assert values["data"]["videos"] == count and text in " ".join(" ".join(lines).split())


def test_a_cycle_that_never_learns_is_said(tmp_path):
    config = with_data(load(FOLDER / "table1_n7.toml"), index=write_index(tmp_path, 45), batch_size=8)
    short = dataclasses.replace(config.schedule.cycles[0], epochs=1, milestones=())
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, cycles=(short,)))
    lines, values = explain(config, "mine")
    assert values["schedule"]["cycles"][0]["learns_from_step"] is None
    assert any("NEVER LEARNS" in line for line in lines)
