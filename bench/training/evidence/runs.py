"""Trains and evaluates one setting of one seed, and returns its row."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cpr_fast.config import Config, ProbeConfig
from cpr_fast.data.index.index import Index
from cpr_fast.evaluate.classify.probe import feature_probabilities, train_on_features
from cpr_fast.evaluate.features.cache import FeatureCache, digest, embed_index, weights_digest
from cpr_fast.evaluate.features.embedding import Embedding, calibrate_batch_norm, encoder_embeddings
from cpr_fast.evaluate.features.pretrained import load_pretrained
from cpr_fast.evaluate.features.recipe import make_recipe
from cpr_fast.evaluate.features.windows import open_windows
from cpr_fast.evaluate.retrieval.baselines import BASELINES, calibration_videos, untrained_encoders
from cpr_fast.evaluate.retrieval.queries import QueryScores
from cpr_fast.evaluate.retrieval.retrieve import evaluate
from cpr_fast.models import Encoder
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.runtime.files import replacing
from cpr_fast.runtime.interrupt import Interrupted
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint

from .better_mining import WAYS
from .rows import packed
from .settings import ALL, Base, config_of, keeps, settings_digest, start_of

# The published learning rate is for 9,537 videos; `cpr-fast probe` recommends these for few.
PROBE = ProbeConfig(batch_size=32, lr=0.1)
RECIPE = make_recipe("paper")
MEASURES = ("r@1", "r@5", "r@10", "map", "r@1_ci95", "map_ci95")


@contextmanager
def continued_by_the_same_command() -> Iterator[None]:
    """Ends the program, with the exit status of a signal, if one stops the block; says that it can be continued."""
    try:
        yield
    except Interrupted as stopped:
        print(f"{stopped}; the same command continues", file=sys.stderr)
        sys.exit(128 + signal.Signals(stopped.signum))


def run_setting(base: Base, setting: str, seed: int, index: Path, data: str, runs: Path) -> tuple[dict, QueryScores]:
    """Trains a setting, and before it the start if that is missing, and measures it.

    A stopped training is continued from its last checkpoint, or begun again if it mines in a way of `better_mining`,
    whose features no checkpoint holds.

    Args:
        data: the digest of the videos' description.
        runs: the folder of all runs of the set. Each has a folder named by its settings and seed.
    Returns:
        the measures of the row, and those of every query.
    Raises:
        Interrupted: a stop signal came while it trained, and a checkpoint was saved.
    """
    config, last = trained(base, setting, seed, index, data, runs)
    began = time.process_time()
    if setting == "untrained":
        encoders = untrained(config, index, ("rgb", "flow"), seed)
    else:
        encoders = load_pretrained(last).encoders
    found, scores = measure(setting, config, encoders, index, seed, last.parents[2] / "features")
    row = {"training": _cpu(Path(config.run.out)), "evaluation_cpu_s": round(time.process_time() - began, 1),
           "start_weights": _start_weights(last.parents[2] / start_of(setting))}  # fmt: skip
    quality = mining_quality(Path(config.run.out)) if ALL[setting].mining == "cascade" else {}
    return {**found, **quality, **packed(scores, setting), **row}, scores


def trained(base: Base, setting: str, seed: int, index: Path, data: str, runs: Path) -> tuple[Config, Path]:
    """Trains a setting, and before it its start, unless they are there; returns its config and its last checkpoint.

    "untrained" has those of its start. The arguments are those of `run_setting`.
    """
    start, folder = start_of(setting), runs / f"{settings_digest(base, start_of(setting), data)}-seed-{seed}"
    config = config_of(base, start, seed, index, folder)
    config, last = _train(config)
    if ALL[setting].mining is not None:
        config = config_of(base, setting, seed, index, folder)
        keeps(config, len(Index.load(index).select("train")))
        config, last = _train(config, ALL[setting].way)
    return config, last


def _train(config: Config, way: str = "") -> tuple[Config, Path]:
    """Starts or continues a run, or leaves a finished one, and returns its config and its last checkpoint."""
    out = Path(config.run.out)
    last = out / "checkpoints" / "last.pt"
    if way and out.exists() and not is_finished(config, last):
        shutil.rmtree(out)
    with _counted(out), WAYS[way]().in_force() if way else nullcontext():
        pretrain(config, resume="auto", progress=False)
    return config, last


def is_finished(config: Config, last: Path) -> bool:
    """Returns whether a checkpoint is the one at the end of the schedule."""
    return last.exists() and load_checkpoint(last)["epoch"] == sum(cycle.epochs for cycle in config.schedule.cycles)


def _start_weights(run: Path) -> str:
    """Returns the digest of the weights of a start: rows are compared by seed only if they continue the same start."""
    encoders = load_pretrained(run / "checkpoints" / "last.pt").encoders
    return digest(*(weights_digest(encoder) for encoder in encoders.values()))[:12]


CPU = "cpu_s.json"


@contextmanager
def _counted(run: Path) -> Iterator[None]:
    """Adds the CPU time of the block to the run's, also when it is stopped by a signal that it can answer."""
    began = time.process_time()
    try:
        yield
    finally:
        spent = time.process_time() - began
        if run.exists():
            before = json.loads((run / CPU).read_text()) if (run / CPU).exists() else {"cpu_s": 0.0, "processes": 0}
            if spent > 1 or not before["processes"]:  # not the time of finding a run finished
                with replacing(run / CPU) as temporary:
                    temporary.write_text(json.dumps({"cpu_s": round(before["cpu_s"] + spent, 1),
                                                     "processes": before["processes"] + 1}))  # fmt: skip


def _cpu(run: Path) -> dict[str, Any]:
    return json.loads((run / CPU).read_text())


def untrained(config: Config, index: Path, views: tuple[str, ...], seed: int) -> dict[str, Encoder]:
    """Returns encoders with random weights and with BatchNorm statistics of 32 videos, as `cpr-fast retrieve` does."""
    spread = calibration_videos(Index.load(index).select("train"))
    with closing(open_windows(spread, config.data, list(views), RECIPE, "cpu")) as loader:
        encoders = untrained_encoders(dict.fromkeys(views, config), seed, "cpu")
        calibrate_batch_norm(encoders, loader)
        return encoders


def measure(
    name: str, config: Config, encoders: dict[str, Encoder], index: Path, seed: int, cache: Path
) -> tuple[dict[str, Any], QueryScores]:
    """Returns retrieval from the test into the train split and the linear probe, per view and of both views.

    The row of "untrained" also has the pixel baselines, which are the same for every setting and seed.
    """
    videos, views = Index.load(index), list(encoders)
    keys = {view: weights_digest(encoder) for view, encoder in encoders.items()}
    embeddings: dict[str, Embedding] = encoder_embeddings(name, encoders, RECIPE, keys)
    trained = dict(embeddings)
    if name == "untrained":
        embeddings |= BASELINES
    open_loader = partial(open_windows, data=config.data, views=views, recipe=RECIPE, device="cpu")
    store = FeatureCache(cache, RECIPE.identity(config.data, "cpu"))
    found = evaluate(videos, embeddings, open_loader, protocol="train_test", cache=store)
    rows = [{key: row[key] for key in ("name", "view", *MEASURES)} for row in found.rows]
    of_setting = {row.pop("view"): row for row in rows if row["name"] == name}
    measured = {view: {key: value for key, value in row.items() if key != "name"} for view, row in of_setting.items()}
    for view, accuracy in probe(videos, trained, open_loader, store, seed).items():
        measured[view]["probe"] = accuracy
    baselines = {row["name"]: row["map"] for row in rows if row["name"] != name}
    baselines_r1 = {row["name"]: row["r@1"] for row in rows if row["name"] != name}
    pixels = {"pixels": {"map": baselines, "r@1": baselines_r1}} if baselines else {}
    weights = digest(*keys.values())[:12]
    return {"views": measured, **pixels, "weights": weights}, found.scores


def probe(
    videos: Index, embeddings: dict[str, Embedding], open_loader: Any, store: FeatureCache, seed: int
) -> dict[str, float]:
    """Returns the accuracy of a linear classifier of every view's features, and of both views' mean probabilities."""
    parts = [videos.select("train"), videos.select("test")]
    features = [embed_index(part, embeddings, open_loader, store)[0] for part in parts]
    labels = [torch.from_numpy(part.labels) for part in parts]
    found = {}
    for name in embeddings:
        head, _ = train_on_features(features[0][name], labels[0], len(videos.classes), PROBE, seed=seed)
        found[name.split("/")[1]] = feature_probabilities(head, features[1][name])
    if len(found) == 2:
        found["two_stream" if "flow" in found else "merged"] = sum(found.values()) / 2
    return {view: (values.argmax(1) == labels[1]).double().mean().item() for view, values in found.items()}


def mining_quality(run: Path) -> dict[str, Any]:
    """Returns PMR and median CMR (unit: source) of every epoch that mined, per view, from metrics.jsonl."""
    epochs = [row for row in read_metrics(run) if row["kind"] == "epoch" and row["pmr"] is not None]
    return {
        "mining": {
            view: {
                key: [round(row[key], 4) for row in epochs if row["view"] == view]
                for key in ("pmr", "pmr_chance", "cmr_median")
            }
            for view in dict.fromkeys(row["view"] for row in epochs)
        }
    }
