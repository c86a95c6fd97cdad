"""Compares the score without labels, by which `best.pt` is chosen, with retrieval that uses labels.

    python bench/training/checkpoint_choice.py WORK [--sets synthetic …] [--seeds 0 …] [--kinds plain …]
    python bench/training/checkpoint_choice.py WORK --sets jhmdb --runs RUN_FOLDER …
    python bench/training/checkpoint_choice.py --table

Videos, flow and runs are in WORK. Trains the runs of every set, with the settings of the study and variants of them,
keeps a checkpoint of every epoch, and measures some of them; with --runs measures the checkpoints of existing runs on
the same videos instead. Each measured encoder appends a row to checkpoint_choice.jsonl; rows that are there are not
measured again. The protocol and the results are in bench/results/checkpoint_choice.md; --table writes its section
"Results" and the scatter plot from the rows again.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from checkpoint_tables import draw, tables
from evidence.rows import read_rows
from evidence.settings import CANDIDATES, config_of, replace
from evidence.tables import replace_results
from evidence.videos import SETS, prepare
from measure import RESULTS, world, write_result

from cpr_fast.config import Config, DataConfig, View
from cpr_fast.data.clips.loader import TrainLoader, WindowLoader
from cpr_fast.data.index.index import Index
from cpr_fast.evaluate.retrieval.ranking import NO_HIT, Comparison, rates
from cpr_fast.evaluate.retrieval.ranking import prepare as prepared
from cpr_fast.mining.unlabelled import unlabelled_score
from cpr_fast.models import Encoder
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.runtime.files import append_line
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders

NAME = "checkpoint_choice"
VIEWS: tuple[View, ...] = ("rgb", "flow")
BASE = {"synthetic": 0, "jhmdb": 1, "shrec17": 1}  # the candidate of the study's settings
WINDOWS = {"synthetic": 3, "jhmdb": 2, "shrec17": 1}  # per video, for retrieval
VIDEOS = 256  # training videos that are scored
AT_ONCE = 64  # clips
# Plain runs, and settings that are known to teach less.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "temperature 1": {"loss": {"temperature": 1.0}},
    "not augmented": {"data": {"augment": "none"}},
}


class Videos:
    """The clips of a set in two views, decoded once: windows of all videos, and two augmented clips of some for
    training.

    Attributes:
        windows, pairs: {view: [M * W, 3, T, S, S]} and {view: [N, 2, 3, T, S, S]}, float16 to save memory.
        video: [M * W], the video of each window.
        ids: [N], the sources of the scored videos.
    """

    def __init__(self, index: Index, data: DataConfig, windows: int) -> None:
        self.index, self.count = index, windows
        train = index.select(split="train")
        count = min(VIDEOS, len(train))
        part = train.chosen(len(train) * i // count for i in range(count))
        with closing(WindowLoader(index, data, VIEWS, clips_per_video=windows)) as loader:
            batches = [(halved(batch.clips), batch.video) for batch in loader]
        self.video = torch.cat([video for _, video in batches])
        self.windows = {view: torch.cat([clips[view] for clips, _ in batches]) for view in VIEWS}
        with closing(TrainLoader(part, data, VIEWS, seed=0)) as loader:
            batches = [(halved(batch.clips), batch.source) for batch in loader.epoch(0)]
        self.ids = torch.cat([source for _, source in batches])
        self.pairs = {view: torch.cat([clips[view] for clips, _ in batches]) for view in VIEWS}

    def measure(self, encoder: Encoder, view: View) -> dict[str, Any]:
        """Returns the score, its signs, and R@1 and mAP: from test into train videos, and ("all") from every video into
        those of other sources."""
        pairs = encoded(encoder, self.pairs[view].flatten(0, 1)).unflatten(0, (-1, 2))
        return {**unlabelled_score(pairs, self.ids), "scored_videos": len(pairs), **self._retrieval(encoder, view)}

    def _retrieval(self, encoder: Encoder, view: View) -> dict[str, float]:
        units = F.normalize(encoded(encoder, self.windows[view]), dim=1)
        features = torch.zeros(len(self.index), units.shape[1]).index_add_(0, self.video, units) / self.count
        labels, sources = torch.from_numpy(self.index.labels), torch.from_numpy(self.index.source_ids)
        test = torch.tensor([video.split == "test" for video in self.index])
        queries, gallery = features[test], features[~test]
        ranking = Comparison([prepared(queries, gallery, "cosine")], "cosine").rank(labels[test], labels[~test])
        of_test = rates(ranking, torch.ones(len(queries), dtype=torch.bool), sources[test], len(gallery))
        ranking = Comparison([prepared(features, features, "cosine")], "cosine", sources, sources).rank(labels, labels)
        of_all = rates(ranking, ranking.first_hit != NO_HIT, sources, len(features))
        return {"r@1": of_test["r@1"], "map": of_test["map"], "r@1_all": of_all["r@1"], "map_all": of_all["map"],
                "queries": of_test["queries"], "queries_all": of_all["queries"]}  # fmt: skip


def halved(clips: dict[str, Tensor]) -> dict[str, Tensor]:
    return {view: values.half() for view, values in clips.items()}


@torch.inference_mode()
def encoded(encoder: Encoder, clips: Tensor) -> Tensor:
    """Returns the features that retrieval compares, [N, F] float32, of clips [N, 3, T, S, S] float16."""
    return torch.cat([encoder.features(part.float()) for part in clips.split(AT_ONCE)])


def config_of_run(name: str, kind: str, seed: int, index: Path, runs: Path) -> Config:
    """Returns the start of the study and its cascade of five stages as one run that keeps all checkpoints."""
    base = CANDIDATES[name][BASE[name]]
    config, mined = (config_of(base, setting, seed, index, runs) for setting in ("start", "cpr_n5"))
    config = replace(config, "schedule", cycles=config.schedule.cycles + mined.schedule.cycles)
    for section, changes in KINDS[kind].items():
        config = replace(config, section, **changes)
    epochs = sum(cycle.epochs for cycle in config.schedule.cycles)
    out = runs / f"{kind.replace(' ', '_')}-seed-{seed}"
    return replace(config, "run", out=str(out), keep_checkpoints=epochs)


def measured_epochs(config: Config) -> set[int]:
    """Returns the epochs done in the checkpoints that are measured: after 1, 2, 4, 8, … epochs of every cycle, and at
    its end."""
    found, before = set(), 0
    for cycle in config.schedule.cycles:
        found |= {before + 2**power for power in range(cycle.epochs.bit_length()) if 2**power <= cycle.epochs}
        before += cycle.epochs
        found.add(before)
    return found


def checkpoints(run: Path) -> Iterator[tuple[Path, list[View], int]]:
    """Yields the checkpoints of a run to measure, the views that are measured and the epochs done: the view that is
    learning, or all where only the last checkpoints were kept."""
    paths = sorted((run / "checkpoints").glob("step-*.pt"))
    for path in paths:
        saved = load_checkpoint(path)
        config, epoch = Config.from_dict(saved["config"]), saved["epoch"]
        if len(paths) <= 2:
            if path == paths[-1]:
                yield path, [view for view in VIEWS if view in saved["encoders"]], epoch
        elif saved["step_in_epoch"] == 0 and epoch in measured_epochs(config):
            yield path, [config.schedule.cycles[saved["cycle"]].view], epoch


def measure_runs(name: str, runs: dict[str, Path], videos: Videos, results: Path) -> None:
    """Appends a row for each encoder of the runs {name: folder} that has none."""
    about = {key: value for key, value in world("cpu").items() if key != "command"}
    for label, run in runs.items():
        done = {(row["run"], row["epoch"], row["view"]) for row in read_rows(results) if row["set"] == name}
        for path, views, epoch in checkpoints(run):
            wanted = [view for view in views if (label, epoch, view) not in done]
            encoders = load_encoders(path)[1] if wanted else {}
            for view in wanted:
                found = videos.measure(encoders[view], view)
                row = {"set": name, "run": label, "epoch": epoch, "step": int(path.stem.split("-")[1]), "view": view}
                append_line(results, json.dumps({**row, **found, **about}))
                print(f"{name}, {label}, epoch {epoch}, {view}: score {found['score']:.3f}, R@1 {found['r@1']:.3f}, "
                      f"mAP {found['map']:.3f}", flush=True)  # fmt: skip


def run_set(args: argparse.Namespace, name: str) -> None:
    """Trains the runs of a set, unless they are given, and measures them."""
    index = prepare(name, args.work / "data" / name, progress=True)
    found = {label_of(run): run for run in args.runs}
    for kind in args.kinds if not args.runs else []:
        for seed in args.seeds:
            config = config_of_run(name, kind, seed, index, args.work / "runs" / name)
            found[f"{kind}, seed {seed}"] = pretrain(config, resume="auto", progress=False)
    data = config_of_run(name, "plain", 0, index, args.work).data
    measure_runs(name, found, Videos(Index.load(index), data, WINDOWS[name]), args.results / f"{NAME}.jsonl")


def label_of(run: Path) -> str:
    """Returns a name for the folder of a run: its name and that of the folder above."""
    return f"{run.resolve().parent.name}/{run.resolve().name}"


def write_page(results: Path) -> None:
    rows, page = read_rows(results / f"{NAME}.jsonl"), results / f"{NAME}.md"
    draw(rows, results / f"{NAME}.png")
    text = "\n\n".join(tables(rows))
    write_result(page.name, replace_results(page.read_text(), text, f"{NAME}.py"), results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("runs/checkpoint_choice"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="measure these runs of one set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the tables of the existing rows")
    args = parser.parse_args()
    if args.runs and len(args.sets) != 1:
        parser.error(f"--runs: expected one set whose videos they were trained on, got --sets {' '.join(args.sets)}")
    if missing := [run for run in args.runs if not (run / "checkpoints").is_dir()]:
        parser.error(f"--runs: expected run folders with checkpoints, got {', '.join(map(str, missing))}")
    torch.set_num_threads(args.threads)
    if not args.table:
        for name in args.sets:
            run_set(args, name)
    write_page(args.results)


if __name__ == "__main__":
    main()
