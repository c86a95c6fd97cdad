"""Compares QueueLoss with its definition in plain PyTorch, step by step."""

import io

import pytest
import torch
from torch.nn.functional import normalize

from cpr_fast.ops import QueueLoss, cascade_select_ref, mil_nce_ref


def batch(step: int, B: int = 6, V: int = 2, D: int = 16):
    generator = torch.Generator().manual_seed(step)
    query, key = (normalize(torch.randn(V, B, D, generator=generator), dim=2) for _ in range(2))
    return query.requires_grad_(), key, torch.randint(0, 8, (B,), generator=generator)


def test_steps_equal_the_definition():
    """The queue wraps around twice; the batch size does not divide it."""
    K, V, D = 20, 2, 16
    views, keep = [1, 0], [8, 3]
    criterion = QueueLoss(K, D, num_views=V, views=views, keep=keep, temperature=0.2)
    memory, ids, newest = torch.zeros(V, K, D), torch.full((K,), -1), 0
    for step in range(8):
        query, key, sources = batch(step)
        positives, _ = cascade_select_ref(key, memory, views, keep, query_ids=sources, memory_ids=ids)
        twin = query.detach().clone().requires_grad_()
        expected = sum(
            mil_nce_ref(twin[v], key[v], memory[v], positives, query_ids=sources, memory_ids=ids, same_id="ignore",
                        temperature=0.2)
            for v in range(V)
        ) / V  # fmt: skip
        loss = criterion(query, key, sources)
        torch.testing.assert_close(loss, expected)
        loss.backward()  # after the queue was overwritten
        expected.backward()
        torch.testing.assert_close(query.grad, twin.grad)
        for b in range(6):
            memory[:, newest], ids[newest] = key[:, b], sources[b]
            newest = (newest + 1) % K
        assert torch.equal(criterion.memory, memory) and torch.equal(criterion.memory_ids, ids)


def test_one_view_without_mining_is_moco():
    criterion = QueueLoss(12, 16, temperature=0.07)
    (query, key, _), (other, _, _) = batch(0, V=1), batch(1, V=1)
    criterion(other, other)
    expected = mil_nce_ref(query[0], key[0], criterion.memory[0].clone(), memory_ids=criterion.memory_ids.clone())
    torch.testing.assert_close(criterion(query[0], key[0]), expected)


def test_evaluation_does_not_enqueue():
    criterion = QueueLoss(12, 16).eval()
    query, key, ids = batch(0, V=1)
    criterion(query, key, ids)
    assert (criterion.memory_ids == -1).all() and criterion.position == 0


def test_state_dict_continues_to_the_bit():
    settings = {"num_views": 2, "views": [0, 1], "keep": [6, 2], "learn_temperature": True}
    straight = QueueLoss(15, 16, **settings)
    for step in range(3):
        straight(*batch(step))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = QueueLoss(15, 16, **settings)
    resumed.load_state_dict(torch.load(file))
    for step in range(3, 6):
        assert torch.equal(straight(*batch(step)), resumed(*batch(step)))
    assert all(torch.equal(x, resumed.state_dict()[name]) for name, x in straight.state_dict().items())


def test_the_temperature_learns():
    criterion = QueueLoss(12, 16, num_views=2, temperature=0.1, learn_temperature=True)
    torch.testing.assert_close(criterion.temperature, torch.tensor(0.1))
    criterion(*batch(0))
    criterion(*batch(1)).backward()
    assert [name for name, _ in criterion.named_parameters()] == ["log_temperature"]
    assert criterion.log_temperature.grad.abs() > 0


def test_no_gradient_reaches_the_key():
    criterion = QueueLoss(12, 16, num_views=2)
    query, key, ids = batch(0)
    key.requires_grad_()
    criterion(query, key, ids).backward()
    assert key.grad is None and not criterion.memory.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.rand(6, 16)}, r"query: expected shape \[V=2, B >= 1, D=16\], got \[6, 16\]"),
        ({"query": torch.rand(2, 6, 15)}, "query: expected shape"),
        ({"key": torch.rand(2, 5, 16)}, "key: expected the shape of query"),
        ({"key": torch.rand(2, 6, 16).numpy()}, "key: expected a torch.Tensor"),
        ({"key": torch.zeros(2, 6, 16, dtype=torch.int64)}, "key: expected a floating-point dtype"),
        ({"query": torch.rand(2, 6, 16).to_sparse()}, "query: expected a dense"),
        ({"key": torch.nested.nested_tensor([torch.rand(6, 16)] * 2)}, "key: expected a dense .* got a nested tensor"),
        ({"ids": torch.arange(6).float()}, "ids: expected int64, got torch.float32"),
        ({"ids": torch.arange(6).tolist()}, "ids: expected an int64 torch.Tensor"),
        ({"ids": torch.arange(5)}, r"ids: expected shape \[6\], got \[5\]"),
        ({"ids": torch.arange(6).to("meta")}, "ids: expected the device of query, cpu, got meta"),
        (
            {"query": torch.rand(2, 13, 16), "key": torch.rand(2, 13, 16), "ids": None},
            "key: expected at most size = 12",
        ),
    ],
)
def test_bad_batches_are_refused(change, message):
    query, key, ids = batch(0)
    with pytest.raises((TypeError, ValueError), match=message):
        QueueLoss(12, 16, num_views=2)(**{"query": query, "key": key, "ids": ids, **change})


def test_the_first_loss_is_zero_without_a_gradient_unless_the_queue_was_filled():
    query, key, ids = batch(0)
    for filled in (False, True):
        criterion, leaf = QueueLoss(len(ids), 16, num_views=2), query.detach().clone().requires_grad_()
        if filled:
            criterion.enqueue(batch(1)[1], batch(1)[2] + 100)
        assert (criterion.memory_ids != -1).all() == filled
        loss = criterion(leaf, key, ids=ids)
        loss.backward()
        assert (loss.item() > 0) == filled and (leaf.grad.abs().max() > 1e-3) == filled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"size: expected an int in 1..2147483647, got 0"),
        ({"size": 1.5}, "size: expected an int"),
        ({"num_views": 2**64}, "num_views: expected an int of 64 bits, got 18446744073709551616"),
        ({"size": 2**31}, "size: expected an int in 1..2147483647, got 2147483648"),
        ({"self_positive": torch.tensor([0])}, "self_positive: expected one of 'keep'.* got torch.Tensor"),
        ({"views": [0]}, "views, keep: expected both"),
        ({"views": 0, "keep": [1]}, "views: expected a sequence"),
        ({"temperature": -1.0}, "temperature: expected a positive"),
        ({"temperature": "0.1"}, "temperature: expected a number"),
        ({"temperature": 1e-46}, "temperature: expected 1.2e-38 to"),
        ({"learn_temperature": "no"}, "learn_temperature: expected a bool, got 'no'"),
        ({"views": [1], "keep": [1]}, r"views: expected values in 0..0, got \[1\]"),
        ({"views": [-1], "keep": [1]}, "views: expected values in 0..0"),
        ({"views": [0, 0], "keep": [1]}, "views, keep: expected the same number"),
        ({"views": [], "keep": []}, "views, keep: expected the same number of entries, at least 1"),
        ({"views": [0, 0], "keep": [1, 2]}, "keep: expected non-increasing"),
        ({"same_id": "maybe"}, "same_id: expected one of .* got 'maybe'"),
        ({"self_positive": None}, "self_positive: expected one of"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        QueueLoss(**{"size": 12, "feature_dim": 16, **arguments})


def test_the_cascade_of_a_double_module_says_which_dtypes_it_takes():
    query, key, ids = batch(0)
    with pytest.raises(TypeError, match="memory: expected float32, .* got torch.float64; convert the module"):
        QueueLoss(12, 16, num_views=2, views=[1, 0], keep=[4, 2]).double()(query, key, ids)


@pytest.mark.parametrize("unknown", [None, torch.full((6,), -1)])
def test_keys_without_a_source_are_negatives_of_every_query(unknown):
    """They are neither taken for empty slots nor for clips of a source, such as number 0."""
    criterion = QueueLoss(12, 16, num_views=2)
    (query, key, _), (later, later_key, _) = batch(0), batch(1)
    criterion(query, key, unknown)
    assert (criterion.memory_ids[:6] != -1).all()
    expected = sum(mil_nce_ref(later[v], later_key[v], key[v]) for v in range(2)) / 2
    for ids in (torch.zeros(6, dtype=torch.int64), torch.full((6,), -1), None):
        torch.testing.assert_close(criterion.eval()(later, later_key, ids), expected)


def test_a_queue_that_no_memory_holds_is_named_with_its_size():
    with pytest.raises(
        MemoryError, match=r"size, feature_dim, num_views: out of memory .*\[1, 2147483647, 2147483647\]"
    ):
        QueueLoss(2**31 - 1, 2**31 - 1)
