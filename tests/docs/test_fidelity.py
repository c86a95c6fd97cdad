"""docs/fidelity.md, its data and the recipes agree: every row names what exists, and every number said is a setting."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from cpr_fast.config import Config, load
from cpr_fast.experiments.fidelity import (
    FILE,
    HEADER,
    RECIPE_HEADER,
    concerning,
    deviations,
    facts,
    ranges,
    with_tables,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
RECIPES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.toml"))}
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


def table(heading: str) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the table below a heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" |")] for line in section.split("\n") if line.startswith("|")
    ]
    return rows[0], rows[2:]


def comment(name: str) -> str:
    """Returns the comment at the head of a recipe as one line, without the sentences about another recipe."""
    lines = RECIPES[name].read_text(encoding="utf-8").split("\n\n[")[0].split("\n")
    text = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    others = "|".join(other for other in RECIPES if other != name)
    about_another = re.compile(rf"\b(?:{others})\b(?!\.toml)")
    return " ".join(sentence for sentence in re.split(r"(?<=\.) ", text) if not about_another.search(sentence))


def numbers(text: str) -> set[float]:
    return {float(value) for value in re.findall(r"\d+(?:\.\d+)?", text)}


def test_the_page_is_written_from_the_data():
    assert with_tables(PAGE) == PAGE, "run `python -m cpr_fast.experiments.fidelity docs/fidelity.md`"


def test_every_deviation_is_complete_and_names_a_setting_or_file_that_exists():
    header, rows = table("Deviations")
    assert header == [name.strip() for name in HEADER]
    shown = {row[0]: row for row in rows if not row[0].startswith("**")}
    assert list(shown) == [row.id for row in deviations()]
    for row in deviations():
        assert row.subject and row.code and row.ours and row.why, row.id
        section, _, key = row.where.partition(".")
        is_setting = hasattr(getattr(Config(), section, None), key)
        assert is_setting or (ROOT / row.where).is_file(), f"{row.id}: {row.where}"
        assert shown[row.id][1] == row.subject and shown[row.id][-1] == f"`{row.where}`"
        for path in re.findall(
            r"\b(?:bench|cpr_fast|docs|tests)/[\w/.]+\w", " ".join(vars(row)[k] for k in ("ours", "why"))
        ):
            assert (ROOT / path).exists(), f"{row.id}: {path}"
        for name in re.findall(r"`(\w+\.\w+)(?: = [^`]*)?`", f"{row.ours} {row.why}"):
            assert hasattr(getattr(Config(), name.split(".")[0]), name.split(".")[1]), f"{row.id}: {name}"


def test_every_condition_can_hold_and_knows_its_facts():
    known = facts(Config())
    for group in tomllib.loads(FILE.read_text())["group"]:
        for row in group["deviation"]:
            assert set(row.get("when", {})) <= set(known), row
    seen = {row.id for name, path in RECIPES.items() for row in concerning(load(path), name)}
    even = dataclasses.replace(Config(), mining=dataclasses.replace(Config().mining, stages=4))
    assert seen | {row.id for row in concerning(even)} == {row.id for row in deviations()}


def test_every_recipe_has_a_row_with_its_settings():
    header, rows = table("Recipes")
    assert header == list(RECIPE_HEADER)
    assert [row[0].strip("`") for row in rows] == list(RECIPES)
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        name = cells["recipe"].strip("`")
        file = tomllib.loads(RECIPES[name].read_text(encoding="utf-8"))
        data, memory, mining = (file.get(section, {}) for section in ("data", "memory", "mining"))
        for key, default in {
            "frames": 32,
            "stride": 1,
            "size": 128,
            "augment": "coclr",
            "crop_attempts": 1,
            "grayscale": "channel",
            "short_videos": "keep",
        }.items():
            assert cells[key] == str(data.get(key, default)), (name, key)
        assert cells["batch x GPUs"] == f"{data.get('batch_size', 16)} x {memory.get('shuffle_bn_groups', 1)}"
        assert cells["memory"] == ("bank" if memory.get("kind") == "bank" else f"queue {memory['size']}")
        assert cells["protocol"] == file.get("loss", {}).get("protocol", "paper")
        cycles = file["schedule"]["cycles"]
        minings = [cycle.get("mining", "cascade") for cycle in cycles]
        if "cascade" in minings:
            top_k = dict.fromkeys(cycle.get("top_k", mining["top_k"]) for cycle in cycles)
            given = [str(mining["stages"]), str(mining.get("ratio", 0.5)), ", ".join(map(str, top_k))]
            assert [cells["stages"], cells["ratio"], cells["top_k"]] == given, name
        epochs = [cycle["epochs"] for cycle in cycles]
        repeat = re.match(r"(\d+) x \(", cells["cycles"])
        said = [int(value) for value in re.findall(r" (\d+) (?:none|label|cascade)", cells["cycles"])]
        assert said * (int(repeat[1]) if repeat else 1) == epochs, name
        if file.get("optim", {}).get("schedule") == "cosine":
            assert set(re.findall("[a-z]{2,}", cells["milestones"])) == {"cosine"}
        assert numbers(cells["milestones"].partition(" x ")[2] or cells["milestones"]) == {
            float(milestone) for cycle in cycles for milestone in cycle.get("milestones", ())
        }
        assert cells["deviates in"] == ranges(row.id for row in concerning(load(RECIPES[name]), name))


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_in_the_comment_of_a_recipe_are_its_settings(name):
    text, config = comment(name), load(RECIPES[name])
    cycles, mining = config.schedule.cycles, config.mining
    classifiers = (config.probe, config.finetune)
    epochs = {cycle.epochs for cycle in cycles} | {classifier.epochs for classifier in classifiers}
    epochs.add(sum(cycle.epochs for cycle in cycles if cycle.mining == "cascade"))
    milestones = {m for cycle in cycles for m in cycle.milestones} | {m for c in classifiers for m in c.milestones}
    top_k = {mining.top_k if cycle.top_k is None else cycle.top_k for cycle in cycles}
    groups = config.memory.shuffle_bn_groups or 1
    for value in re.findall(r"(\d+) epochs", text):
        assert int(value) in epochs, value
    for said in re.findall(r"(?:drops?|milestones?)[^.;]*? at ((?:\d+(?:, | and )?)+)", text):
        assert {int(value) for value in re.findall(r"\d+", said)} <= milestones, said
    for value in re.findall(r"\bn = (\d+)", text):
        assert int(value) == mining.stages, value
    for value in re.findall(r"\br = (\d*\.\d+)", text):
        assert float(value) == mining.ratio, value
    for value in re.findall(r"[Tt]op-(\d+)", text):
        assert int(value) in top_k, value
    for gpus, batch in re.findall(r"(\d+) GPUs with (\d+) videos", text):
        assert (int(gpus), int(batch)) == (groups, config.data.batch_size)
    for batch in re.findall(r"--data\.batch-size (\d+)", text):
        assert int(batch) == groups * config.data.batch_size
    for value in re.findall(r"(?:queue|memory) of (\d+)", text):
        assert int(value) == config.memory.size
    for percent in re.findall(r"(\d+) % of the iterations", text):
        assert int(percent) == round(100 * config.loss.self_positive_drop)
    for word in re.findall(r"\ball (\w+) cycles", text):
        assert WORDS[word] == len(cycles)
