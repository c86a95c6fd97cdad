"""IIC's finetuning: the part of the training videos held out, the plateau of its loss, and frame differences."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small_steps import ALONE
from support.stand_in_loader import RandomLoader, make_index

from cpr_fast.config import ClassifierConfig, Config, ConfigError, load, override_classifier
from cpr_fast.config.pixels import normalisation
from cpr_fast.data.clips.graph import residual
from cpr_fast.data.clips.sampling import plan_labelled
from cpr_fast.evaluate.classify import classify as module
from cpr_fast.evaluate.classify.classifier import Classifier
from cpr_fast.evaluate.classify.finetune import Training, train_on_clips, validation_loss
from cpr_fast.evaluate.features.recipe import make_recipe
from cpr_fast.models import build_encoder
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.runtime.progress import Forecast
from cpr_fast.weights.checkpoint import CheckpointError, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Config.from_dict({"data": {"frames": 8, "size": 16, "batch_size": 4}, "model": {"arch": "r3d", "width": 0.125}})
INDEX = make_index(9)  # batches of 4: one video is left over
PLATEAU = ClassifierConfig(
    epochs=9, schedule="plateau", patience=1, gamma=0.5, min_lr=3e-4, validation=0.3, lr=1e-3, backbone_lr=2e-3,
    optimizer="sgd", dropout=0.5,
)  # fmt: skip


class Loader(RandomLoader):
    def sample(self, epoch, video):
        clip = self._clip(epoch, video, "rgb")[None, :1]
        return SimpleNamespace(
            clips={"rgb": clip}, label=torch.from_numpy(self.index.labels)[[video]], video=torch.tensor([video])
        )


def train(folder: Path, settings: ClassifierConfig, validate, select=None):
    torch.manual_seed(0)
    model = Classifier(build_encoder(TINY.model), len(INDEX.classes), settings)
    training = Training(TINY, settings, "rgb", folder, 1, torch.device("cpu"), select, validate)
    done = train_on_clips(model, Loader(INDEX, TINY.data, ["rgb"], seed=1, plan=plan_labelled), training)
    return model, done, [row for row in read_metrics(folder) if row["kind"] == "epoch"]


def reduce_on_plateau(losses: list[float], lr: float, settings: ClassifierConfig) -> list[float]:
    """Returns the learning rate of every epoch by the rule in torch's documentation, with its threshold of 1e-4."""
    rates, best, bad = [lr], math.inf, 0
    for loss in losses[:-1]:
        best, bad = (loss, 0) if loss < best * (1 - 1e-4) else (best, bad + 1)
        if bad > settings.patience:
            lr, bad = max(lr * settings.gamma, settings.min_lr), 0
        rates.append(lr)
    return rates


LOSSES = [3.0, 2.0, 2.5, 1.9999, 1.0, 1.0, 1.1, 0.5, 0.6]  # a fall of less than 1e-4 of the best is none


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_the_rates_are_those_of_a_plateau(tmp_path, patience):
    settings = override_classifier("finetune", PLATEAU, patience=patience)
    _, done, rows = train(tmp_path, settings, lambda model, epoch: LOSSES[epoch])
    assert [row["validation_loss"] for row in rows] == LOSSES
    assert [row["lr"] for row in rows] == pytest.approx(reduce_on_plateau(LOSSES, 1e-3, settings))
    groups = load_checkpoint(tmp_path / "last.pt")["optimizer"]["param_groups"]
    after = [reduce_on_plateau([*LOSSES, 0.0], lr, settings)[-1] for lr in (1e-3, 2e-3)]
    assert [groups[0]["lr"], groups[-1]["lr"]] == pytest.approx(after)  # of the head and of the backbone
    assert done == {"epochs": 9, "best_epoch": 7}


@pytest.mark.parametrize("first", [1, 3, 4, 8])
def test_a_stopped_training_goes_on_with_the_plateau_where_it_was(tmp_path, first):
    """The loss on the held-out videos is a real one, and so are the weights of the best epoch."""
    held = Loader(make_index(7), TINY.data, ["rgb"], seed=2)
    loss = validation_loss(held, 7, "rgb", torch.device("cpu"))
    measured: list[float] = []
    best = {}

    def validate(model, epoch):
        measured.append(loss(model, epoch))
        if measured[-1] == min(measured):
            best.update(copy.deepcopy(model.state_dict()))
        return measured[-1]

    straight, done, rows = train(tmp_path / "straight", PLATEAU, validate)
    assert [row["validation_loss"] for row in rows] == measured and done["best_epoch"] == int(np.argmin(measured))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, best[name]), name

    class Stop(Exception):
        pass

    def stopping(model, epoch):
        if epoch == first:
            raise Stop
        return loss(model, epoch)

    with pytest.raises(Stop):
        train(tmp_path / "stopped", PLATEAU, stopping)
    resumed, again, _ = train(tmp_path / "stopped", PLATEAU, loss)
    curves = [[{k: v for k, v in row.items() if k != "epoch_time_s"} for row in read_metrics(tmp_path / name)]
              for name in ("straight", "stopped")]  # fmt: skip
    assert curves[0] == curves[1] and again == done
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_validation_loss_is_the_mean_over_all_videos():
    """Batches of 4 leave one of the 9 videos out of the epoch, which is measured alone."""
    held = Loader(INDEX, TINY.data, ["rgb"], seed=2)
    model = Classifier(build_encoder(TINY.model), 4, ClassifierConfig()).eval()
    with torch.no_grad():
        logits = torch.cat([model(held.sample(5, video).clips["rgb"][:, 0]) for video in range(9)]).double()
    labels = torch.from_numpy(INDEX.labels)
    expected = (logits.exp().sum(1).log() - logits[torch.arange(9), labels]).mean().item()
    measured = validation_loss(held, 9, "rgb", torch.device("cpu"))(model.train(), 5)
    assert measured == pytest.approx(expected, rel=1e-5)


def test_selection_on_the_test_split_goes_before_the_validation_part(tmp_path):
    """With the recipe "coclr" the plateau still watches the validation part only."""
    accuracies = [0.1, 0.9, *[0.5] * 7]
    _, done, rows = train(tmp_path, PLATEAU, lambda _, epoch: LOSSES[epoch], lambda _, epoch: accuracies[epoch])
    assert done["best_epoch"] == 1 and [row["selection"] for row in rows] == accuracies
    assert [row["lr"] for row in rows] == pytest.approx(reduce_on_plateau(LOSSES, 1e-3, PLATEAU))


def test_a_loss_that_is_not_a_number_and_a_foreign_checkpoint_are_named(tmp_path):
    with pytest.raises(ArithmeticError, match="epoch 1: the loss on the validation part is NaN or infinite"):
        train(tmp_path / "nan", PLATEAU, lambda *_: math.nan)
    steps = override_classifier("finetune", PLATEAU, schedule="steps", epochs=1)
    train(tmp_path / "steps", steps, lambda *_: 1.0)
    with pytest.raises(CheckpointError, match="belongs to another classifier"):
        train(tmp_path / "steps", PLATEAU, lambda *_: 1.0)


@pytest.mark.parametrize(("videos", "fraction", "count"), [(9537, 0.0839, 800), (3570, 0.112, 400), (9, 0.3, 3)])
def test_videos_are_held_out_at_random_and_stay_in_order(videos, fraction, count):
    index = make_index(videos)
    train, held = module.hold_out(index, fraction, 3)
    assert (len(train), len(held)) == (videos - count, count)
    assert sorted([*train, *held], key=lambda video: int(video.path.stem[1:])) == list(index)
    for part in (train, held):
        numbers = [int(video.path.stem[1:]) for video in part]
        assert numbers == sorted(numbers) and part.classes == index.classes
    assert list(module.hold_out(index, fraction, 3)[1]) == list(held)
    assert list(module.hold_out(index, fraction, 4)[1]) != list(held)


def test_nothing_is_held_out_by_default_and_no_part_is_empty():
    train, held = module.hold_out(INDEX, 0.0, 0)
    assert list(train) == list(INDEX) and len(held) == 0
    for fraction, count in ((0.01, 1), (0.99, 8)):
        train, held = module.hold_out(INDEX, fraction, 0)
        assert (len(train), len(held)) == (9 - count, count)
    assert [len(part) for part in module.hold_out(make_index(2), 0.5, 0)] == [1, 1]


@pytest.mark.parametrize("augment", ["iic", "coclr"])
def test_the_backbone_gets_differences_of_frames(augment):
    """IIC finetunes on x - roll(x, 1) over time, for x in 0..1, while it pretrains on half of this plus a half."""
    data = Config.from_dict({"data": {"augment": augment}}).data
    mean, std = (torch.tensor(value).view(3, 1, 1, 1) for value in normalisation(augment))
    x = torch.rand(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    given = residual((x - mean) / std, data)
    model = Classifier(build_encoder(TINY.model), 3, ClassifierConfig(), rescaled=normalisation(augment)).eval()
    seen = []
    model.encoder.features = lambda clips: seen.append(clips) or torch.zeros(len(clips), 64)
    model.features(given)
    torch.testing.assert_close(seen[0], x - x.roll(1, 2), atol=2e-6, rtol=0)
    assert (seen[0] < 0).any()


@pytest.mark.parametrize(
    ("settings", "view", "rescaled"),
    [
        ({}, "residual", False),
        ({"residual": "difference"}, "residual", True),
        ({"residual": "difference"}, "rgb", False),
    ],
)
def test_only_residual_clips_become_differences_and_only_the_training_split_is_watched(
    tmp_path, monkeypatch, settings, view, rescaled
):
    """Which videos each loader of a finetuning reads, and what its classifier is told."""
    read, models = Counter(), []

    class Recorded(Loader):
        def epoch(self, epoch, start_step=0):
            for batch in super().epoch(epoch, start_step):
                read.update(self.index[int(video)].path for video in batch.video)
                yield batch

        def sample(self, epoch, video):
            read.update([self.index[video].path])
            batch = super().sample(epoch, video)
            return SimpleNamespace(clips={view: batch.clips["rgb"]}, label=batch.label, video=batch.video)

    def loader(part, data, views, *, seed, device, rank, world_size, plan):
        return Recorded(part, data, views, seed=seed, plan=plan)

    monkeypatch.setattr(module, "TrainLoader", loader)
    real = module.Classifier
    monkeypatch.setattr(module, "Classifier", lambda *a, **k: models.append(k["rescaled"]) or real(*a, **k))
    monkeypatch.setattr(
        module, "tested_videos", lambda count, measure, path: ({1: torch.zeros(count, 4)}, torch.ones(count))
    )
    test = module.Index([module.dataclasses.replace(v, path=Path(f"/test{i}")) for i, v in enumerate(make_index(5))])
    finetune = override_classifier("finetune", PLATEAU, epochs=2, **settings)
    recipe, split = make_recipe("iic"), module.Split(INDEX, test)
    job = module.Job("finetune", {view: TINY}, finetune, recipe, split, 0, tmp_path, ALONE, False, 0, Forecast(0))
    module._train_on_clips(job, view, build_encoder(TINY.model), tmp_path)
    train, held = module.hold_out(INDEX, 0.3, 0)
    assert models == [normalisation("coclr") if rescaled else None]
    assert not any(path.name.startswith("test") for path in read)
    assert all(read[video.path] == 2 for video in held)  # once per epoch
    assert all(read[video.path] == 2 for video in train)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0.0}, r"finetune.validation: expected a positive fraction with schedule = 'plateau'.* got 0.0"),
        ({"validation": 1.0}, r"finetune.validation: expected a fraction in \[0, 1\), got 1.0"),
        ({"patience": -1}, r"finetune.patience: expected 0 or more, got -1"),
        ({"min_lr": -1e-5}, r"finetune.min_lr: expected 0 or more, got -1e-05"),
        ({"gamma": 1.0}, r"finetune.gamma: expected less than 1 with schedule = 'plateau', got 1.0"),
        ({"schedule": "cosine"}, r"finetune.schedule: expected one of 'steps', 'plateau', got 'cosine'"),
        ({"residual": "none"}, r"finetune.residual: expected one of 'rescaled', 'difference', got 'none'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    values = {"schedule": "plateau", "validation": 0.1} | changes
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"finetune": values})


def test_the_probe_on_features_holds_nothing_out():
    with pytest.raises(ConfigError, match=r"probe.validation: expected 0 with inputs = 'features'.* got 0.1"):
        Config.from_dict({"probe": {"validation": 0.1}})
    assert Config.from_dict({"probe": {"validation": 0.1, "inputs": "clips"}}).probe.validation == 0.1


def test_the_patience_is_scaled_with_the_epochs():
    settings = ClassifierConfig(schedule="plateau", validation=0.1, epochs=150, patience=50)
    assert [override_classifier("finetune", settings, epochs=n).patience for n in (150, 30, 1)] == [50, 10, 0]
    assert override_classifier("finetune", ClassifierConfig(), epochs=100).patience == 50


@pytest.mark.parametrize("name", ["table5_iic", "table5_iic_cpr", "table3_progressive", "table3_top5"])
def test_the_recipes_finetune_as_iics_code(name):
    """BestJuly/IIC, ft_classify.py: its defaults, its optimiser and its schedule."""
    settings = load(Path(__file__).parents[3] / "configs" / f"{name}.toml").finetune
    assert (settings.optimizer, settings.lr, settings.backbone_lr, settings.momentum) == ("sgd", 1e-3, 1e-3, 0.9)
    assert (settings.weight_decay, settings.dropout, settings.epochs, settings.batch_size) == (5e-4, 0.0, 150, 16)
    assert (settings.schedule, settings.gamma, settings.patience, settings.min_lr) == ("plateau", 0.1, 50, 1e-5)
    assert settings.residual == "difference" and round(settings.validation * 9537) == 800
    assert not settings.normalize and not settings.batch_norm
