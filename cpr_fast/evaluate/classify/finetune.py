"""Training of a classifier on clips, end to end or on a frozen backbone. An interrupted training can be continued.

All random numbers of an epoch, including those of dropout, are functions of the seed and the epoch. A training that was
killed and restarted therefore gives the same result as an uninterrupted one (bit-for-bit on a CPU). SIGTERM, SIGUSR1,
SIGHUP and Ctrl-C save the state in the middle of an epoch.

Under `torchrun` every process runs the backbone on its clips of a step, and the head on the features of all processes,
so the head's BatchNorm and dropout are the same as in one process with the whole batch. The backbone's BatchNorm sees
one process's clips at a time, as in the published runs; its running statistics are the mean over the processes.

Letters: R processes, B clips per process of a step, M videos, L classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cpr_fast.config import ClassifierConfig, Config
from cpr_fast.data.clips.stream import Batch
from cpr_fast.errors import enough_values
from cpr_fast.evaluate.classify.classifier import Classifier, make_optimizer, set_epoch
from cpr_fast.models import running_statistics
from cpr_fast.runtime import distributed
from cpr_fast.runtime.interrupt import Interrupted, StopRequest, stop_requests
from cpr_fast.runtime.metrics import FILE as METRICS_FILE
from cpr_fast.runtime.metrics import MetricsWriter, rewind
from cpr_fast.runtime.precision import autocast
from cpr_fast.runtime.progress import Forecast, track
from cpr_fast.weights.checkpoint import load_checkpoint, save_checkpoint
from cpr_fast.weights.reading import CheckpointError
from cpr_fast.wording import counted

LAST = "last.pt"


class ClipLoader(Protocol):
    """The part of `cpr_fast.data.clips.loader.TrainLoader` that training uses, with a plan of one clip per video."""

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Training:
    """The settings of one training.

    Attributes:
        config: The config of the pretraining; it is saved, so that the finetuned encoder can be loaded as usual.
        view: The view whose clips are classified.
        folder: Receives `last.pt` and metrics.jsonl after every epoch.
        select: None, or a function (model, epoch) -> float; the weights of the epoch with the largest value are kept
            instead of those of the last epoch.
        validate: None, or a function (model, epoch) -> loss on the validation part. The schedule "plateau" watches this
            loss. Without `select`, the weights of the epoch with the lowest one are kept.
        later: Number of trainings that follow, for the time left.
    """

    config: Config
    settings: ClassifierConfig
    view: str
    folder: Path
    seed: int
    device: torch.device
    select: Callable[[Classifier, int], float] | None = None
    validate: Callable[[Classifier, int], float] | None = None
    progress: bool = False
    later: int = 0


def train_on_clips(model: Classifier, loader: ClipLoader, training: Training) -> dict[str, Any]:
    """Trains `model` in place, continuing from `last.pt` in the folder if it exists.

    Returns:
        `epochs`, the number of epochs done, and `best_epoch`, the epoch of the final weights (the last epoch if there
        is neither `select` nor `validate`).
    Raises:
        ArithmeticError: The loss became NaN or infinite, in training or on the validation part.
        Interrupted: A signal asked to stop; `last.pt` holds the state of the last step.
    """
    settings = training.settings
    state = _State(model, training)
    main = distributed.is_main()
    if main and (training.folder / METRICS_FILE).exists():
        rewind(training.folder, step=0, epoch=state.epoch)
    with MetricsWriter(training.folder) if main else nullcontext() as writer, stop_requests() as stop:
        classes = model.head.linear.out_features
        forecast = Forecast((settings.epochs * (1 + training.later) - state.epoch) * len(loader))
        while state.epoch < settings.epochs:
            began = time.perf_counter()
            lr = set_epoch(state.optimizer, settings, state.epoch)
            loss, accuracy = _train_epoch(state, loader, stop, forecast)
            row = {"kind": "epoch", "epoch": state.epoch, "loss": loss, "loss_chance": math.log(classes)}
            row |= {"accuracy": accuracy, "lr": lr} | _judged(state)
            if writer is not None:
                writer.write(row | {"epoch_time_s": time.perf_counter() - began})
            state.epoch += 1
            state.save()
    if state.best is not None:
        model.load_state_dict(state.best["model"])
    return {"epochs": settings.epochs, "best_epoch": state.best["epoch"] if state.best else settings.epochs - 1}


def _judged(state: _State) -> dict[str, float]:
    """Measures the model after an epoch, keeps its weights if they are the best so far, and adapts the learning rate
    of a plateau. Returns `validation_loss` and `selection`, as far as they are measured."""
    training, row = state.training, {}
    if training.validate is not None:
        row["validation_loss"] = training.validate(state.model, state.epoch)
        if not math.isfinite(row["validation_loss"]):
            raise ArithmeticError(
                f"epoch {state.epoch + 1}: the loss on the validation part is NaN or infinite; lower the learning rates"
            )
        if state.plateau is not None:
            state.plateau.step(row["validation_loss"])
    if training.select is not None:
        row["selection"] = training.select(state.model, state.epoch)
    if row:
        value = row["selection"] if "selection" in row else -row["validation_loss"]
        if state.best is None or value > state.best["selection"]:
            weights = {name: value.clone() for name, value in state.model.state_dict().items()}
            state.best = {"selection": value, "epoch": state.epoch, "model": weights}
    return row


def _train_epoch(state: _State, loader: ClipLoader, stop: StopRequest, forecast: Forecast) -> tuple[float, float]:
    """Trains the remaining steps of an epoch; returns the mean loss and accuracy over all clips of the epoch."""
    training, epoch, device = state.training, state.epoch, state.training.device
    model = state.model.train()
    first, total, rng = state.take_partial()
    title = f"{training.view}, epoch {epoch + 1} of {training.settings.epochs}"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((training.seed << 20) + epoch)
        distributed.set_rng_states(device, rng)
        batches = loader.epoch(epoch, first)
        forecast.add(first)  # steps of an interrupted epoch
        later = training.later
        left = partial(forecast.text, f"left of {counted(later + 1, 'training')}" if later else "left of the training")
        bar = track(batches, title, total=len(loader) - first, unit="steps", progress=training.progress, left=left)
        for step, batch in enumerate(bar, first):
            labels = distributed.all_gather(batch.label.to(device))  # [R*B]
            with autocast(device, training.settings.precision), enough_values("--batch-size"):
                features = model.features(batch.clips[training.view][:, 0])  # [B, C]
                logits = model.head(distributed.all_gather_with_gradient(features))  # [R*B, L]
            loss = F.cross_entropy(logits.float(), labels)
            state.optimizer.zero_grad(set_to_none=True)
            state.scaler.scale(loss).backward()
            distributed.mean_(_gradients_and_statistics(model))
            state.scaler.step(state.optimizer)
            state.scaler.update()
            hits = (logits.detach().argmax(1) == labels).sum()
            total += torch.stack([loss.detach() * len(labels), hits, hits.new_tensor(len(labels))])
            forecast.add()
            if signum := distributed.largest(stop.signum):
                path = state.save({"steps": step + 1, "total": total, "rng": distributed.rng_states(device)})
                raise Interrupted(signum, f"after step {step + 1} of epoch {epoch + 1}; saved {path}")
    loss, hits, clips = total.tolist()
    if not loss / clips < float("inf"):
        raise ArithmeticError(f"epoch {epoch + 1}: the loss of the classifier is NaN or infinite; lower its rates")
    return loss / clips, hits / clips


def _gradients_and_statistics(model: Classifier) -> list[Tensor]:
    """Returns the tensors that the processes average after a step's backward.

    Each process computes the loss of the whole batch, and the gradient of its features is the sum over the losses of
    all processes, so the mean of the gradients is the gradient of the whole batch.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return gradients if model.frozen else gradients + running_statistics(model.encoder.backbone)


class _State:
    """Everything that a training changes, which `last.pt` stores.

    Attributes:
        epoch: The next epoch to train.
        plateau: With the schedule "plateau", what adapts the learning rates of the optimiser.
        best: With `select` or `validate`: {"selection", "epoch", "model"} of the best epoch so far; "selection" is the
            value of `select`, or else minus the validation loss.
    """

    def __init__(self, model: Classifier, training: Training) -> None:
        """Loads the state from the folder's `last.pt`, if it exists. Raises CheckpointError if it does not fit."""
        self.model, self.training = model, training
        settings, device = training.settings, training.device
        self.optimizer = make_optimizer(model.parameter_groups(settings), settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.plateau: ReduceLROnPlateau | None = None
        if settings.schedule == "plateau":
            self.plateau = ReduceLROnPlateau(
                self.optimizer, "min", factor=settings.gamma, patience=settings.patience, min_lr=settings.min_lr
            )
        self.epoch, self.best, self._partial = 0, None, None
        self.path = training.folder / LAST
        if not distributed.from_main(self.path.exists):
            return
        saved = load_checkpoint(self.path, device=device)
        try:
            model.encoder.load_state_dict(saved["encoders"][training.view])
            model.head.load_state_dict(saved["head"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.plateau is not None:
                self.plateau.load_state_dict(saved["plateau"])
            self.epoch, self.best = saved["epoch"], saved["best"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{str(self.path)!r} belongs to another classifier ({error}); expected no file, or its own"
            ) from None
        self._partial = saved.get("partial")

    def take_partial(self) -> tuple[int, Tensor, dict[str, Tensor] | None]:
        """Returns the state of an interrupted epoch: the number of steps done, the sums of loss, hits and clips
        (float64 [3], read once at the end), and the state of the generators. For a new epoch these are zeros and
        None."""
        partial, self._partial = self._partial, None
        if partial is None:
            return 0, torch.zeros(3, dtype=torch.float64, device=self.training.device), None
        return partial["steps"], partial["total"], partial["rng"]

    def save(self, partial: dict[str, Any] | None = None) -> Path:
        """Writes `last.pt` in the first process; `partial` is the state of an unfinished epoch."""
        if not distributed.is_main():
            return self.path
        payload = {
            "config": self.training.config.to_dict(),
            "encoders": {self.training.view: self.model.encoder.state_dict()},
            "head": self.model.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "partial": partial,
        }
        if self.plateau is not None:
            payload["plateau"] = self.plateau.state_dict()
        return save_checkpoint(self.path, payload)


def selection_accuracy(loader: Any, videos: int, view: str, device: torch.device) -> Callable[[Classifier, int], float]:
    """Returns the function for `Training.select` of the published code: the accuracy on one clip of every test video;
    the arguments are those of `mean_over_videos`."""
    return mean_over_videos(loader, videos, view, device, lambda logits, labels: logits.argmax(1) == labels)


def validation_loss(loader: Any, videos: int, view: str, device: torch.device) -> Callable[[Classifier, int], float]:
    """Returns the function for `Training.validate`: the mean cross-entropy on one clip of every video of the validation
    part; the arguments are those of `mean_over_videos`."""
    losses = lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")  # noqa: E731
    return mean_over_videos(loader, videos, view, device, losses)


def mean_over_videos(
    loader: Any, videos: int, view: str, device: torch.device, score: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Classifier, int], float]:
    """Returns a function (model, epoch) -> mean score of one clip of every video, in eval mode.

    Args:
        loader: The process's TrainLoader with `plan_selection` over the M videos. Its batches have equal size, so some
            videos may be left out of an epoch; each of these is measured alone.
        videos: M.
        score: Maps logits [N, L] float32 and labels [N] to scores [N].
    """

    def measure(model: Classifier, epoch: int) -> float:
        model.eval()
        seen, total = set(), 0.0

        def count(batch: Batch) -> None:
            nonlocal total
            logits = model(batch.clips[view][:, 0]).float()
            total += score(logits, batch.label.to(device)).double().sum().item()
            seen.update(batch.video.tolist())

        with torch.inference_mode():
            for batch in loader.epoch(epoch):
                count(batch)
            for video in distributed.share(sorted(set(range(videos)) - distributed.union(seen))):
                count(loader.sample(epoch, video))
        return sum(distributed.gather_objects(total)) / videos

    return measure
