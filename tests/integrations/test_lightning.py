"""The callback in a LightningModule of another author: it trains as the same loop in plain torch, mines what the
reference cascade mines, and is resumed from a checkpoint of Lightning."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch.nn.functional import normalize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch", reason="needs the package lightning")

from cpr_fast.errors import InputError
from cpr_fast.integrations.lightning import CascadeMining
from cpr_fast.ops import QueueLoss, cascade_select_ref

SOURCES, WIDTH, D, BATCH, SIZE, EPOCHS = 24, 12, 6, 8, 40, 5
VIEWS, KEEP = [1, 0], [11, 3]
LABELS = torch.arange(SOURCES) % 4
LOADER_SEED = 3

pytestmark = pytest.mark.filterwarnings("ignore")


def queue(cascade=True) -> QueueLoss:
    return QueueLoss(SIZE, D, num_views=2, views=VIEWS if cascade else None, keep=KEEP if cascade else None)


def batches() -> torch.utils.data.DataLoader:
    """Three batches of noisy inputs of 24 sources in four classes, with their numbers."""
    generator = torch.Generator().manual_seed(LOADER_SEED)
    classes = torch.randn(2, 4, WIDTH, generator=generator)
    inputs = classes[:, LABELS].movedim(1, 0) + 0.5 * torch.randn(2, SOURCES, 2, WIDTH, generator=generator)
    held = torch.utils.data.TensorDataset(inputs.movedim(0, 1), torch.arange(SOURCES))
    return torch.utils.data.DataLoader(held, batch_size=BATCH)


class Theirs(lightning.LightningModule):
    """A module that calls the queue in its training step; nothing else of it knows of mining."""

    def __init__(self, steps=None):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(WIDTH, D)
        self.steps = [] if steps is None else steps

    def training_step(self, batch, number):
        inputs, ids = batch  # [B, 2 augmentations, V, WIDTH]
        query, key = normalize(self.project(inputs), dim=-1).movedim(2, 0).unbind(2)
        before = self.cascade.memory.clone(), self.cascade.memory_ids.clone()
        mined = self.cascade.mine(key, ids)
        loss = self.cascade(query, key, ids)
        self.steps.append((self.current_epoch, loss.item(), key.detach(), ids, *before, mined))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(folder, callback, module=None, epochs=EPOCHS, resume=None, **changes):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Theirs() if module is None else module
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keep = lightning.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[callback, keep], **settings | changes)
    trainer.fit(module, batches(), ckpt_path=resume)
    return module, trainer


def plain(mines_from: int | None):
    """Returns losses and weights of the loop in plain torch; nothing is mined before the epoch `mines_from`."""
    module, criterion = Theirs(), queue()
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=0.01), []
    for epoch in range(EPOCHS):
        mines = mines_from is not None and epoch >= mines_from
        criterion.views, criterion.keep = (VIEWS, KEEP) if mines else (None, None)
        for inputs, ids in batches():
            query, key = normalize(module.project(inputs), dim=-1).movedim(2, 0).unbind(2)
            loss = criterion(query, key, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, module.project.weight


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    callback = CascadeMining(queue(), labels=LABELS)
    return *fit(folder, callback), folder


def test_it_trains_as_plain_torch_does_and_mining_changes_the_weights(straight):
    """40 entries are full after 2 epochs of 24 clips, so that mining starts with the third epoch."""
    module, trainer, _ = straight
    losses, weight = plain(mines_from=2)
    assert [step[1] for step in module.steps] == losses
    assert torch.equal(module.project.weight, weight)
    unmined, other = plain(mines_from=None)
    assert unmined[:6] == losses[:6] and unmined[6] != losses[6]
    assert not torch.allclose(weight, other, atol=1e-3)


def test_the_mined_entries_are_those_of_the_reference_cascade(straight):
    mined_steps = 0
    for epoch, _, key, ids, memory, memory_ids, mined in straight[0].steps:
        assert (mined is not None) == (epoch >= 2)
        if mined is not None:
            slots, _ = cascade_select_ref(key, memory, VIEWS, KEEP, query_ids=ids, memory_ids=memory_ids)
            assert torch.equal(mined, slots)
            mined_steps += 1
    assert mined_steps == 9


def test_pmr_is_logged_from_the_labels(straight):
    module, trainer, _ = straight
    held = module.cascade
    slots, _ = cascade_select_ref(held.memory, held.memory, VIEWS, KEEP, query_ids=held.memory_ids,
                                  memory_ids=held.memory_ids)  # fmt: skip
    right = LABELS[held.memory_ids[slots]] == LABELS[held.memory_ids][:, None]
    assert trainer.callback_metrics["cascade_pmr"].item() == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(straight, tmp_path, epoch):
    module, _, folder = straight
    again, _ = fit(tmp_path, CascadeMining(queue(), labels=LABELS), resume=str(folder / f"epoch={epoch}.ckpt"))
    assert len(again.steps) == 3 * (EPOCHS - epoch - 1)
    assert [step[1] for step in again.steps] == [step[1] for step in module.steps[3 * (epoch + 1) :]]
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_checkpoint_says_whether_the_epoch_mines():
    callback, again = CascadeMining(queue()), CascadeMining(queue())
    callback.load_state_dict({"mines": False})
    again.load_state_dict(callback.state_dict())
    assert not again.mines and again.queue.mine(torch.zeros(2, 1, D)) is None
    again.load_state_dict({"mines": True})
    assert again.mines and list(again.queue.views) == VIEWS and list(again.queue.keep) == KEEP


def test_the_first_epoch_that_may_mine(tmp_path):
    module, _ = fit(tmp_path, CascadeMining(queue(), start_epoch=4, name="cascade"))
    assert [step[6] is not None for step in module.steps] == [False] * 12 + [True] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue": "queue"}, "queue: expected a QueueLoss with a cascade .*, got str"),
        ({"queue": None}, "queue: expected a QueueLoss with a cascade .*, got one without"),
        ({"start_epoch": -1}, "start_epoch: expected a number of epochs, 0 or more, got -1"),
        ({"start_epoch": 1.5}, "start_epoch: .* got 1.5"),
        ({"name": "a b"}, "name: expected the name of an attribute, got 'a b'"),
        ({"labels": [0, 1]}, r"labels: expected a tensor \[S\] of torch.int64, got list"),
        ({"labels": torch.zeros(3)}, r"labels: expected \[S\] of torch.int64, got \[3\] of torch.float32"),
    ],
)
def test_bad_settings_are_named(settings, message):
    settings = {"queue": queue()} | settings
    settings["queue"] = queue(cascade=False) if settings["queue"] is None else settings["queue"]
    with pytest.raises(InputError, match=message):
        CascadeMining(**settings)


def test_a_source_without_a_label_is_named(tmp_path):
    with pytest.raises(InputError, match=f"labels: expected one of each source, got 23 and the source {SOURCES - 1}"):
        fit(tmp_path, CascadeMining(queue(), labels=LABELS[:-1]))


@pytest.mark.parametrize("count", [3, SIZE])
def test_pmr_is_that_of_the_newest_entries(monkeypatch, count):
    monkeypatch.setattr("cpr_fast.integrations.lightning.JUDGED", count)
    callback, generator = CascadeMining(queue(), labels=LABELS), torch.Generator().manual_seed(2)
    for begin in range(0, 56, 8):  # 16 entries are replaced, so the newest are in the middle of the memory
        features = normalize(torch.randn(2, 2, 8, D, generator=generator), dim=-1)
        callback.queue(*features, torch.arange(begin, begin + 8) % SOURCES)
    held = callback.queue
    newest = torch.arange(16 - count, 16) % SIZE
    slots, _ = cascade_select_ref(held.memory[:, newest], held.memory, VIEWS, KEEP, query_ids=held.memory_ids[newest],
                                  memory_ids=held.memory_ids)  # fmt: skip
    right = LABELS[held.memory_ids[slots]] == LABELS[held.memory_ids[newest]][:, None]
    torch.testing.assert_close(callback._mining_rate(), right.float().mean())


def test_an_attribute_of_the_module_is_not_replaced(tmp_path):
    with pytest.raises(InputError, match="name: Theirs has an attribute 'project' already"):
        fit(tmp_path, CascadeMining(queue(), name="project"))


def test_several_processes_are_refused():
    class Trainer:
        world_size = 2

    with pytest.raises(InputError, match="expected one process, got 2"):
        CascadeMining(queue()).setup(Trainer(), Theirs(), "fit")
