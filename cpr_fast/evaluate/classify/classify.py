"""Linear probe and finetuning [paper, Tables 1, 2, 5 and 7], for every split, seed and view, and for both views
together.

The `recipe` decides how the test split is used:
    "paper": the test split is used once, at the end, to test the classifier of the last epoch.
    "coclr": as in the released code, the epoch with the best result on the test split is chosen. The field `leakage`
        of the results states this.
    "iic": same as "paper", but tested on 10 evenly spaced clips.
With `settings.validation` a part of the train split is held out: the test split is then still used once, for the
classifier of the epoch with the lowest loss on that part.
The predictions of a classifier are stored. They are reused for the same weights, videos and settings.

Letters: M videos, C channels, L classes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from cpr_fast.config import ClassifierConfig, Config, DataConfig, ProbeConfig
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips.loader import TrainLoader, WindowLoader
from cpr_fast.data.clips.sampling import plan_labelled, plan_selection
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.unreadable import REPLACED, not_read
from cpr_fast.errors import InputError
from cpr_fast.evaluate.classify.classifier import Classifier, video_probabilities
from cpr_fast.evaluate.classify.finetune import Training, selection_accuracy, train_on_clips, validation_loss
from cpr_fast.evaluate.classify.predictions import OnStop, Predictions, tested_videos
from cpr_fast.evaluate.classify.probe import feature_probabilities, train_on_features
from cpr_fast.evaluate.classify.scores import classification_scores
from cpr_fast.evaluate.features.cache import FeatureCache, digest, embed_index, video_digests, weights_digest
from cpr_fast.evaluate.features.embedding import encoder_embeddings
from cpr_fast.evaluate.features.intervals import seed_interval
from cpr_fast.evaluate.features.pretrained import Pretrained, load_pretrained
from cpr_fast.evaluate.features.recipe import Recipe, RecipeName, recipe_for
from cpr_fast.evaluate.features.results import Checkpoints, results_folder, run_metrics, write_result
from cpr_fast.evaluate.features.shares import shared_out
from cpr_fast.evaluate.features.windows import count_windows, open_windows, work_ahead
from cpr_fast.evaluate.retrieval.queries import have_copies
from cpr_fast.evaluate.retrieval.ranking import TOGETHER
from cpr_fast.models import Encoder
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.files import one_writer
from cpr_fast.runtime.progress import Forecast, Part
from cpr_fast.wording import counted

Task = Literal["probe", "finetune"]
TESTED = "tested"  # begins the name of the file with the videos that were tested before a stop

log = logging.getLogger(__name__)


def classify(
    checkpoint: Checkpoints,
    indexes: Sequence[str | Path],
    *,
    task: Task,
    settings: ClassifierConfig | None = None,
    recipe: RecipeName | None = None,
    clips_per_video: int | None = None,
    crops: int | None = None,
    pictures_fps: float | None = None,
    seeds: Sequence[int] = (0,),
    out: str | Path | None = None,
    run_dir: str | Path | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Trains and tests classifiers of every view of a checkpoint, and tests the mean of both views' probabilities.

    Under `torchrun` the processes share the test videos. Each process trains on `settings.batch_size` clips per step.

    Args:
        checkpoint, pictures_fps: One file, or one per view, and the rate of pictures; see `load_pretrained`.
        indexes: Labelled videos in the splits "train" and "test", one file for each official split.
        settings: None means the section of the (first) checkpoint's config.
        recipe, clips_per_video, crops: None means the networks' own recipe, its windows and crops, see `recipe_for`.
        seeds: Seeds of the head's initial weights, the order of videos, the augmentation and the dropout.
        out, run_dir: Folder of the results, by default `evaluations` of the run. Run whose metrics get a row for each.
    Returns:
        `task`, `recipe`, `leakage`, `view` (two_stream or merged if there are both views) with its `accuracy` and
        `accuracy_ci95`, `summary` (the same for every view: mean over splits and seeds, interval over seeds or, for one
        seed and split, of the bootstrap over sources; `accuracy_std`, n - 1, over splits), `results` (rows of
        `classification_scores`) and `file`, where all of this was written.
    """
    if not indexes or not seeds:
        raise InputError(f"--index, --seeds: expected at least one of each, got {len(indexes)} and {len(seeds)}")
    world, pretrained = distributed.init(device), load_pretrained(checkpoint, pictures_fps=pictures_fps)
    configs, encoders = pretrained.configs, pretrained.encoders
    digests = {view: weights_digest(encoder) for view, encoder in encoders.items()}
    settings = settings or getattr(next(iter(configs.values())), task)
    folder = results_folder(Path(out) if out else pretrained.evaluations)
    how = recipe_for(pretrained.data, recipe, clips_per_video, crops)
    store = FeatureCache(pretrained.features, how.identity(pretrained.data, str(world.device)))
    rows, splits, work = [], _splits(task, settings, pretrained, indexes), Forecast(0)
    for number, (path, split) in enumerate(zip(indexes, splits, strict=True)):
        for place, seed in enumerate(seeds):
            later = (len(splits) - number) * len(seeds) - place - 1
            job = Job(task, configs, settings, how, split, seed, folder, world, progress and world.is_main, later, work)
            if job.on_features and not rows:
                work.expect(len(seeds) * sum(map(job.windows, splits)))
            found = {view: predictions(job, view, encoders[view], digests[view], store) for view in encoders}
            common = {"task": task, "recipe": how.name, "index": str(path), "split": number + 1, "seed": seed}
            rows += [common | row for row in _score(found, split, how.crops)]
    summary = _summary(rows, len(indexes))
    result = {"task": task, "recipe": how.name, "leakage": how.leakage, "crops": how.crops,
              **{key: summary[-1][key] for key in ("view", "accuracy", "accuracy_ci95")}, "checkpoint": pretrained.name,
              "settings": dataclasses.asdict(settings), "summary": summary, "results": rows}  # fmt: skip
    parts = [pretrained.name, list(map(str, indexes)), list(seeds), result["settings"], how.crops, *_processes(job)]
    path = write_result(folder, f"{task}-{how.name}-{digest(json.dumps(parts))[:8]}", result)
    _write_metrics(run_dir if world.is_main else None, rows)
    return result | {"file": str(path)}


def _write_metrics(run_dir: str | Path | None, rows: list[dict[str, Any]]) -> None:
    if run_dir is None:
        return
    with run_metrics(run_dir) as writer:
        for row in rows:
            writer.write({"kind": "classification", **row, "index": os.path.abspath(row["index"])})


@dataclass(frozen=True)
class Split:
    """The labelled videos of one official split."""

    train: Index
    test: Index


def _splits(task: Task, settings: ClassifierConfig, networks: Pretrained, indexes: Sequence[str | Path]) -> list[Split]:
    """Returns the labelled videos of every index, or the clips of every store of features."""
    if task == "finetune" or settings.inputs == "clips":
        networks.of_videos(task if task == "finetune" else "probe --inputs clips")
    return [load_split(path, networks.data, networks.open("--index", path)) for path in indexes]


def load_split(path: str | Path, data: DataConfig, index: Index | None = None) -> Split:
    """Loads the labelled videos of `path`, or takes those of `index`, by split. Raises InputError for too few."""
    index = index or Index.load(path, require_flow=data.flow == "stored").long_enough(data)
    parts = []
    for name in ("train", "test"):
        part = index.select(name)
        labelled = part.chosen((part.labels >= 0).nonzero()[0])
        if len(labelled) < (2 if name == "train" else 1):
            raise InputError(f"{path}: expected labelled videos in split {name!r}, got {len(labelled)} of {len(part)}")
        parts.append(labelled)
    shared = len({v.source for v in parts[0]} & {v.source for v in parts[1]})
    copied = sum(have_copies(parts[1], parts[0], other_sources=False)) if distributed.is_main() else 0
    if copied:
        log.warning("%s: %d of %s have an exact copy among the training videos, which tells their class",
                    path, copied, counted(len(parts[1]), "test video"))  # fmt: skip
    if shared and distributed.is_main():
        log.warning("%s: both splits have videos of %s, so test videos have siblings among the training videos", path,
                    counted(shared, "source"))  # fmt: skip
    return Split(*parts)


@dataclass(frozen=True)
class Job:
    """The classifiers of one split and seed; `configs` are the pretraining configs by view.

    Attributes:
        later: Number of pairs of a split and a seed that follow.
        work: The windows of all splits, seeds and views whose features are read.
    """

    task: Task
    configs: dict[str, Config]
    settings: ClassifierConfig
    recipe: Recipe
    split: Split
    seed: int
    folder: Path
    world: World
    progress: bool
    later: int
    work: Forecast

    def trainings_after(self, view: str) -> int:
        """Returns how many classifiers are trained after the one of this view."""
        views = list(self.configs)
        return len(views) - 1 - views.index(view) + self.later * len(views)

    def windows(self, split: Split) -> int:
        """Returns the number of windows of the videos of a split, over all views."""
        data, parts = [config.data for config in self.configs.values()], (split.train, split.test)
        return sum(count_windows(part, each, self.recipe) for part in parts for each in data)

    @property
    def on_features(self) -> bool:
        """Whether the classifiers are trained on stored features instead of clips."""
        return isinstance(self.settings, ProbeConfig) and self.settings.inputs == "features"


def predictions(job: Job, view: str, pretrained: Encoder, key: str, store: FeatureCache) -> Predictions:
    """Returns the predictions of one view's classifier for the test videos; trains it unless they are stored.

    Args:
        pretrained: The view's encoder in eval mode, which is not changed.
        key: The encoder's `weights_digest`.
    """
    folder = job.folder / f"{job.task}-{view}-{_identity(job, view, key)[:12]}"
    path = folder / "predictions.safetensors"
    if (stored := distributed.from_main(lambda: Predictions.load(path))) is not None:
        return stored
    encoder = copy.deepcopy(pretrained).to(job.world.device)
    if job.on_features:
        found = _probe_features(job, view, encoder, key, store)
    else:
        found = _train_on_clips(job, view, encoder, folder)
    if job.world.is_main:
        found.save(path)
        for unfinished in folder.glob(f"{TESTED}-*"):
            unfinished.unlink()
    return found


def _probe_features(job: Job, view: str, encoder: Encoder, key: str, store: FeatureCache) -> Predictions:
    """Trains on one stored feature per video, the mean over its windows and crops; unread videos are left out."""
    kept = {view: "" if job.configs[view].data.features else key}  # what a store holds is not stored again
    embedding = encoder_embeddings("net", {view: encoder}, job.recipe, kept)
    device = job.world.device

    def open_loader(part: Index) -> WindowLoader:
        return open_windows(part, job.configs[view].data, [view], job.recipe, str(device))

    def features(part: Index, name: str) -> tuple[Tensor, Tensor, Tensor]:
        found, windows = embed_index(
            part, embedding, open_loader, store, description=f"{view} features, {name}", progress=job.progress,
            work=Part(job.work, job.world.size),  # of each window, this process reads its share
        )  # fmt: skip
        return found[f"net/{view}"].to(device), torch.from_numpy(part.labels).to(device), windows

    train, train_labels, train_windows = features(job.split.train, "train")
    test, test_labels, windows = features(job.split.test, "test")
    kept = train_windows > 0
    select_on = (test[windows > 0], test_labels[windows > 0]) if job.recipe.selects_on_test else None
    head, best = train_on_features(
        train[kept], train_labels[kept], len(job.split.train.classes), job.settings, seed=job.seed, select_on=select_on
    )
    return Predictions({job.recipe.crops: feature_probabilities(head, test)}, windows, best)


def _train_on_clips(job: Job, view: str, encoder: Encoder, folder: Path) -> Predictions:
    """Trains on augmented clips of the train split, and tests every window and crop of the test split."""
    test, settings, device = job.split.test, job.settings, job.world.device
    train, validation = hold_out(job.split.train, settings.validation, job.seed)
    differences = view == "residual" and settings.residual == "difference"
    rescaled = normalisation(job.configs[view].data.augment) if differences else None
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        model = Classifier(encoder, len(train.classes), settings, rescaled=rescaled).to(device)
    training = Training(job.configs[view], settings, view, folder, job.seed, device, progress=job.progress,
                        later=job.trainings_after(view))  # fmt: skip
    with ExitStack() as stack:
        if job.world.is_main:
            stack.enter_context(one_writer(folder / ".lock", f"another process is training in {str(folder)!r}"))
        open_loader = lambda part, plan: stack.enter_context(closing(_clip_loader(job, part, view, plan)))  # noqa: E731
        if job.recipe.selects_on_test:
            select = selection_accuracy(open_loader(test, plan_selection), len(test), view, device)
            training = dataclasses.replace(training, select=select)
        if len(validation):
            loss = validation_loss(open_loader(validation, plan_selection), len(validation), view, device)
            training = dataclasses.replace(training, validate=loss)
        loader = open_loader(train, plan_labelled)
        if job.progress:
            log.info(_plan(job, view, len(train), len(loader)))
        done = train_on_clips(model, loader, training)
        skipped = sorted(distributed.union((str(path), reason) for path, reason in loader.skipped))
        if skipped and job.world.is_main:
            log.warning("%s: %s", view, not_read(skipped, REPLACED))

    tested = folder / f"{TESTED}-{weights_digest(model)[:12]}.safetensors"
    if job.world.size > 1:  # of a stopped test, the share of one process says nothing about the others
        return Predictions(*shared_out(len(test), lambda mine: _test(job, view, model, mine)), done["best_epoch"])
    found = tested_videos(len(test), lambda todo, on_stop: _test(job, view, model, todo, on_stop), tested)
    return Predictions(*found, done["best_epoch"])


def _test(
    job: Job, view: str, model: Classifier, positions: Sequence[int], on_stop: OnStop | None = None
) -> tuple[dict[int, Tensor], Tensor]:
    """Tests a classifier on every window and crop of the test videos at these positions, see `video_probabilities`."""
    part = Index((job.split.test[i] for i in positions), job.split.test.classes)
    stored = len(job.split.test) - len(part) if on_stop else 0
    with closing(open_windows(part, job.configs[view].data, [view], job.recipe, str(job.world.device))) as windows:
        if job.progress:
            log.info(work_ahead(f"{view}, test", len(part), windows, stored=stored))
        found = video_probabilities(
            model, windows, len(part), view, crops=job.recipe.crops, description=f"{view}, test",
            progress=job.progress, on_stop=on_stop,
        )  # fmt: skip
        if windows.skipped:
            log.warning("%s, test: %s", view, not_read(windows.skipped, "left out"))
    return found


def hold_out(train: Index, fraction: float, seed: int) -> tuple[Index, Index]:
    """Splits the training videos at random into those to train on and the validation part, in the order of the index.

    As in IIC's code, videos are drawn without regard to their sources. Both parts get at least one of the two or more
    videos, unless `fraction` is 0: then nothing is held out.
    """
    count = min(max(round(fraction * len(train)), 1), len(train) - 1) if fraction else 0
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    held = set(drawn.tolist())
    return tuple(train.chosen(i for i in range(len(train)) if (i in held) == out) for out in (False, True))


def _plan(job: Job, view: str, videos: int, steps: int) -> str:
    """Returns a sentence about the training of one view's classifier on clips and its test, to be said before both."""
    test, epochs = job.split.test, job.settings.epochs
    windows = count_windows(test, job.configs[view].data, job.recipe)
    later = job.trainings_after(view)
    return (
        f"{job.task} of {view}: {counted(epochs, 'epoch')} of {counted(steps, 'step')} on "
        f"{counted(videos, 'video')}, then a test on {counted(len(test), 'video')} in {counted(windows, 'window')}"
        + (f"; {counted(later, 'training')} after it" if later else "")
    )


def _clip_loader(job: Job, part: Index, view: str, plan: Any) -> TrainLoader:
    world = job.world
    largest = max(len(part) // world.size, 1)
    data = dataclasses.replace(job.configs[view].data, batch_size=min(job.settings.batch_size, largest), disk_cache="")
    return TrainLoader(
        part, data, [view], seed=job.seed, device=world.device, rank=world.rank, world_size=world.size, plan=plan
    )


def _identity(job: Job, view: str, weights: str) -> str:
    """Returns a digest of everything that the predictions depend on."""
    data = job.configs[view].data
    identity = job.recipe.identity(data, str(job.world.device))
    videos = [
        [[key, video.label] for key, video in zip(video_digests(part, view, identity), part, strict=True)]
        for part in (job.split.train, job.split.test)
    ]
    settings = [job.task, dataclasses.asdict(job.settings), job.seed, identity, data.crop_area, job.split.train.classes]
    return digest(json.dumps([settings, videos, weights, *_processes(job)]))


def _processes(job: Job) -> list[int]:
    """Returns the number of processes if several share a step, because the batch of a step grows with their number."""
    return [] if job.on_features or job.world.size == 1 else [job.world.size]


def _score(found: dict[str, Predictions], split: Split, crops: int) -> list[dict[str, Any]]:
    """Returns a row per view and one for both views (mean probabilities), over the videos that both could read."""
    readable = torch.stack([p.windows for p in found.values()]).amin(0) > 0
    if not readable.any():
        raise InputError(f"test: no window of any of the {counted(len(split.test), 'video')} could be read")
    labels = torch.from_numpy(split.test.labels)[readable]
    sources = torch.from_numpy(split.test.source_ids)[readable]
    streams = {view: p.probabilities for view, p in found.items()}
    for together, (first, second) in TOGETHER.items():
        if {first, second} <= set(found):
            streams[together] = {n: (streams[first][n] + streams[second][n]) / 2 for n in streams[first]}
    rows = []
    for view, by_crops in streams.items():
        accuracies = {str(n): (p[readable].argmax(1) == labels).double().mean().item() for n, p in by_crops.items()}
        scores = classification_scores(by_crops[crops][readable], labels, sources, split.test.classes)
        best = found[view].best_epoch if view in found else None
        rows.append({"view": view, "crops": crops, **scores, "accuracy_by_crops": accuracies, "best_epoch": best,
                     "unread": int((~readable).sum())})  # fmt: skip
    return rows


def _summary(rows: list[dict[str, Any]], splits: int) -> list[dict[str, Any]]:
    """Returns a row per view: the mean over splits, then over seeds."""
    summary = []
    for view in dict.fromkeys(row["view"] for row in rows):
        of_view = [row for row in rows if row["view"] == view]
        seeds = dict.fromkeys(row["seed"] for row in of_view)
        values = [mean(row["accuracy"] for row in of_view if row["seed"] == seed) for seed in seeds]
        interval, kind = seed_interval(values), "seeds"
        if interval is None:
            interval, kind = (of_view[0]["accuracy_ci95"], "sources") if splits == 1 else (None, None)
        by_split = [mean(row["accuracy"] for row in of_view if row["split"] == n + 1) for n in range(splits)]
        deviation = stdev(by_split) if splits > 1 else None
        summary.append({"view": view, "accuracy": mean(values), "accuracy_std": deviation, "accuracy_ci95": interval,
                        "interval_over": kind, "splits": splits, "seeds": len(seeds)})  # fmt: skip
    return summary
