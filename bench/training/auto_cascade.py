"""Compares the cascade that `mining.stages = "auto"` chooses without labels with the best fixed one, found with labels.

    python bench/training/auto_cascade.py [--checkpoint RUN/checkpoints/last.pt …] [--sets NAME …]
    python bench/training/auto_cascade.py --table

Reads the scores of two views of $CPR_FAST_SHARED/data/ucf101_two_view_scores.npz (default ../shared). Finished sets are
not measured again. The protocol and the results are in bench/results/auto_cascade.md; --table writes its section
"Results" from auto_cascade.json again.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from evidence.tables import replace_results
from measure import RESULTS, ROOT, world, write_result
from page import markdown_table

from cpr_fast.mining.auto import COUNTS, QUERIES, Choice, Stages, choose, possible
from cpr_fast.mining.lab import load_two_view_features
from cpr_fast.mining.proxies import mutual_neighbours, view_agreement
from cpr_fast.mining.quality import class_units
from cpr_fast.ops import cascade_select
from cpr_fast.weights.checkpoint import load_checkpoint
from cpr_fast.wording import listed

NAME = "auto_cascade"
TOP_K = 5  # the default of mining.top_k: the largest number of entries that may be kept as positives
PAPER = Stages((1, 0, 1, 0, 1, 0, 1), 0.5, ())
GOAL = 0.95
HEADER = ["set", "K", "chosen cascade", "PMR", "best as many", "ratio", "best of all", "ratio", "n = 7, top-5"]
CRITERIA = ("siblings", "mined_agree", "score", "view_agreement", "mutual_neighbours")
CRITERION_HEADER = ["set", "siblings", "the mined agree", "both: the rule", "view agreement", "mutual neighbours"]


@dataclass(frozen=True)
class Memory:
    """Features of K entries in two views, as the cascade compares them; the labels judge the result only."""

    features: Tensor  # [2, K, D] float32
    ids: Tensor  # [K] int64, equal for siblings
    labels: Tensor  # [K] int64


def normalised(features: Tensor) -> Tensor:
    """Returns [..., K, D] centred over the entries and L2-normalised."""
    return F.normalize(features.double() - features.double().mean(-2, keepdim=True), dim=-1).float()


def real(
    part: str = "all",
    *,
    size: int | None = None,
    noise: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
    known_sources: bool = True,
) -> Memory:
    """Returns UCF101's scores of the classes 1 to 50 ("chosen on"), 51 to 101 ("held out") or of all.

    Args:
        size: K, the entries of a random memory; None takes all.
        noise: length of a random vector that is added to each feature of length 1, for RGB and flow.
        known_sources: False: every video counts as a source of its own, so that siblings are mined.
    """
    path = Path(os.environ.get("CPR_FAST_SHARED", ROOT.parent / "shared")) / "data" / "ucf101_two_view_scores.npz"
    data = load_two_view_features(path)
    ids = class_units(data.labels, data.groups, "source")[0]
    first, last = {"chosen on": (0, 50), "held out": (50, 101), "all": (0, 101)}[part]
    kept = ((data.labels >= first) & (data.labels < last)).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    if size is not None:
        kept = kept[torch.randperm(len(kept), generator=generator)[:size].sort().values]
    features = torch.stack([data.rgb, data.flow])[:, kept]
    drawn = F.normalize(torch.randn(features.shape, generator=generator), dim=2)
    features = normalised(features + torch.tensor(noise)[:, None, None] * drawn)
    return Memory(features, ids[kept] if known_sources else torch.arange(len(kept)), data.labels[kept])


def planted(
    *,
    signal: tuple[float, float] = (0.7, 0.7),
    scene: tuple[float, float] = (0.5, 0.5),
    mistaken: float = 0.0,
    classes: int = 20,
    sources: int = 12,
    videos: int = 3,
    size: int | None = None,
    seed: int = 0,
    width: int = 64,
) -> Memory:
    """Returns videos whose features are a class, a scene that siblings share, and noise of length 1, as random vectors.

    Args:
        signal, scene: lengths of the vectors of class and scene, in the two views.
        mistaken: share of the sources that look like another class in both views.
        videos: number of videos of a source.
        size: K, the entries of a random memory; None takes all.
    """
    generator = torch.Generator().manual_seed(seed)

    def directions(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator), dim=1)

    labels = torch.arange(classes).repeat_interleave(sources * videos)
    ids = torch.arange(classes * sources).repeat_interleave(videos)
    look = torch.arange(classes).repeat_interleave(sources)
    wrong = torch.rand(len(look), generator=generator) < mistaken
    look = torch.where(wrong, (look + 1 + torch.randint(0, 3, look.shape, generator=generator)) % classes, look)[ids]
    features = torch.stack(
        [
            a * directions(classes)[look] + b * directions(len(ids) // videos)[ids] + directions(len(ids))
            for a, b in zip(signal, scene, strict=True)
        ]
    )
    kept = torch.arange(len(ids))
    if size is not None:
        kept = torch.randperm(len(ids), generator=generator)[:size].sort().values
    return Memory(normalised(features[:, kept]), ids[kept], labels[kept])


def of_checkpoint(path: Path) -> Memory:
    """Returns the memory of two views that a checkpoint of `cpr-fast pretrain` holds, as training compares it."""
    memory = load_checkpoint(path)["cycle_state"]["memory"]
    if (memory["source"] == -1).any() or len(memory["features"]) != 2:
        raise SystemExit(f"{path}: expected a full memory of two views")
    return Memory(memory["features"].float(), memory["source"], memory["label"])


def sets() -> dict[str, Callable[[], Memory]]:
    """Returns the sets by name. The rule was chosen on the first ones; the other ones were not looked at before."""
    changes = {
        "": {},
        ", K = 1,024": {"size": 1024},
        ", K = 512": {"size": 512},
        ", flow + noise 1": {"noise": (0.0, 1.0)},
        ", flow + noise 3": {"noise": (0.0, 3.0)},
        ", flow + noise 10": {"noise": (0.0, 10.0)},
        ", RGB + noise 1": {"noise": (1.0, 0.0)},
        ", RGB + noise 3": {"noise": (3.0, 0.0)},
        ", both + noise 1.5": {"noise": (1.5, 1.5)},
    }
    found = {f"chosen on{name}": partial(real, "chosen on", seed=1, **values) for name, values in changes.items()}
    found |= {f"held out{name}": partial(real, "held out", seed=2, **values) for name, values in changes.items()}
    found |= {"held out, RGB + noise 10": partial(real, "held out", seed=2, noise=(10.0, 0.0))}
    found |= {"held out, sources unknown": partial(real, "held out", seed=2, known_sources=False)}
    for size in (2048, 1024, 512):
        for seed in (3, 4, 5):
            found[f"all classes, K = {size:,}, draw {seed - 2}"] = partial(real, size=size, seed=seed)
    found["all classes"] = real
    for seed in (11, 12, 13):
        made = {
            "two equal views": {},
            "weak classes": {"signal": (0.45, 0.45)},
            "one view much worse": {"signal": (0.9, 0.3)},
            "one view is noise": {"signal": (0.0, 0.9)},
            "no siblings": {"videos": 1, "sources": 36},
            "scenes stronger than classes in view 1": {"signal": (0.5, 0.7), "scene": (1.5, 0.3)},
            "a third looks like another class": {"mistaken": 0.33},
            "K = 128": {"size": 128},
        }
        found |= {f"planted, {name}, seed {seed}": partial(planted, seed=seed, **v) for name, v in made.items()}
    return found


def positives_rate(memory: Memory, stages: Stages | Choice) -> float:
    """Returns PMR, the mean over all entries as queries."""
    mined = mine(memory, stages, torch.arange(len(memory.ids)))
    right = (memory.labels[mined.clamp(min=0)] == memory.labels[:, None]) & (mined >= 0)
    return (right.sum(1) / (mined >= 0).sum(1)).double().mean().item()


def mine(memory: Memory, stages: Stages | Choice, rows: Tensor) -> Tensor:
    """Returns the slots that a cascade mines for the entries at `rows`, [len(rows), P] int64."""
    queries, ids = memory.features[:, rows], {"query_ids": memory.ids[rows], "memory_ids": memory.ids}
    return cascade_select(queries, memory.features, stages.views, stages.keep, **ids)[0]


def measure(memory: Memory) -> dict[str, Any]:
    """Returns the choice, its PMR, that of every fixed cascade, and what each criterion alone would have chosen."""
    began = time.perf_counter()
    choice = choose(memory.features, memory.ids, TOP_K)
    choose_s = time.perf_counter() - began
    size = len(memory.ids)
    fixed = {
        count: {key(stages): positives_rate(memory, stages) for stages in possible(size, count)}
        for count in COUNTS
        if count <= TOP_K
    }
    same = fixed[choice.top_k]
    pmr = positives_rate(memory, choice)
    overall = max((rate, count, name) for count, rates in fixed.items() for name, rate in rates.items())
    best = max(same, key=same.get)
    return {
        "size": size,
        "chosen": key(choice),
        "top_k": choice.top_k,
        "pmr": pmr,
        "best_same": best,
        "pmr_best_same": same[best],
        "ratio_same": pmr / same[best],
        "best_overall": f"{overall[2]} top-{overall[1]}",
        "pmr_best_overall": overall[0],
        "ratio_overall": pmr / overall[0],
        "pmr_paper": fixed[TOP_K].get(key(PAPER)),
        "criteria": choice.criteria,
        "by_criterion": by_criterion(memory, choice, same),
        "choose_s": choose_s,
        "fixed": fixed,
    }


def by_criterion(memory: Memory, choice: Choice, rates: dict[str, float]) -> dict[str, float | None]:
    """Returns the PMR of the cascade that each criterion alone would choose, as a share of that of the best one, at the
    chosen top-k; None for a criterion that was not measured."""
    rows = torch.arange(len(memory.ids))[:: -(-len(memory.ids) // QUERIES)]
    judged = {key(Stages(tuple(row["views"]), row["ratio"], ())): row for row in choice.judged}
    for stages in possible(len(memory.ids), TOP_K):
        mined = mine(memory, stages, rows)
        view = memory.features[1 - stages.views[-1]]  # the one that did not rank
        ids = {"query_ids": memory.ids[rows], "memory_ids": memory.ids}
        for name, proxy in (("view_agreement", view_agreement), ("mutual_neighbours", mutual_neighbours)):
            judged[key(stages)][name] = proxy(view[rows], view, mined, **ids).nanmean().item()
    found = {}
    for criterion in CRITERIA:
        values = {name: row[criterion] for name, row in judged.items() if row[criterion] is not None}
        found[criterion] = rates[max(values, key=values.get)] / max(rates.values()) if values else None
    return found


def key(stages: Stages | Choice) -> str:
    """Returns a cascade without its top-k, such as "frf .5": its order and ratio."""
    order = "".join("rf"[view] for view in stages.views)
    return f"{order} {stages.ratio:g}" if len(order) > 1 else order


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the parts of the section "Results"."""
    percent = "{:.1f}".format

    def cells(row: dict[str, Any]) -> list[str]:
        paper = "–" if row["pmr_paper"] is None else percent(100 * row["pmr_paper"])
        ratios = [f"{row[name]:.3f}" + ("" if row[name] >= GOAL else " †") for name in ("ratio_same", "ratio_overall")]
        best = [f"{percent(100 * row[f'pmr_best_{name}'])} ({row[f'best_{name}']})" for name in ("same", "overall")]
        chosen = f"{row['chosen']} top-{row['top_k']}"
        return [row["set"], f"{row['size']:,}", chosen, percent(100 * row["pmr"]), best[0], ratios[0], best[1],
                ratios[1], paper]  # fmt: skip

    groups = {"The rule was chosen on": [], "Held out": []}
    for row in rows:
        groups["The rule was chosen on" if row["set"].startswith("chosen on") else "Held out"].append(row)
    for title, group in groups.items():
        if not group:
            continue
        reached = [sum(row[name] >= GOAL for row in group) for name in ("ratio_same", "ratio_overall")]
        least = [min(row[name] for row in group) for name in ("ratio_same", "ratio_overall")]
        yield (
            f"### {title}\n\nAt least {GOAL} of the best with as many positives: {reached[0]} of {len(group)} sets "
            f"(lowest {least[0]:.3f}); of the best of all: {reached[1]} (lowest {least[1]:.3f}). † below {GOAL}."
        )
        yield markdown_table(HEADER, [cells(row) for row in group])
    yield (
        "### What each criterion alone would choose\n\n"
        "PMR as a share of that of the best cascade with as many positives."
    )
    shown = [
        [row["set"], *("–" if (v := row["by_criterion"][criterion]) is None else f"{v:.3f}" for criterion in CRITERIA)]
        for row in rows
    ]
    known = {
        criterion: [row["by_criterion"][criterion] for row in rows if row["by_criterion"][criterion] is not None]
        for criterion in CRITERIA
    }
    lowest = ["**lowest**", *(f"**{min(known[criterion]):.3f}**" for criterion in CRITERIA)]
    yield markdown_table(CRITERION_HEADER, [*shown, lowest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[])
    parser.add_argument("--sets", nargs="*", help="measure only these sets, even if they have been measured before")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    stored = args.results / f"{NAME}.json"
    report = json.loads(stored.read_text()) if stored.exists() else {"rows": []}
    earlier = report["rows"]
    if not args.table:
        made = sets() | {f"memory of {path}": partial(of_checkpoint, path) for path in args.checkpoint}
        if unknown := set(args.sets or ()) - set(made):
            parser.error(f"--sets: expected names of sets, got {', '.join(sorted(unknown))}")
        rows = {row["set"]: row for row in earlier}
        wanted = [name for name in made if (name not in rows if args.sets is None else name in args.sets)]
        wanted += [name for name in made if name.startswith("memory of") and name not in wanted]
        machine = world("cpu")
        for name in wanted:
            rows[name] = {"set": name, **measure(made[name]()), "commit": machine["commit"]}
            print(f"{name}: {rows[name]['ratio_same']:.3f}, {rows[name]['ratio_overall']:.3f}", flush=True)
            report = machine | {"rows": [rows[name] for name in {**made, **rows} if name in rows]}
            write_result(stored.name, json.dumps(report, indent=1) + "\n", args.results)
    page = args.results / f"{NAME}.md"
    commits = listed(sorted({row["commit"] for row in report["rows"]}))
    measured = f"Measured with {report['device']}, torch {report['torch']}, commit {commits}."
    text = "\n\n".join([measured, *(part.strip() for part in tables(report["rows"]))])
    write_result(page.name, replace_results(page.read_text(), text, f"{NAME}.py"), args.results)


if __name__ == "__main__":
    main()
