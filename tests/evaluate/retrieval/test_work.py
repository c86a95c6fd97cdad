"""The time left of a retrieval and a probe covers all their passes: what is expected is what is read."""

import dataclasses

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the videos are decoded")

from cpr_fast.config import Config
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.evaluate.classify import classify
from cpr_fast.evaluate.features.windows import work_ahead
from cpr_fast.evaluate.retrieval import retrieve
from cpr_fast.models import build_encoder
from cpr_fast.runtime.progress import Forecast
from cpr_fast.weights.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorded(Forecast):
    """A forecast that remembers the last one."""

    last: Forecast

    def __init__(self, total: float) -> None:
        super().__init__(total)
        Recorded.last = self


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(index, the same without labels and splits, checkpoint of two views)."""
    folder = tmp_path_factory.mktemp("work")
    labelled = write_synthetic(folder / "data", classes=4, videos=2, frames=20, width=64, height=48)
    bare = folder / "data" / "bare.csv"
    Index(dataclasses.replace(video, label="", split="") for video in Index.load(labelled)).save(bare)
    values = {
        "data": {"frames": 8, "size": 32, "workers": 1, "batch_size": 2},
        "model": {"arch": "r3d", "width": 0.125, "head": "pooled", "feature_dim": 64},
    }
    config = Config.from_dict(values)
    torch.manual_seed(0)
    encoders = {view: build_encoder(config.model).state_dict() for view in ("rgb", "residual")}
    payload = {"config": config.to_dict(), "encoders": encoders}
    return labelled, bare, save_checkpoint(folder / "run" / "checkpoints" / "last.pt", payload)


@pytest.mark.parametrize("labelled", [True, False])
def test_what_retrieval_expects_to_read_is_what_it_reads(made, monkeypatch, labelled):
    monkeypatch.setattr(retrieve, "Forecast", Recorded)
    protocol = "train_test" if labelled else "leave_source_out"
    for again in (False, True):  # the second time all is stored, so that nothing is read
        retrieve.retrieve([str(made[2])], made[0 if labelled else 1], protocol=protocol)
        assert Recorded.last._total == Recorded.last._done and (Recorded.last._done == 0) == again


def test_what_a_probe_expects_to_read_is_what_it_reads(made, monkeypatch):
    monkeypatch.setattr(classify, "Forecast", Recorded)
    settings = dataclasses.replace(Config().probe, epochs=1, milestones=())
    classify.classify([str(made[2])], [made[0]], task="probe", settings=settings, seeds=(0, 1))
    assert Recorded.last._total == pytest.approx(Recorded.last._done) and Recorded.last._done > 0


@pytest.mark.parametrize(
    ("videos", "windows", "batches", "sentence"),
    [
        (1, 1, 1, "queries: 1 video in 1 window, 1 batch"),
        (1200, 2400, 2, "queries: 1,200 videos in 2,400 windows, 2 ba"),
    ],
)
def test_the_work_ahead_is_counted_in_words(videos, windows, batches, sentence):
    class Loader:
        def __len__(self):
            return batches

    Loader.windows = windows
    assert work_ahead("queries", videos, Loader()).startswith(sentence)
    assert work_ahead("queries", videos, Loader(), stored=3).endswith(", 3 more are stored already")
