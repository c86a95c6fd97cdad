"""Training a classifier on clips, end to end or on a frozen backbone; goes on where it was stopped.

Every draw of an epoch, the dropout's included, is a function of the seed and the epoch, so a run that was killed and
started again ends as one that never was (bitwise on the CPU). Letters: B clips of a step, M videos, L classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ..config import ClassifierConfig, Config
from ..data.pipeline import Batch
from ..metrics import FILE as METRICS_FILE
from ..metrics import MetricsWriter, rewind
from ..precision import autocast
from ..progress import track
from .classifier import Classifier, make_optimizer, set_epoch

LAST = "last.pt"


class ClipLoader(Protocol):
    """What training asks of `cpr_fast.data.pipeline.TrainLoader` with a plan of one clip per video."""

    def __len__(self) -> int: ...
    def epoch(self, epoch: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Training:
    """What one training is, besides its clips.

    Attributes:
        config: of the pretraining, saved along, so that the finetuned encoder can be read as any other.
        view: the view whose clips are classified.
        folder: receives `last.pt` and metrics.jsonl after every epoch.
        select: None, or a measure of the model after an epoch, (model, epoch) -> float: the weights of the best epoch
            are kept in place of the last ones.
    """

    config: Config
    settings: ClassifierConfig
    view: str
    folder: Path
    seed: int
    device: torch.device
    select: Callable[[Classifier, int], float] | None = None
    progress: bool = False


def train_on_clips(model: Classifier, loader: ClipLoader, training: Training) -> dict[str, Any]:
    """Trains `model` in place, from `last.pt` of the folder if there is one.

    Returns:
        `epochs` done and the `best_epoch` whose weights the model ends with (the last one without `select`).
    Raises:
        ArithmeticError: the loss became NaN or infinite.
    """
    settings = training.settings
    optimizer = make_optimizer(model.parameter_groups(settings), settings)
    scaler = torch.amp.GradScaler(training.device.type, enabled=settings.precision == "fp16")
    state = _load(model, optimizer, scaler, training)
    first, best = (state["epoch"], state["best"]) if state else (0, None)
    training.folder.mkdir(parents=True, exist_ok=True)
    if (training.folder / METRICS_FILE).exists():
        rewind(training.folder, step=0, epoch=first)
    with MetricsWriter(training.folder) as writer:
        for epoch in range(first, settings.epochs):
            began = time.perf_counter()
            lr = set_epoch(optimizer, settings, epoch)
            loss, accuracy = _train_epoch(model, loader, optimizer, scaler, training, epoch)
            row = {"kind": "epoch", "epoch": epoch, "loss": loss, "accuracy": accuracy, "lr": lr}
            if training.select is not None:
                row["selection"] = training.select(model, epoch)
                if best is None or row["selection"] > best["selection"]:
                    weights = {name: value.clone() for name, value in model.state_dict().items()}
                    best = {"selection": row["selection"], "epoch": epoch, "model": weights}
            writer.write(row | {"epoch_time_s": time.perf_counter() - began})
            _save(model, optimizer, scaler, training, epoch + 1, best)
    if best is not None:
        model.load_state_dict(best["model"])
    return {"epochs": settings.epochs, "best_epoch": best["epoch"] if best else settings.epochs - 1}


def _train_epoch(
    model: Classifier,
    loader: ClipLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    training: Training,
    epoch: int,
) -> tuple[float, float]:
    """One pass over the training videos; returns the mean loss and the share of clips that were classified right."""
    model.train()
    device = training.device
    total = torch.zeros(3, dtype=torch.float64, device=device)  # loss, hits, clips: read once, at the end
    title = f"{training.view}, epoch {epoch + 1}/{training.settings.epochs}"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((training.seed << 20) + epoch)
        for batch in track(loader.epoch(epoch), title, total=len(loader), unit="steps", progress=training.progress):
            labels = batch.label.to(device)
            with autocast(device, training.settings.precision):
                logits = model(batch.clips[training.view][:, 0])  # [B, L]
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            hits = (logits.detach().argmax(1) == labels).sum()
            total += torch.stack([loss.detach() * len(labels), hits, hits.new_tensor(len(labels))])
    loss, hits, clips = total.tolist()
    if not loss / clips < float("inf"):
        raise ArithmeticError(f"epoch {epoch}: the loss of the classifier is NaN or infinite; lower its rates")
    return loss / clips, hits / clips


def selection_accuracy(loader: Any, videos: int, view: str, device: torch.device) -> Callable[[Classifier, int], float]:
    """The published code's selection: accuracy on one clip of every test video, for `Training.select`.

    Args:
        loader: a TrainLoader with `plan_selection` over the M test videos; those left over by its batches are sampled.
    """

    def measure(model: Classifier, epoch: int) -> float:
        model.eval()
        seen, hits = set(), 0

        def count(batch: Batch) -> None:
            nonlocal hits
            right = model(batch.clips[view][:, 0]).argmax(1) == batch.label.to(device)
            hits += int(right.sum())
            seen.update(batch.video.tolist())

        with torch.inference_mode():
            for batch in loader.epoch(epoch):
                count(batch)
            for video in sorted(set(range(videos)) - seen):
                count(loader.sample(epoch, video))
        return hits / videos

    return measure


def _load(
    model: Classifier, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, training: Training
) -> dict[str, Any] | None:
    """The state to go on from, put in place; None where there is none or what is there cannot be read."""
    path = training.folder / LAST
    if not path.exists():
        return None
    state = load_checkpoint(path, device=training.device)
    try:
        model.encoder.load_state_dict(state["encoders"][training.view])
        model.head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is of another classifier ({error}); expected none or its own") from None
    return state


def _save(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    training: Training,
    epoch: int,
    best: dict[str, Tensor] | None,
) -> None:
    payload = {
        "config": training.config.to_dict(),
        "encoders": {training.view: model.encoder.state_dict()},
        "head": model.head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch,
        "best": best,
    }
    save_checkpoint(training.folder / LAST, payload)
