"""The miner for pytorch-metric-learning against plain torch, alone and inside the memory of the package."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("pytorch_metric_learning", reason="needs pytorch-metric-learning")

from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, SupConLoss

from cpr_fast.errors import InputError
from cpr_fast.integrations.metric_learning import CascadeMiner
from cpr_fast.ops import cascade_select_ref

CASCADE = {"views": [1, 0, 1], "keep": [17, 9, 3], "num_views": 2}


def data(seed=0, batch=7, size=41, width=5, sources=11):
    generator = torch.Generator().manual_seed(seed)
    views = normalize(torch.randn(2, batch + size, width, generator=generator), dim=2)
    labels = torch.randint(sources, (batch + size,), generator=generator)
    flat = torch.cat([views[0], views[1]], 1)
    return views, flat[:batch], labels[:batch], flat[batch:], labels[batch:]


def pairs(anchors, others) -> set[tuple[int, int]]:
    found = list(zip(anchors.tolist(), others.tolist(), strict=True))
    assert len(set(found)) == len(found)
    return set(found)


def expected(views, labels, ref_labels, batch):
    """Returns the pairs of the reference cascade: positives, and all others."""
    slots, _ = cascade_select_ref(views[:, :batch], views[:, batch:], CASCADE["views"], CASCADE["keep"],
                                  query_ids=labels, memory_ids=ref_labels)  # fmt: skip
    mined = {(i, int(slot)) for i, row in enumerate(slots) for slot in row if slot >= 0}
    same = {(i, j) for i in range(batch) for j in range(len(ref_labels)) if labels[i] == ref_labels[j]}
    every = {(i, j) for i in range(batch) for j in range(len(ref_labels))}
    assert mined and same and not mined & same
    return mined | same, every - mined - same


def test_the_pairs_are_those_of_the_reference_cascade():
    views, embeddings, labels, ref_emb, ref_labels = data()
    scaled = embeddings * 3, ref_emb * torch.rand(len(ref_emb), 1)  # lengths do not matter
    a1, p, a2, n = CascadeMiner(**CASCADE)(scaled[0], labels, scaled[1], ref_labels)
    positives, negatives = expected(views, labels, ref_labels, len(labels))
    assert pairs(a1, p) == positives and pairs(a2, n) == negatives


def test_within_a_batch_no_embedding_is_compared_with_itself():
    _, embeddings, labels, _, _ = data(batch=19)
    a1, p, a2, n = CascadeMiner(keep=[2])(embeddings, labels)
    assert not (a1 == p).any() and not (a2 == n).any()
    assert len(a1) + len(a2) == 19 * 18


def test_fewer_references_than_the_cascade_keeps():
    _, embeddings, labels, ref_emb, ref_labels = data(size=2)
    a1, p, a2, n = CascadeMiner(keep=[5])(embeddings, labels, ref_emb, ref_labels)
    assert len(a1) == len(embeddings) * 2 and not len(a2)


def test_references_of_unknown_source_are_not_mined():
    _, embeddings, labels, ref_emb, ref_labels = data()
    ref_labels[::2] = -1
    a1, p, _, _ = CascadeMiner(keep=[4])(embeddings, labels, ref_emb, ref_labels)
    assert len(a1) and (ref_labels[p] != -1).all()


def test_the_memory_of_the_package_gives_the_gradient_of_the_mined_pairs():
    """CrossBatchMemory with the miner equals its loss on the reference's pairs, and not the loss without a miner."""
    views, embeddings, labels, ref_emb, ref_labels = data()
    grads, losses = [], []
    for miner in (CascadeMiner(**CASCADE), None):
        memory = CrossBatchMemory(SupConLoss(), embedding_size=10, memory_size=48, miner=miner)
        memory.add_to_memory(ref_emb, ref_labels, len(ref_emb))
        query = embeddings.clone().requires_grad_()
        loss = memory(query, labels)  # enqueues the 7 queries, which fills the 48 slots
        loss.backward()
        losses.append(loss.item()), grads.append(query.grad)
    order = torch.cat([torch.arange(7, 48), torch.arange(7)])  # the entries of the memory, in the order of their slots
    both, every = views[:, order], torch.cat([ref_labels, labels])
    slots, _ = cascade_select_ref(views[:, :7], both, CASCADE["views"], CASCADE["keep"],
                                  query_ids=labels, memory_ids=every)  # fmt: skip
    positive = (labels[:, None] == every).scatter(1, slots, True)
    query = embeddings.clone().requires_grad_()
    scores = normalize(query, dim=1) @ normalize(torch.cat([ref_emb, embeddings]), dim=1).T / 0.1
    others = torch.ones_like(positive)
    others[torch.arange(7), 41 + torch.arange(7)] = False  # an embedding is not compared with itself
    log_softmax = scores - scores.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    positive &= others
    loss = -((log_softmax * positive).sum(1) / positive.sum(1)).mean()
    loss.backward()
    assert losses[0] == pytest.approx(loss.item(), rel=1e-5) and abs(losses[0] - losses[1]) > 0.01
    torch.testing.assert_close(grads[0], query.grad, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(grads[0], grads[1], rtol=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": [2], "num_views": 2}, r"views: expected values in 0..1"),
        ({"keep": [0]}, r"keep: expected non-increasing values >= 1"),
        ({"views": [0, 0], "keep": [3, 5]}, r"keep: expected non-increasing"),
        ({"views": [0, 1]}, "views, keep: expected the same number"),
        ({"views": 1}, "views: expected a sequence of ints, one for each stage, got"),
        ({"keep": 5}, "keep: expected a sequence of ints, one for each stage, got"),
        ({"views": None}, "views: expected a sequence of ints"),
        ({"num_views": 0}, "num_views: expected a number, 1 or more, got 0"),
        ({"num_views": True}, "num_views: expected a number, 1 or more, got True"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        CascadeMiner(**settings)


def test_a_width_that_the_views_do_not_divide_is_named():
    with pytest.raises(InputError, match=r"multiple of num_views 3, got \[7, 10\]"):
        CascadeMiner(num_views=3)(*data()[1:3])


def test_labels_that_are_not_integers_are_refused():
    _, embeddings, labels, *_ = data()
    with pytest.raises(InputError, match="labels: expected integers, got torch.float32"):
        CascadeMiner(**CASCADE)(embeddings, labels / 2)


def test_half_precision_labels_of_int32_and_an_empty_memory():
    _, embeddings, labels, ref_emb, ref_labels = data()
    memory = CrossBatchMemory(NTXentLoss(), embedding_size=10, memory_size=64, miner=CascadeMiner(**CASCADE))
    half = embeddings.half().requires_grad_()
    assert memory(half, labels.int()).isfinite()  # the first batch is all that the memory holds
