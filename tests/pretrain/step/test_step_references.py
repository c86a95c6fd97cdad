"""Compares a whole training step of every method with its formulas in float64, one query and one key at a time.

The reference uses only the networks of the project: it computes stages by sorting lists and losses by adding
exponentials.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from support.small_steps import ALONE, INDEX, settings
from support.stand_in_loader import RandomLoader
from torch import Tensor, nn
from torch.nn import functional as F

from cpr_fast.config import Config, Cycle
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.step.intra import without_motion
from cpr_fast.pretrain.step.step import train_step

LR, TAU = 0.01, 0.07
SOURCE, LABEL = torch.from_numpy(INDEX.source_ids), torch.from_numpy(INDEX.labels)

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Trial:
    """A step, and the state before it."""

    state: CycleState
    batch: object
    query: nn.Module
    key: nn.Module
    other: nn.Module | None
    features: Tensor  # [V, K, D] float64, features of the memory
    video: list[int]  # [K], -1 where empty

    @property
    def filled(self) -> list[int]:
        return [k for k, video in enumerate(self.video) if video >= 0]


def trial(config: Config, cycle: Cycle, warm_up: int = 3, seed: int = 0) -> Trial:
    """Does `warm_up` steps, the first epoch, and returns the next step; `seed` is that of the loader."""
    state = CycleState(config, cycle, {}, INDEX, ALONE)
    loader = RandomLoader(INDEX, config.data, state.views, seed=seed)
    for step, batch in zip(range(warm_up), loader.epoch(0), strict=False):
        train_step(state, batch, step)
    encoders = {name: copy.deepcopy(getattr(state.encoders, name)) for name in ("query", "key", "other")}
    features, video = state.memory.features.double(), state.memory.video.tolist()
    return Trial(state, next(iter(loader.epoch(1))), **encoders, features=features, video=video)


def cascade(anchors: Tensor, features: Tensor, left: list[int], views: tuple[int, ...], top_k: int) -> list[int]:
    """Algorithm 1 [paper] for one query: anchors [V, D], features [V, K, D]; `left` are slots it may mine. r = .5."""
    for stage, view in enumerate(views, 1):
        score = {k: float(anchors[view] @ features[view, k]) for k in left}
        survivors = top_k if stage == len(views) else max(top_k, int(features.shape[1] * 0.5**stage))
        left = sorted(left, key=lambda k, score=score: -score[k])[:survivors]
    return left


def nce(f_q: Tensor, own_key: Tensor, positives: list[Tensor], negatives: list[Tensor], drops_own=False, tau=TAU):
    """MIL-NCE [paper, Eq. 2] of one query; `drops_own` removes q+ from the numerator if there is another positive."""
    own = (f_q @ own_key / tau).exp()
    mined = sum((f_q @ key / tau).exp() for key in positives)
    top = mined if drops_own and positives else own + mined
    return -(top / (own + mined + sum((f_q @ key / tau).exp() for key in negatives))).log()


def averaged_nce(f_q: Tensor, own_key: Tensor, positives: list[Tensor], negatives: list[Tensor]):
    """Computes the published UberNCE: log-softmax, averaged over q+ and the positives."""
    total = sum((f_q @ key / TAU).exp() for key in (own_key, *positives, *negatives))
    return sum(-((f_q @ key / TAU).exp() / total).log() for key in (own_key, *positives)) / (1 + len(positives))


def assert_the_step(trial: Trial, loss: Tensor, step: int = 3) -> None:
    """Asserts that the loss, and the step of SGD without momentum, are those of `loss`."""
    result = train_step(trial.state, trial.batch, step)
    torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-6, atol=1e-6)
    loss.backward()
    moves = [LR * start.grad.double() for start in trial.query.parameters()]
    rounding = 1e-8 + 1e-6 * torch.cat([move.flatten() for move in moves]).norm()  # for gradients that cancel
    for got, start, move in zip(trial.state.encoders.query.parameters(), trial.query.parameters(), moves, strict=True):
        assert (got - (start - move)).norm() <= 1e-4 * move.norm() + 1e-7 * start.norm() + rounding


def plain(**sections) -> Config:
    """Settings with a small residual network, and SGD whose step is the gradient."""
    sections["model"] = {"arch": "r3d"} | sections.get("model", {})
    optim = {"name": "sgd", "lr": LR, "momentum": 0.0, "weight_decay": 0.0}
    return settings(**sections | {"data": {"frames": 8, "size": 16}, "optim": optim})


def own_keys(t: Trial) -> tuple[Tensor, Tensor]:
    """f_q [B, D] and f_q+ in every view [V, B, D] of a step whose keys come from a moving average of weight .6."""
    with torch.no_grad():
        for k, q in zip(t.key.parameters(), t.query.parameters(), strict=True):
            k.lerp_(q, 0.4)  # rounded as in a training step
        keys = [t.key(t.batch.clips["rgb"][:, 1])]
        if t.other is not None:
            keys.append(t.other(t.batch.clips["flow"][:, 1]))
    return t.query(t.batch.clips["rgb"][:, 0]).double(), torch.stack(keys).double()


@pytest.mark.parametrize("protocol", ["paper", "coclr"])
def test_the_cascade_on_a_batch(protocol):
    """Every clip mines among the clips of other videos in its batch; gradients reach all of them."""
    config = plain(memory={"kind": "batch"}, loss={"protocol": protocol, "self_positive_drop": 1.0})
    t = trial(config, Cycle("rgb", 1, "cascade"), seed=1)  # with siblings in the batch
    f = t.query(t.batch.clips["rgb"].flatten(0, 1)).double()  # [2B, D]: clips 2i and 2i + 1 are of one video
    keys = torch.stack([f.detach(), t.other(t.batch.clips["flow"].flatten(0, 1)).double()])
    video = t.batch.video.repeat_interleave(2)
    losses = []
    for b in range(len(f)):
        compared = [k for k in range(len(f)) if video[k] != video[b]]
        siblings = [k for k in compared if SOURCE[video[k]] == SOURCE[video[b]]]
        anchors = torch.stack([keys[0, b if protocol == "coclr" else b ^ 1], keys[1, b ^ 1]])
        positives = cascade(anchors, keys, [k for k in compared if k not in siblings], (1, 0, 1), top_k=2)
        positives += siblings if protocol == "coclr" else []
        negatives = [f[k] for k in compared if k not in positives]
        losses.append(nce(f[b], f[b ^ 1], [f[k] for k in positives], negatives, drops_own=protocol == "coclr"))
    assert len(set(SOURCE[t.batch.video].tolist())) < len(t.batch.video)
    assert_the_step(t, torch.stack(losses).mean())


@pytest.mark.parametrize("protocol", ["paper", "coclr"])
def test_ubernce(protocol):
    """Every key with the same label is a positive, including siblings and older keys of the video itself."""
    config = plain(loss={"protocol": protocol}, memory={"size": 10, "ema_momentum": 0.6})
    t = trial(config, Cycle("rgb", 1, "label"))
    f_q, (keys,) = own_keys(t)
    form, losses = nce if protocol == "paper" else averaged_nce, []
    for b, video in enumerate(t.batch.video):
        positive = [bool(LABEL[t.video[k]] == LABEL[video]) for k in t.filled]
        entries = [(t.features[0, k], is_one) for k, is_one in zip(t.filled, positive, strict=True)]
        losses.append(form(f_q[b], keys[b], [k for k, one in entries if one], [k for k, one in entries if not one]))
    assert_the_step(t, torch.stack(losses).mean())


@pytest.mark.parametrize(("mining", "warm_up"), [("none", 0), ("none", 3), ("cascade", 1), ("cascade", 3)])
def test_a_bank_beside_a_moving_average(mining, warm_up):
    """The loss uses the bank while it fills, and mining starts when it is full; the query's own entry is never
    compared.
    """
    config = plain(memory={"kind": "bank", "ema_momentum": 0.6}, mining={"stages": 3, "top_k": 2})
    t = trial(config, Cycle("rgb", 1, mining), warm_up)
    f_q, keys = own_keys(t)
    losses = []
    for b, video in enumerate(t.batch.video):
        negatives = [k for k in t.filled if k != video]
        may_mine = [k for k in negatives if SOURCE[k] != SOURCE[video]]
        full = len(t.filled) == len(INDEX)
        mined = cascade(keys[:, b], t.features, may_mine, (1, 0, 1), top_k=2) if mining == "cascade" and full else []
        kept = [t.features[0, k] for k in negatives if k not in mined]
        losses.append(nce(f_q[b], keys[0, b], [t.features[0, k] for k in mined], kept))
    assert_the_step(t, torch.stack(losses).mean(), step=warm_up)


# ---- IIC: one encoder, two views of one clip --------------------------------------------------------


RESIDUAL = Cycle("rgb", 1, "none", other="residual")


def iic(loss: dict) -> Config:
    """Entries are scaled to length 1, but features are not: at a temperature of .07 one score would dominate the
    sum.
    """
    model = {"shared": True, "head": "pooled", "feature_dim": 64}
    return plain(memory={"kind": "bank"}, model=model, loss={"temperature": 1.0} | loss)


@pytest.mark.parametrize(
    ("intra", "warm_up"), [("none", 0), ("none", 1), ("none", 3), ("repeat", 1), ("repeat", 3), ("shuffle", 3)]
)
def test_iic(intra, warm_up):
    """q+ is the video's entry in the other view; negatives are other videos' entries there, and all entries without
    motion.
    """
    t = trial(iic({"intra_negatives": intra}), RESIDUAL, warm_up)
    assert_the_step(t, iic_loss(t), step=warm_up)


@pytest.mark.parametrize("intra", ["none", "repeat"])
@pytest.mark.parametrize(("protocol", "drop"), [("paper", 0.9), ("coclr", 1.0), ("coclr", 0.0)])
def test_iic_with_the_cascade(protocol, drop, intra):
    """The cascade of each view starts and ends in the other view, with the entries of the query's video (or f_q) as
    anchor.
    """
    loss = {"intra_negatives": intra, "protocol": protocol, "self_positive_drop": drop}
    t = trial(iic(loss), replace(RESIDUAL, mining="cascade"))
    assert_the_step(t, iic_loss(t))


def test_the_bank_of_iic_moves_halfway():
    """An entry is the normalised mean of old entry and new feature, also for clips without motion; the first entry of a
    video is the feature itself.
    """
    t = trial(iic({"intra_negatives": "repeat"}), RESIDUAL, warm_up=1)
    rgb, residual = (t.batch.clips[view][:, 0] for view in ("rgb", "residual"))
    still = without_motion(rgb, "repeat", seed=0, step=1, world=ALONE)
    assert torch.equal(still[:, :, :1].expand_as(still), still)
    with torch.no_grad():
        new = torch.stack([t.query(clips).double() for clips in (rgb, residual, still)])
    train_step(t.state, t.batch, 1)
    expected, videos = t.features.clone(), t.batch.video.tolist()
    for b, video in enumerate(videos):
        mixed = (t.features[:, video] + new[:, b]) / 2 if video in t.filled else new[:, b]
        expected[:, video] = mixed / mixed.norm(dim=1, keepdim=True)
    assert 0 < sum(video in t.filled for video in videos) < len(videos)
    torch.testing.assert_close(t.state.memory.features.double(), expected, rtol=0, atol=1e-6)
    assert t.state.memory.video[videos].tolist() == videos


def iic_loss(t: Trial) -> Tensor:
    """Returns the sum over both views of the mean over the batch."""
    config = t.state.config.loss
    f = [t.query(t.batch.clips[view][:, 0]).double() for view in ("rgb", "residual")]
    total = torch.zeros((), dtype=torch.float64)
    for b, video in enumerate(t.batch.video.tolist()):
        entry = t.features[:2, video] if video in t.filled else F.normalize(torch.stack(f)[:, b].detach(), dim=1)
        for own, other in ((0, 1), (1, 0)):
            compared = [k for k in t.filled if k != video]
            siblings = [k for k in compared if SOURCE[k] == SOURCE[video]]
            positives = []
            if t.state.cycle.mining == "cascade":
                anchors = list(entry)
                if config.protocol == "coclr":
                    anchors[own] = f[own][b].detach()
                may_mine = [k for k in compared if k not in siblings]
                positives = cascade(anchors, t.features, may_mine, (other, own, other), top_k=2)
                positives += siblings if config.protocol == "coclr" else []
            negatives = [t.features[other, k] for k in compared if k not in positives]
            if config.intra_negatives != "none":
                negatives += [t.features[2, k] for k in t.filled]
            drops_own = config.protocol == "coclr" and config.self_positive_drop == 1
            positives = [t.features[other, k] for k in positives]
            total = total + nce(f[own][b], entry[other], positives, negatives, drops_own, tau=1.0)
    return total / len(t.batch.video)
