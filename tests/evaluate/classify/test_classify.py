"""Compares probe and finetuning with scikit-learn, torchmetrics and float64; runs whole commands on encoded videos."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from cpr_fast.cli import main
from cpr_fast.config import ClassifierConfig, Config, ConfigError, ProbeConfig, override_classifier
from cpr_fast.data.index.index import Index, Video
from cpr_fast.evaluate.classify.classifier import (
    Classifier,
    ClassifierHead,
    backbone_layers,
    make_optimizer,
    set_epoch,
    video_probabilities,
)
from cpr_fast.evaluate.classify.classify import classify, load_split
from cpr_fast.evaluate.classify.finetune import Training, selection_accuracy, train_on_clips
from cpr_fast.evaluate.classify.probe import feature_probabilities, train_on_features
from cpr_fast.evaluate.classify.scores import classification_scores
from cpr_fast.evaluate.features.intervals import seed_interval
from cpr_fast.models import build_encoder
from cpr_fast.runtime.interrupt import Interrupted
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Config.from_dict({"data": {"frames": 8, "size": 32, "workers": 1}, "model": {"width": 0.0625}})


def test_scores_equal_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (83,), generator=generator)  # of the classes 0 to 6, class 6 never occurs
    probabilities = torch.rand(83, 7, generator=generator, dtype=torch.float64)
    names = [f"c{i}" for i in range(7)]
    got = classification_scores(probabilities, labels, torch.arange(83) // 2, names)
    assert got["accuracy"] == pytest.approx(multiclass_accuracy(probabilities, labels, 7, "micro").item())
    assert got["top5"] == pytest.approx(multiclass_accuracy(probabilities, labels, 7, "micro", top_k=5).item())
    assert got["confusion"] == multiclass_confusion_matrix(probabilities, labels, 7).tolist()
    per_class = multiclass_accuracy(probabilities, labels, 7, None)[:6].tolist()
    assert list(got["per_class"].values()) == pytest.approx([*per_class, None])
    assert got["mean_class_accuracy"] == pytest.approx(np.mean(per_class))
    assert got["accuracy_ci95"][0] < got["accuracy"] < got["accuracy_ci95"][1] and got["videos"] == 83
    json.dumps(got)
    few = classification_scores(torch.eye(3).double(), torch.arange(3), torch.arange(3), "abc")
    assert few["accuracy"] == 1 and few["top5"] is None
    assert few["accuracy_ci95"] == pytest.approx([0.025 ** (1 / 3), 1])


def test_seed_interval_is_students():
    low, high = seed_interval([0.4, 0.5, 0.6])
    half = 4.302652729911275 * 0.1 / np.sqrt(3)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half)) and seed_interval([0.4]) is None
    assert seed_interval([0.0, 0.0]) is None and seed_interval([0.1 + 0.2, 0.3]) is None  # equal but for rounding


def test_probe_reaches_scikit_learns_accuracy_and_repeats():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 24))
    labels = rng.integers(0, 5, 301)
    features = (centres[labels] + 1.1 * rng.normal(size=(301, 24))).astype(np.float32)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    settings = ProbeConfig(batch_size=64, epochs=60, milestones=(40, 50))
    head, best = train_on_features(x[:200], y[:200], 5, settings, seed=3)
    reference = LogisticRegression(max_iter=1000).fit(features[:200], labels[:200]).score(features[200:], labels[200:])
    ours = (feature_probabilities(head, x[200:]).argmax(1) == y[200:]).double().mean().item()
    assert ours > reference - 0.05 and best == 59
    again, _ = train_on_features(x[:200], y[:200], 5, settings, seed=3)
    assert torch.equal(head.linear.weight, again.linear.weight)
    chosen, best = train_on_features(x[:200], y[:200], 5, settings, seed=3, select_on=(x[200:], y[200:]))
    selected = (feature_probabilities(chosen, x[200:]).argmax(1) == y[200:]).double().mean().item()
    assert selected >= ours and 0 <= best < 60


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_head_is_l2_batch_norm_linear(normalize, batch_norm):
    settings = ClassifierConfig(dropout=0.5, normalize=normalize, batch_norm=batch_norm)
    head = ClassifierHead(6, 3, settings).train(False)
    x = torch.randn(4, 6)
    expected = x.double() / x.double().norm(dim=1, keepdim=True) if normalize else x.double()
    if batch_norm:
        head.norm.running_mean.uniform_()
        head.norm.running_var.uniform_(0.5, 2)
        expected = (expected - head.norm.running_mean) / (head.norm.running_var.double() + 1e-5).sqrt()
    expected = expected @ head.linear.weight.double().T
    torch.testing.assert_close(head(x).double(), expected, atol=1e-6, rtol=1e-5)


def test_the_probe_on_features_trains_as_the_published_one():
    """CoCLR's feature_linear_probe.py: BatchNorm and a linear layer on the features as they are, SGD, in batches of
    the whole set here, so that the order of the videos has no effect.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator) * torch.tensor([5.0, 0.1, 1, 1, 1, 2]) + 3
    y = torch.randint(0, 3, (40,), generator=generator)
    head, _ = train_on_features(x, y, 3, ProbeConfig(epochs=5, milestones=(2, 4)), seed=3)
    torch.manual_seed(3)
    norm, linear = nn.BatchNorm1d(6), nn.Linear(6, 3)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD([*norm.parameters(), *linear.parameters()], lr=1.0, momentum=0.9, weight_decay=1e-3)
    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = 1.0 * 0.1 ** ((epoch >= 2) + (epoch >= 4))
        optimizer.zero_grad()
        nn.functional.cross_entropy(linear(norm(x)), y).backward()
        optimizer.step()
    norm.eval()
    expected = linear(norm(x)).double().softmax(1)
    torch.testing.assert_close(feature_probabilities(head, x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("arch", "layers"), [("s3d", 12), ("r3d", 5), ("c3d", 8)])
def test_every_layer_of_a_backbone_has_its_rate(arch, layers):
    head = "mlp" if arch == "s3d" else "pooled"
    width = {"head": head, "feature_dim": 32 if head == "pooled" else 8, "width": 0.0625, "arch": arch}
    encoder = build_encoder(Config.from_dict({"model": width}).model)
    groups = backbone_layers(encoder.backbone)
    assert len(groups) == layers
    settings = ClassifierConfig(lr=1.0, backbone_lr=0.1, layer_decay=0.5, milestones=(2, 4))
    model = Classifier(encoder, 4, settings)
    optimizer = make_optimizer(model.parameter_groups(settings), settings)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in [*model.head.parameters(), *encoder.backbone.parameters()]}
    for epoch, factor in {0: 1, 1: 1, 2: 0.1, 4: 0.01}.items():
        assert set_epoch(optimizer, settings, epoch) == pytest.approx(factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([factor, *(factor * 0.1 * 0.5**d for d in range(layers))])
    last = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert last == {id(p) for p in list(encoder.backbone.children())[-1].parameters()} or arch == "c3d"


class ClipLoader:
    """Gives one noisy clip of each of 7 videos in batches of 2, depending on the epoch; the last video is left over."""

    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1])

    def __len__(self):
        return 3

    def _batch(self, epoch, videos):
        noise = torch.randn(7, 1, 3, 8, 32, 32, generator=torch.Generator().manual_seed(epoch))
        clips = noise + self.labels.view(7, 1, 1, 1, 1, 1)
        return SimpleNamespace(clips={"rgb": clips[videos]}, label=self.labels[videos], video=torch.tensor(videos))

    def epoch(self, epoch, start_step=0):
        for first in (0, 2, 4)[start_step:]:
            yield self._batch(epoch, [first, first + 1])

    def sample(self, epoch, video):
        return self._batch(epoch, [video])


class StoppedLoader(ClipLoader):
    """Requests the process to stop while a step of an epoch is computed."""

    def __init__(self, epoch, step, number):
        self.at, self.number = (epoch, step), number

    def epoch(self, epoch, start_step=0):
        for step, batch in enumerate(super().epoch(epoch, start_step), start_step):
            if (epoch, step) == self.at:
                os.kill(os.getpid(), self.number)
            yield batch


def trained(folder, epochs, settings, select=None, loader=None):
    torch.manual_seed(0)
    model = Classifier(build_encoder(TINY.model), 2, settings)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    training = Training(TINY, override_classifier("finetune", settings, epochs=epochs), "rgb", folder, 1,
                        torch.device("cpu"), select)  # fmt: skip
    return model, before, train_on_clips(model, loader or ClipLoader(), training)


def test_a_stopped_training_ends_as_an_uninterrupted_one_bitwise(tmp_path):
    settings = ClassifierConfig(dropout=0.5, milestones=(50,), epochs=100)
    straight, _, _ = trained(tmp_path / "straight", 3, settings)
    trained(tmp_path / "stopped", 1, settings)
    resumed, _, done = trained(tmp_path / "stopped", 3, settings)
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [row["epoch"] for row in read_metrics(tmp_path / "stopped")] == [0, 1, 2] and done["best_epoch"] == 2
    assert set(load_encoders(tmp_path / "straight" / "last.pt")[1]) == {"rgb"}


def test_a_signal_saves_the_step_and_the_training_ends_as_an_uninterrupted_one_bitwise(tmp_path):
    """The request comes in the middle of an epoch, in its last step or in the first step of all, also with
    selection.
    """
    settings = ClassifierConfig(dropout=0.5, milestones=(1,), epochs=100)
    select = selection_accuracy(ClipLoader(), 7, "rgb", torch.device("cpu"))
    straight, _, done = trained(tmp_path / "straight", 3, settings, select)
    before = signal.getsignal(signal.SIGTERM)
    for epoch, step, number in ((0, 0, signal.SIGUSR1), (1, 1, signal.SIGTERM), (2, 2, signal.SIGTERM)):
        with pytest.raises(Interrupted, match=f"{number.name} after step {step + 1} of epoch {epoch + 1}; "):
            trained(tmp_path / "stopped", 3, settings, select, StoppedLoader(epoch, step, number))
        assert signal.getsignal(signal.SIGTERM) is before
    resumed, _, again = trained(tmp_path / "stopped", 3, settings, select)
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    curves = [
        [{key: value for key, value in row.items() if key != "epoch_time_s"} for row in read_metrics(tmp_path / name)]
        for name in ("straight", "stopped")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 3 and done == again
    last = [load_checkpoint(tmp_path / name / "last.pt") for name in ("straight", "stopped")]
    assert last[0].keys() == last[1].keys() and last[1]["partial"] is None


def test_a_frozen_backbone_does_not_change_and_selection_sees_every_video(tmp_path):
    select = selection_accuracy(ClipLoader(), 7, "rgb", torch.device("cpu"))
    model, before, done = trained(tmp_path, 3, ProbeConfig(inputs="clips", lr=0.1, batch_size=2), select)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    rates = [row["selection"] for row in read_metrics(tmp_path)]
    assert done["best_epoch"] == int(np.argmax(rates)) and all(round(7 * rate, 6) % 1 == 0 for rate in rates)
    assert select(model, done["best_epoch"]) == max(rates)


def test_probabilities_average_windows_and_crops():
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))  # video 0: 2 windows, 1: 0, 2: 1, of 10
    video, crop = torch.tensor([0] * 20 + [2] * 10), torch.arange(10).repeat(3)
    batches = [SimpleNamespace(clips={"rgb": logits[i : i + 10]}, video=video[i : i + 10], crop=crop[i : i + 10])
               for i in (0, 10, 20)]  # fmt: skip
    means, windows = video_probabilities(nn.Identity(), batches, 3, "rgb", crops=10)
    soft = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    for n in (1, 5, 10):
        for v in (0, 2):
            rows = (video == v) & (crop < n)
            torch.testing.assert_close(means[n][v], soft[rows].mean(0), atol=1e-6, rtol=1e-6)
        assert not means[n][1].any()
    assert windows.tolist() == [2, 0, 1]


def test_overrides_move_milestones_and_are_checked():
    changed = override_classifier("finetune", ClassifierConfig(), epochs=100, lr=None)
    assert changed.epochs == 100 and changed.milestones == (80, 90) and changed.lr == 1e-3
    with pytest.raises(ConfigError, match=r"finetune\.dropout: expected a fraction"):
        override_classifier("finetune", ClassifierConfig(), dropout=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a random two-view checkpoint, and an index of encoded videos without flow files."""
    pytest.importorskip("nvidia.dali")
    from cpr_fast.data.synthetic.videos import write_synthetic

    folder = tmp_path_factory.mktemp("classify")
    index = write_synthetic(folder / "data", classes=4, videos=2, frames=12, width=64, height=48)
    encoder = build_encoder(TINY.model)
    payload = {"config": TINY.to_dict(), "encoders": {"rgb": encoder.state_dict()}}
    save_checkpoint(folder / "run" / "checkpoints" / "last.pt", payload)
    (folder / "run" / "metrics.jsonl").write_text("")
    return folder / "run", index


@pytest.mark.parametrize("recipe", ["paper", "coclr"])
def test_commands_evaluate_a_run_and_do_nothing_twice(run, recipe, capsys):
    folder, index = run
    checkpoint = folder / "checkpoints" / "last.pt"
    common = [str(checkpoint), "--index", str(index), "--recipe", recipe, "--json"]
    for task, extra in {"probe": ["--seeds", "0", "1", "--crops", "5"],
                        "finetune": ["--epochs", "1", "--clips", "2", "--batch-size", "4"]}.items():  # fmt: skip
        assert main([task, *common, *extra]) == 0
        result = json.loads(capsys.readouterr().out)
        assert json.loads(Path(result.pop("file")).read_text()) == result
        assert result["view"] == "rgb" and 0 <= result["accuracy"] <= 1
        assert (result["leakage"] is None) == (recipe == "paper")
        videos = len(Index.load(index).select("test"))
        row = result["results"][0]
        assert row["videos"] == videos and np.sum(row["confusion"]) == videos and row["unread"] == 0
        assert set(row["accuracy_by_crops"]) == ({"5"} if task == "probe" else {"1", "5", "10"})
        differ = len({row["accuracy"] for row in result["results"]}) > 1  # equal seeds have no interval over seeds
        assert result["summary"][0]["interval_over"] == ("seeds" if differ else "sources")
        made = {p: p.stat().st_mtime_ns for p in folder.rglob("predictions.safetensors")}
        assert main([task, *common, *extra]) == 0
        assert json.loads(capsys.readouterr().out)["results"] == result["results"]
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("predictions.safetensors")} == made
    rows = [row for row in read_metrics(folder) if row["kind"] == "classification" and row["recipe"] == recipe]
    assert {(row["task"], row["seed"]) for row in rows} == {("probe", 0), ("probe", 1), ("finetune", 0)}


def test_bad_input_is_named(run, tmp_path, capsys):
    folder, index = run
    checkpoint = folder / "checkpoints" / "last.pt"
    unlabelled = Index(Index.load(index).select("train"))
    unlabelled.save(tmp_path / "index.csv")
    for arguments, message in {
        ("probe", str(checkpoint), "--index", str(tmp_path / "index.csv")): "split 'test'",
        ("probe", str(checkpoint), "--index", str(index), "--clips", "0"): "--clips: expected 1 or more, got 0",
        ("finetune", str(checkpoint), "--index", str(index), "--epochs", "0"): "--epochs: expected 1 or more, got 0",
        ("finetune", "nowhere.pt", "--index", str(index)): "nowhere.pt",
    }.items():
        assert main(list(arguments)) == 2
        assert message in capsys.readouterr().err


def test_a_stopped_test_reads_only_the_other_videos_again(run, tmp_path, monkeypatch):
    from cpr_fast.evaluate.classify import classify as module

    folder, index = run
    opened, limit = [], [99]

    class Windows(module.WindowLoader):
        def __init__(self, part, data, views, recipe, device):
            opened.append([video.path.name for video in part])
            super().__init__(part, data, views, clips_per_video=recipe.clips_per_video, crops=recipe.crops)

        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == limit[0]:
                    raise KeyboardInterrupt
                yield batch

    monkeypatch.setattr(module, "open_windows", Windows)
    settings = ClassifierConfig(epochs=1, batch_size=4)

    def tested(out):
        opened.clear()
        return classify(folder / "checkpoints" / "last.pt", [index], task="finetune", settings=settings, crops=5,
                        out=tmp_path / out)["results"]  # fmt: skip

    expected, names = tested("straight"), opened[0]
    limit[0] = 3
    with pytest.raises(KeyboardInterrupt):
        tested("stopped")
    (kept,) = (tmp_path / "stopped").rglob("tested-*.safetensors")
    limit[0] = 99
    found = tested("stopped")
    assert 0 < len(opened[0]) < len(names) and names[-len(opened[0]) :] == opened[0]
    assert found == expected and not kept.exists()


def test_two_stream_is_the_mean_of_probabilities(run, monkeypatch):
    from cpr_fast.evaluate.classify import classify as module

    folder, index = run
    payload = {"config": TINY.to_dict(),
               "encoders": {view: build_encoder(TINY.model).state_dict() for view in ("rgb", "flow")}}  # fmt: skip
    checkpoint = save_checkpoint(folder / "two.pt", payload)
    labels = torch.from_numpy(Index.load(index).select("test").labels)
    fixed = {"rgb": [0.6, 0.4, 0.0, 0.0], "flow": [0.0, 0.35, 0.65, 0.0]}

    def predict(job, view, *_):
        table = torch.tensor([fixed[view]], dtype=torch.float64).repeat(len(labels), 1)
        return module.Predictions({1: table}, torch.ones(len(labels), dtype=torch.int64), 0)

    monkeypatch.setattr(module, "predictions", predict)
    result = classify(checkpoint, [index, index], task="probe", crops=1)
    assert [row["view"] for row in result["results"]] == ["rgb", "flow", "two_stream"] * 2
    expected = {
        view: (labels == c).double().mean().item() for view, c in {"rgb": 0, "flow": 2, "two_stream": 1}.items()
    }
    assert {row["view"]: row["accuracy"] for row in result["summary"]} == pytest.approx(expected)
    assert result["view"] == "two_stream" and result["summary"][-1]["splits"] == 2

    accuracies = iter([0.5, 0.75, 0.25, 0.5])  # seeds 0 and 1 of the first split, then of the second
    monkeypatch.setattr(
        module, "_score", lambda *_: [{"view": "rgb", "accuracy": next(accuracies), "accuracy_ci95": None}]
    )
    summary = classify(checkpoint, [index, index], task="probe", seeds=(0, 1))["summary"][0]
    assert summary["accuracy"] == 0.5 and summary["accuracy_std"] == pytest.approx(0.25 / 2**0.5)


def test_test_videos_with_an_exact_copy_among_the_training_videos_are_counted(tmp_path, caplog):
    contents = {"a": "train", "b": "train", "c": "train", "d": "test", "e": "test", "f": "test"}
    for name, content in zip(contents, "120221", strict=True):
        (tmp_path / f"{name}.mp4").write_text(content)
    Index([Video(tmp_path / f"{name}.mp4", "ab"[i % 2], name, split, 40, 25.0, 64, 48)
           for i, (name, split) in enumerate(contents.items())]).save(tmp_path / "index.csv")  # fmt: skip
    load_split(tmp_path / "index.csv", Config().data)
    assert "3 of 3 test videos have an exact copy among the training videos" in caplog.text
    caplog.clear()
    for name in "de":
        (tmp_path / f"{name}.mp4").write_text(name)
    load_split(tmp_path / "index.csv", Config().data)
    assert "1 of 3 test videos have an exact copy" in caplog.text
