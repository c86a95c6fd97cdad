"""The whole explanation of a config."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

from cpr_fast.config import Config
from cpr_fast.errors import InputError
from cpr_fast.experiments.explain.clips import augmentation, clips, test_clips
from cpr_fast.experiments.explain.method import encoder, loss, memory, memory_size, mining
from cpr_fast.experiments.explain.schedule import evaluation, optimiser, schedule
from cpr_fast.experiments.explain.section import WIDTH, Section
from cpr_fast.experiments.explain.videos import TrainingVideos
from cpr_fast.experiments.fidelity import concerning
from cpr_fast.pretrain.run.checks import plan_cycles

PAGE = "docs/fidelity.md"
MORE = ("test_clips", "evaluation")  # sections that are printed with `--all` only


def explain(
    config: Config, name: str, description: str = "", *, whole: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """Explains what a config does.

    Args:
        name: The name of the recipe, or the path of the file.
        description: What the recipe reproduces; "" for other configs.
        whole: Print all lines. Otherwise those that fit on one screen: without the test clips, the evaluation and the
            text of every deviation. The plain data always hold everything.
    Returns:
        The lines to print, of at most `WIDTH` columns, and the same facts as plain data.
    Raises:
        InputError: the index cannot be read, or has fewer videos than a batch.
    """
    videos = TrainingVideos.of(config)
    if videos.assumed and config.data.batch_size > videos.number:
        raise InputError(
            f"data.batch_size: expected at most {videos.number}, the training videos of {videos.assumed}, which are "
            f"assumed because data.index does not exist, got {config.data.batch_size}"
        )
    plans = plan_cycles(config, videos.number, 1)
    groups = config.memory.shuffle_bn_groups or 1
    published = plan_cycles(config, videos.number, groups) if videos.number >= groups * plans[0].clips else plans
    size = memory_size(config, videos.number, plans[0].clips)
    sections = {
        "data": videos.section(config),
        "clips": None if config.data.features else clips(config, videos.fps),
        "augmentation": None if config.data.features else augmentation(config),
        "test_clips": None if config.data.features else test_clips(config),
        "encoder": encoder(config),
        "memory": memory(config, plans[0], size),
        "mining": mining(config, size),
        "loss": loss(config),
        "optimiser": optimiser(config),
        "schedule": schedule(config, plans, published),
        "evaluation": evaluation(config),
        "deviations": _deviations(config, name, whole),
    }
    lines = textwrap.wrap(f"{name}: {description}" if description else name, WIDTH)
    lines.append("")
    for title, section in sections.items():
        if section is not None and (whole or title not in MORE):
            lines += section.lines()
    values = {title: None if section is None else section.values for title, section in sections.items()}
    return lines, {"name": name, "description": description, **values, "config": config.to_dict()}


def _deviations(config: Config, name: str, whole: bool) -> Section:
    """Counts the rows of `PAGE` that concern a config by group or, for the whole page, lists them."""
    found = concerning(config, name)
    groups = Counter(row.group for row in found)
    said = ", ".join(f"{group[0].lower()}{group[1:]} {number}" for group, number in groups.items())
    rows = [("", f"{len(found)} from the paper or the published code ({said}); {PAGE} gives the reasons")]
    if whole:
        rows += [(row.subject, row.ours) for row in found]
    else:
        rows.append(("", "`--all` lists them, and explains how the result is evaluated"))
    return Section("Deviations", rows, {"rows": [vars(row) for row in found]})
