"""What is measured while a run trains: R@1 as `retrieve` gives it or, without labels, the score. It selects the best
checkpoint and does not change the run.
"""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from support.processes.two_processes import VIDEOS, torchrun
from support.small_runs import ALONE, Killed, assert_same, killed_at, rows, run, settings
from support.stand_in_loader import NoisyLoader, RandomLoader, make_index

from cpr_fast.config import Config, ConfigError
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.retrieve import retrieve
from cpr_fast.mining.unlabelled import unlabelled_score
from cpr_fast.models import build_encoder
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.run.online import OnlineRetrieval, OnlineScore, open_online
from cpr_fast.runtime import distributed
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("set"), classes=4, videos=8, frames=12, width=64, height=48)


def config(index, out, **health) -> Config:
    return Config.from_dict(
        {
            "data": {"index": str(index), "frames": 8, "size": 32, "batch_size": 6},
            "model": {"arch": "r3d", "width": 0.0625, "feature_dim": 8},
            "memory": {"size": 6},
            "optim": {"lr": 0.01},
            "schedule": {"cycles": [{"view": "rgb", "epochs": 4, "mining": "none"}]},
            "health": {"online_split": "test"} | health,
            "run": {"out": str(out), "keep_checkpoints": 9},
        }
    )


@pytest.fixture(scope="module")
def watched(index, tmp_path_factory, one_thread):
    return pretrain(config(index, tmp_path_factory.mktemp("run") / "a", online_every=1), progress=False)


def test_rates_are_those_of_retrieve(index, watched, tmp_path):
    online = rows(watched, "online")
    assert [row["epoch"] for row in online] == [0, 1, 2, 3] and all(row["view"] == "rgb" for row in online)
    held_out = tmp_path / "test.csv"
    Index.load(index).select(split="test").save(held_out)
    found = retrieve(
        watched / "checkpoints" / "last.pt", held_out, protocol="leave_source_out", clips_per_video=2, cache=False
    )
    trained = next(row for row in found["results"] if row["name"] == "trained")
    for name in ("r@1", "r@5", "map", "queries", "chance_r@1", "chance_map"):
        assert online[-1][name] == pytest.approx(trained[name], abs=1e-6), name


def test_best_is_the_first_of_the_highest(watched):
    online = rows(watched, "online")
    rates = [row["r@1"] for row in online]
    first = rates.index(max(rates))
    assert [row["best"] for row in online] == [rate > max(rates[:i], default=-1) for i, rate in enumerate(rates)]
    best = load_checkpoint(watched / "checkpoints" / "best.pt")
    assert best["epoch"] == first + 1
    assert best["cycle_state"]["best"] == {"epoch": first, "r@1": rates[first]}


def test_it_changes_no_training(index, watched, tmp_path):
    bare = pretrain(config(index, tmp_path / "bare"), progress=False)
    assert not (bare / "checkpoints" / "best.pt").exists() and rows(bare, "online") == []
    assert rows(bare, "step") == rows(watched, "step")
    weights = [load_checkpoint(run / "checkpoints" / "last.pt")["encoders"] for run in (bare, watched)]
    assert_same(*weights)


def test_a_resumed_run_knows_the_best_so_far(index, watched, tmp_path):
    settings = config(index, tmp_path / "b", online_every=1)
    again = pretrain(settings, progress=False)
    checkpoints = again / "checkpoints"
    early = sorted(checkpoints.glob("step-*.pt"))[1]
    for name in ("last.pt", "best.pt"):
        (checkpoints / name).unlink()
        os.link(early, checkpoints / name)
    pretrain(settings, resume=True, progress=False)
    assert rows(again, "online") == rows(watched, "online")
    states = [load_checkpoint(run / "checkpoints" / "last.pt")["cycle_state"] for run in (again, watched)]
    assert_same(*states)


def test_held_out_videos_that_cannot_be_judged(index, tmp_path):
    for health, message in [
        ({"online_split": "val"}, "split 'val'"),
        ({"online_videos": 1}, "two sources"),
    ]:
        with pytest.raises(InputError, match=message):
            pretrain(config(index, tmp_path / json.dumps(health), online_every=1, **health), progress=False)


def test_held_out_videos_with_an_exact_copy_are_told_at_the_start(index, tmp_path):
    held_out = Index.load(index).select(split="test")
    copy = shutil.copyfile(held_out[0].path, tmp_path / "copy.mp4")
    both = Index([*held_out, dataclasses.replace(held_out[0], path=copy, source="another")], held_out.classes)
    for videos, said in ((held_out, ""), (both, ". 2 queries have an exact copy in the gallery, found whatever")):
        measured = OnlineRetrieval(config(index, tmp_path), videos, ["rgb"], distributed.init("cpu"), watch=None)
        assert said in measured.work_ahead() and ("copy" in measured.work_ahead()) == bool(said)


@pytest.fixture(scope="module")
def unlabelled(index, tmp_path_factory):
    """The same videos without labels, in one split."""
    videos = [dataclasses.replace(video, label="", split="") for video in Index.load(index)]
    path = tmp_path_factory.mktemp("unlabelled") / "index.csv"
    Index(videos).save(path)
    return path


@pytest.fixture(scope="module")
def scored(unlabelled, tmp_path_factory, one_thread):
    return pretrain(config(unlabelled, tmp_path_factory.mktemp("run") / "a", online_every=1), progress=False)


def test_without_labels_best_is_the_first_of_the_highest_scores(scored):
    online = rows(scored, "online")
    scores = [row["score"] for row in online]
    first = scores.index(max(scores))
    assert len(online) == 4 and all("r@1" not in row for row in online) and len(set(scores)) > 1
    assert [row["best"] for row in online] == [score > max(scores[:i], default=-9) for i, score in enumerate(scores)]
    best = load_checkpoint(scored / "checkpoints" / "best.pt")
    assert best["epoch"] == first + 1
    assert best["cycle_state"]["best"] == {"epoch": first, "score": scores[first]}


def test_the_score_is_of_the_saved_encoder_on_two_clips_of_the_same_videos(unlabelled, scored):
    videos = Index.load(unlabelled)
    count = len(videos) // 6 * 6
    part = videos.chosen(len(videos) * i // count for i in range(count))
    for number, checkpoint in enumerate(sorted((scored / "checkpoints").glob("step-*.pt"))):
        settings, encoders = load_encoders(checkpoint)
        features = torch.zeros(count, 2, encoders["rgb"].width)
        loader = TrainLoader(part, settings.data, ["rgb"], seed=0)
        for batch in loader.epoch(0):
            with torch.no_grad():
                pairs = [encoders["rgb"].features(batch.clips["rgb"][:, clip]) for clip in (0, 1)]
            features[batch.video] = torch.stack(pairs, 1)
        loader.close()
        row = rows(scored, "online")[number]
        expected = unlabelled_score(features, torch.from_numpy(part.source_ids))
        assert row["videos"] == count
        assert {name: row[name] for name in expected} == {
            name: value if value is None else pytest.approx(value, rel=1e-4) for name, value in expected.items()
        }


def test_the_score_changes_no_training_and_is_resumed(unlabelled, scored, tmp_path):
    bare = pretrain(config(unlabelled, tmp_path / "bare"), progress=False)
    assert not (bare / "checkpoints" / "best.pt").exists() and rows(bare, "online") == []
    assert rows(bare, "step") == rows(scored, "step")
    assert_same(*(load_checkpoint(run / "checkpoints" / "last.pt")["encoders"] for run in (bare, scored)))
    settings = config(unlabelled, tmp_path / "again", online_every=1)
    checkpoints = pretrain(settings, progress=False) / "checkpoints"
    early = sorted(checkpoints.glob("step-*.pt"))[1]
    for name in ("last.pt", "best.pt"):
        (checkpoints / name).unlink()
        os.link(early, checkpoints / name)
    pretrain(settings, resume=True, progress=False)
    assert rows(tmp_path / "again", "online") == rows(scored, "online")
    for name in ("last.pt", "best.pt"):
        states = [load_checkpoint(run / "checkpoints" / name) for run in (tmp_path / "again", scored)]
        assert_same(*({key: state[key] for key in ("encoders", "cycle_state", "step")} for state in states))


def test_labels_can_be_left_unused(tmp_path):
    health = {"online_every": 2, "online_measure": "score", "online_videos": 7}
    kept = run(settings(tmp_path / "score", health=health), NoisyLoader)
    online = rows(kept, "online")
    assert [(row["epoch"], row["view"], row["videos"]) for row in online] == [(1, "rgb", 6), (3, "flow", 6)]
    assert [row["best"] for row in online] == [True, True]  # the best of its cycle
    bare = run(settings(tmp_path / "bare"), NoisyLoader)  # its clips draw from torch's generator
    assert rows(bare, "step") == rows(kept, "step")
    with pytest.raises(ConfigError, match=r"health.online_measure: expected .*'score'.*got 'labels'"):
        settings(tmp_path, health={"online_measure": "labels"})


@pytest.mark.parametrize(
    ("known", "measure", "by"), [(8, "auto", "r@1"), (0, "auto", "score"), (8, "score", "score"), (8, "r@1", "r@1")]
)
def test_what_is_measured_follows_from_the_labels(index, tmp_path, known, measure, by):
    """Some labels suffice for R@1 among the held-out videos."""
    videos = Index.load(index).select(split="train")
    videos = Index([dataclasses.replace(v, label=v.label if i < known else "") for i, v in enumerate(videos)])
    settings_ = config(index, tmp_path, online_every=1, online_measure=measure)
    online = open_online(settings_, videos, None, distributed.init("cpu"), None, RandomLoader, None)
    assert online.by == by


def test_another_measure_after_resuming_begins_anew(tmp_path):
    config = settings(tmp_path / "run", health={"online_every": 1, "online_measure": "score"})
    with pytest.raises(Killed):
        run(config, killed_at(1, 0))
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    saved = load_checkpoint(last)
    saved["cycle_state"]["best"] = {"epoch": 0, "r@1": 0.9}
    save_checkpoint(last, saved)
    run(config, resume=True)
    assert rows(tmp_path / "run", "online")[1]["best"]


def test_a_shared_encoder_is_scored_in_the_view_of_its_cycle(tmp_path):
    cycles = [{"view": "rgb", "other": "residual", "epochs": 1, "mining": "none"}]
    out = run(settings(tmp_path / "a", memory={"kind": "bank"}, model={"shared": True}, schedule={"cycles": cycles},
                       health={"online_every": 1, "online_measure": "score"}))  # fmt: skip
    (row,) = rows(out, "online")
    assert row["view"] == "rgb" and row["videos"] == 18


class _Watch:
    def getting_on(self):
        pass


def test_a_collapsed_encoder_is_not_the_best(tmp_path):
    settings_ = settings(tmp_path, health={"online_every": 1})
    online = OnlineScore(settings_, make_index(videos=18), ALONE, _Watch(), RandomLoader)
    torch.manual_seed(0)
    encoder = build_encoder(settings_.model, settings_.data)
    good = online.measure(encoder, "rgb")
    assert encoder.training
    for spoil in (nn.init.zeros_, lambda weight: nn.init.constant_(weight, 1e-3)):
        collapsed = build_encoder(settings_.model, settings_.data)
        for parameter in collapsed.backbone.parameters():
            spoil(parameter)
        bad = online.measure(collapsed, "rgb")
        assert bad["score"] < good["score"] and bad["effective_rank"] < good["effective_rank"]


def test_videos_that_replace_unreadable_ones_count_once(tmp_path):
    class Replacing(RandomLoader):
        def _order(self, epoch):
            return torch.where(torch.arange(len(self.index)) < 4, 5, super()._order(epoch))

    settings_ = settings(tmp_path, health={"online_every": 1})
    online = OnlineScore(settings_, make_index(videos=18), ALONE, _Watch(), Replacing)
    found = online.measure(build_encoder(settings_.model, settings_.data), "rgb")
    assert found["videos"] == len(set(Replacing(online.index, settings_.data, ["rgb"], seed=0)._order(0).tolist()))


def test_what_cannot_be_scored_is_named(tmp_path):
    settings_ = settings(tmp_path, health={"online_every": 1, "online_measure": "score", "online_videos": 1})
    with pytest.raises(InputError, match="health.online_every: expected training videos of two sources.*got 1 video"):
        run(settings_)
    online = OnlineScore(settings(tmp_path), make_index(videos=18), ALONE, _Watch(), RandomLoader)
    encoder = build_encoder(settings_.model, settings_.data)
    next(encoder.backbone.buffers()).fill_(float("nan"))
    with pytest.raises(InputError, match="the flow encoder cannot be scored: features: expected finite"):
        online.measure(encoder, "flow")


@pytest.mark.slow
def test_two_processes_score_as_one_does(tmp_path):
    run_ = tmp_path / "run"
    health = {"online_every": 1, "online_measure": "score", "online_videos": 11}
    config = settings(run_, data={"batch_size": 3, "frames": 8, "size": 16}, health=health, run={
        "out": str(run_), "device": "cpu", "keep_checkpoints": 9})  # fmt: skip
    process = torchrun(tmp_path, config, {})
    assert process.wait(120) == 0, process.stderr.read()
    online = OnlineScore(settings(tmp_path, health=health), make_index(VIDEOS), ALONE, _Watch(), RandomLoader)
    for row in rows(run_, "online"):
        encoders = load_encoders(run_ / "checkpoints" / f"step-{row['step'] + 1:08d}.pt")[1]
        alone = online.measure(encoders[row["view"]], row["view"])
        assert {name: row[name] for name in alone} == {
            name: value if value is None else pytest.approx(value, rel=1e-4) for name, value in alone.items()
        }
