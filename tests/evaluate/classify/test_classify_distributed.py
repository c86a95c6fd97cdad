"""Finetuning, probe, testing and embedding by two processes on gloo, compared with one process with the whole batch.

The two processes run this file as a program: `torchrun tests/evaluate/classify/test_classify_distributed.py FOLDER`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[3] / "tests")]

import pytest
import torch
from support.stand_in_loader import RandomLoader, make_index

from cpr_fast.config import ClassifierConfig, Config, ProbeConfig
from cpr_fast.data.clips.sampling import plan_labelled
from cpr_fast.data.index.index import Index
from cpr_fast.evaluate.classify.classifier import Classifier
from cpr_fast.evaluate.classify.finetune import Training, selection_accuracy, train_on_clips
from cpr_fast.evaluate.features.cache import FeatureCache, embed_index
from cpr_fast.evaluate.features.embedding import Embedding
from cpr_fast.evaluate.features.shares import shared_out
from cpr_fast.models import build_encoder
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.interrupt import Interrupted
from cpr_fast.runtime.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Config.from_dict({"data": {"frames": 5, "size": 20}, "model": {"width": 0.125, "conv_std": 0.15}})
VIDEOS, BATCH = 27, 8  # three steps of 8, and three videos left over: not a multiple of two
COMMON = {"epochs": 3, "milestones": (2,), "optimizer": "sgd", "lr": 0.05, "dropout": 0.5}
SETTINGS = {
    "finetune": ClassifierConfig(**COMMON, backbone_lr=0.01, normalize=True, batch_norm=True),
    "probe": ProbeConfig(**COMMON, inputs="clips"),
}


class Loader(RandomLoader):
    """Requests this process to stop at step `stop_at`, counted over all epochs."""

    stop_at = None

    def epoch(self, epoch, start_step=0):
        for step, batch in enumerate(super().epoch(epoch, start_step), epoch * len(self) + start_step):
            if step == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def sample(self, epoch, video):
        clip = self._clip(epoch, video, "rgb")[None, :1]
        label = torch.from_numpy(self.index.labels)[[video]]
        return SimpleNamespace(clips={"rgb": clip}, label=label, video=torch.tensor([video]))


class TwoRanks(Classifier):
    """Computes in one process what two processes compute: each half of the batch has separate batch statistics."""

    def features(self, clips):
        if not self.training or self.frozen:
            return super().features(clips)
        statistics = [b for b in self.encoder.buffers() if b.is_floating_point()]
        before = [b.clone() for b in statistics]
        found, after = [], []
        for half in clips.chunk(2):
            for buffer, value in zip(statistics, before, strict=True):
                buffer.data.copy_(value)
            found.append(super().features(half))
            after.append([b.clone() for b in statistics])
        for buffer, *values in zip(statistics, *after, strict=True):
            buffer.data.copy_(sum(values) / 2)
        return torch.cat(found)


def train(folder: Path, task: str, world: World, model_type=Classifier, stop_at=None) -> dict:
    """Trains, and returns the weights and the results that the training returns."""
    index, device = make_index(VIDEOS), torch.device("cpu")
    torch.manual_seed(0)
    model = model_type(build_encoder(CONFIG.model), len(index.classes), SETTINGS[task])
    data = CONFIG.data.__class__(**vars(CONFIG.data) | {"batch_size": BATCH // world.size})
    loaders = [
        Loader(index, data, ["rgb"], seed=seed, rank=world.rank, world_size=world.size, plan=plan_labelled)
        for seed in (1, 2)
    ]
    loaders[0].stop_at = stop_at
    select = selection_accuracy(loaders[1], VIDEOS, "rgb", device)
    done = train_on_clips(model, loaders[0], Training(CONFIG, SETTINGS[task], "rgb", folder, 1, device, select))
    return {"weights": model.state_dict()} | done


def embed(folder: Path) -> tuple[dict, torch.Tensor]:
    """Returns the features of five videos, with a cache that contains one of them; the last one gives no window."""
    from support.videos.counted_videos import NET, CountingLoader

    index = Index.load(folder / "videos.csv")
    cache = FeatureCache(folder / "features", "recipe")
    embed_index(Index([index[1]]), NET, CountingLoader, cache)
    CountingLoader.opened.clear()
    embeddings = NET | {"plain/rgb": Embedding("rgb", lambda clips: clips.flatten(1) + 1)}
    found = embed_index(index, embeddings, lambda part: CountingLoader(part, broken="e"), cache)
    return *found, sorted(set(CountingLoader.opened))


def main(folder: Path) -> None:
    world = distributed.init("cpu")
    torch.set_num_threads(1)
    found = {task: train(folder / task, task, world) for task in SETTINGS}
    try:
        train(
            folder / "stopped", "finetune", world, stop_at=4 if world.rank else None
        )  # only one of the two receives the request
    except Interrupted as stopped:
        found["message"] = str(stopped)
    found["stopped"] = train(folder / "stopped", "finetune", world)
    found["shares"] = [
        shared_out(videos, lambda mine: ({i: torch.tensor(mine) for i in mine}, torch.tensor(mine) + 1))
        for videos in (0, 1, 3)
    ]
    found["embed"] = embed(folder)
    torch.save(found, folder / f"rank{world.rank}.pt")
    distributed.finish()


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Returns the results of both processes, and their folder."""
    from support.videos.counted_videos import write_videos

    folder = tmp_path_factory.mktemp("two")
    write_videos(folder, "abcde").save(folder / "videos.csv")
    torchrun(__file__, str(folder))
    return *(torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)), folder


def rows(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "epoch_time_s"} for row in read_metrics(folder)]


def test_both_ranks_end_with_the_same_bits(two):
    for name in ("finetune", "probe", "stopped"):
        for (weight, a), b in zip(two[0][name]["weights"].items(), two[1][name]["weights"].values(), strict=True):
            assert torch.equal(a, b), (name, weight)
        assert two[0][name]["best_epoch"] == two[1][name]["best_epoch"]


@pytest.mark.parametrize(("task", "model_type"), [("finetune", TwoRanks), ("probe", Classifier)])
def test_two_processes_of_4_learn_what_one_of_8_does(two, tmp_path, task, model_type):
    """The reference has batch statistics of the backbone per rank and of the head over the whole batch, and the same
    dropout. Results differ only by the order of sums: losses and weights agree within 1e-5.
    """
    one = train(tmp_path, task, World(0, 1, torch.device("cpu")), model_type)
    curves = [rows(tmp_path), rows(two[2] / task)]
    for a, b in zip(*curves, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert [a[key] for key in ("accuracy", "selection", "lr")] == [
            b[key] for key in ("accuracy", "selection", "lr")
        ]
    assert len({row["loss"] for row in curves[0]}) == 3
    for name, weight in one["weights"].items():
        if weight.is_floating_point():  # except BatchNorm's counters, which count both halves in one process
            torch.testing.assert_close(two[0][task]["weights"][name], weight, rtol=1e-3, atol=1e-5, msg=name)


def test_a_signal_to_one_rank_stops_both_and_they_end_as_uninterrupted_ones(two):
    for found in two[:2]:
        assert found["message"].startswith("stopped by SIGTERM after step 2 of epoch 2; saved ")
    for (name, a), b in zip(two[0]["finetune"]["weights"].items(), two[0]["stopped"]["weights"].values(), strict=True):
        assert torch.equal(a, b), name
    assert rows(two[2] / "finetune") == rows(two[2] / "stopped")


def test_shares_are_put_together_in_order(two):
    for found in two[:2]:
        for videos, (values, windows) in zip((0, 1, 3), found["shares"], strict=True):
            assert windows.tolist() == [i + 1 for i in range(videos)]
            for i, row in values.items():  # from the rank that has video i; the other rank has zeros there
                assert row.tolist() == [j if j % 2 == i % 2 else 0 for j in range(videos)]
            assert sorted(values) == list(range(videos))


def test_features_are_embedded_once_and_shared_out(two, tmp_path):
    from support.videos.counted_videos import write_videos

    write_videos(tmp_path, "abcde").save(tmp_path / "videos.csv")
    features, windows, _ = embed(tmp_path)
    assert windows.tolist() == [2, 2, 2, 2, 0]
    for found in two[:2]:
        assert torch.equal(found["embed"][1], windows)
        for name, value in features.items():
            assert torch.equal(found["embed"][0][name], value)
    assert [found["embed"][2] for found in two[:2]] == [["a", "c"], ["b", "d"]]
    assert [path.name for path in (two[2] / "features").iterdir()] == [
        path.name for path in (tmp_path / "features").iterdir()
    ]


# Two commands in the same two processes, each of which takes ten seconds to load. The second one joins its group as a
# restarted worker does: the store still has the addresses of the first group.
SEPARATOR = "---"
COMMANDS = f"""
import json, os, sys
from cpr_fast.cli import main
for number, command in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    if number and os.environ["RANK"] == "0":
        print({SEPARATOR!r})
    if code := main(command):
        sys.exit(code)
"""


@pytest.mark.slow
def test_commands_of_two_processes_write_and_print_once(tmp_path):
    pytest.importorskip("nvidia.dali")
    from cpr_fast.data.synthetic.videos import write_synthetic
    from cpr_fast.evaluate.classify.classify import classify
    from cpr_fast.evaluate.retrieval.retrieve import retrieve
    from cpr_fast.weights.checkpoint import save_checkpoint

    index = write_synthetic(tmp_path / "data", classes=4, videos=2, frames=12, width=64, height=48)
    config = Config.from_dict({"data": {"frames": 8, "size": 32, "workers": 1}, "model": {"width": 0.0625}})
    torch.manual_seed(0)
    payload = {"config": config.to_dict(), "encoders": {"rgb": build_encoder(config.model).state_dict()}}
    (tmp_path / "metrics.jsonl").write_text("")
    checkpoint = save_checkpoint(tmp_path / "checkpoints" / "last.pt", payload)
    common = [str(checkpoint), "--index", str(index), "--recipe", "coclr", "--json"]
    options = ["--inputs", "clips", "--epochs", "2", "--batch-size", "2"]
    (tmp_path / "commands.py").write_text(COMMANDS)
    commands = json.dumps([["retrieve", *common], ["probe", *common, *options]])
    two, probed = map(json.loads, torchrun(str(tmp_path / "commands.py"), commands).stdout.split(SEPARATOR))
    one = retrieve(checkpoint, index, recipe="coclr", cache=False)
    for key in ("view", "r@1", "r@5"):
        assert two[key] == one[key]
    written = {path.name for path in (tmp_path / "evaluations").iterdir()}
    settings = ProbeConfig(inputs="clips", epochs=2, milestones=(1,), lr=0.1, batch_size=4, normalize=True)
    one = classify(checkpoint, [index], task="probe", settings=settings, recipe="coclr", crops=1)
    for key in ("accuracy", "videos", "confusion", "unread", "best_epoch"):
        assert probed["results"][0][key] == one["results"][0][key], key
    # Both results, the ranks of the retrieval, and the folder of one training.
    assert len(written) == 4 and Path(probed["file"]).name in written
    kinds = [row["kind"] for row in read_metrics(tmp_path)]
    assert kinds.count("classification") == 1 and kinds.count("retrieval") > 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
