"""The outcome of a run: what was learnt, from the rows of its metrics, also of a run that was resumed."""

from __future__ import annotations

import dataclasses

import pytest
from support.small_runs import INDEX, Killed, killed_at, rows, run, settings
from support.stand_in_loader import RandomLoader

from cpr_fast.data.index.index import Index
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.run.outcome import comparable, outcome

pytestmark = pytest.mark.usefixtures("one_thread")

RGB = {"view": "rgb", "epochs": 2, "mining": "none"}


def of(tmp_path, index=INDEX, cycles=(RGB,), **sections) -> dict:
    config = settings(tmp_path / "run", schedule={"cycles": list(cycles)}, **sections)
    (row,) = rows(pretrain(config, index=index, make_loader=RandomLoader, progress=False), "outcome")
    return row


def test_the_outcome_agrees_with_the_epochs(tmp_path):
    """The weights changed in both cycles, but no loss is better than chance after 12 steps on random clips."""
    config = settings(tmp_path / "run")
    folder = run(config)
    (row,) = rows(folder, "outcome")
    epochs = rows(folder, "epoch")
    assert row["learnt"] is False and row["step"] == 12 and row["text"].startswith("This run has learnt nothing. ")
    assert all(cycle["loss_last"] > cycle["loss_chance"] for cycle in row["cycles"])
    assert [(cycle["trained"], cycle["learnt"]) for cycle in row["cycles"]] == 2 * [(True, False)]
    assert [cycle["learning_steps"] for cycle in row["cycles"]] == [6, 4]  # the cascade waits until its queue is full
    assert [epoch["random_negatives"] for epoch in epochs] == [1, 0, 0, 0]
    # The first epoch of InfoNCE began with random negatives, so that its loss is not compared with later ones.
    assert row["cycles"][0]["loss_first"] == row["cycles"][0]["loss_last"] == epochs[1]["loss"]
    assert [row["cycles"][1][f"loss_{at}"] for at in ("first", "last")] == [epochs[2]["loss"], epochs[3]["loss"]]
    assert row["cycles"][1]["pmr_last"] == epochs[3]["pmr"]
    losses = [epoch["loss"] for epoch in epochs]
    assert (
        f"better than chance: rgb (cycle 1) epoch loss {losses[1]:.3f} (chance 2.398; only one epoch can be judged)"
        in row["text"]
    )
    assert f"flow (cycle 2) epoch loss {losses[2]:.3f} to {losses[3]:.3f} (chance " in row["text"]
    assert all(epoch["weights_change"] > 0 for epoch in epochs)


def test_losses_of_other_numbers_of_positives_are_not_compared():
    """A cascade that is chosen in training mined five positives in the first two epochs, then one."""
    rows = [{"loss": loss, "loss_chance": chance} for loss, chance in ((1.0, 2.0), (0.9, 2.0), (2.5, 3.5), (2.4, 3.5))]
    assert comparable(rows) == rows[2:]
    assert comparable([{"loss": None, "loss_chance": 2.0}, *rows[:2]]) == rows[:2]
    assert comparable([{"loss": 1.0}, {"loss": 0.5}]) == [{"loss": 1.0}, {"loss": 0.5}]  # of older versions
    assert comparable([{"loss": None}]) == []


def test_a_resumed_run_has_the_same_outcome(tmp_path):
    straight = run(settings(tmp_path / "straight"))
    with pytest.raises(Killed):
        run(settings(tmp_path / "run"), killed_at(2, 1))
    assert rows(tmp_path / "run", "outcome") == []
    folder = run(settings(tmp_path / "run"), resume=True)
    assert rows(folder, "outcome") == rows(straight, "outcome")
    run(settings(tmp_path / "run"), resume=True)  # no steps remain
    assert rows(folder, "outcome") == rows(straight, "outcome")


def test_a_memory_that_is_never_full(tmp_path):
    row = of(tmp_path, cycles=[RGB | {"mining": "cascade"}], memory={"size": 60})
    assert row["learnt"] is False and row["text"].startswith("This run has learnt nothing")
    assert any("the queue was never full" in text and "memory.size is 60" in text for text in row["warnings"])
    assert row["cycles"][0]["learning_steps"] == 0


@pytest.mark.parametrize("mining", ["none", "label"])
def test_a_memory_that_is_never_full_does_not_keep_other_methods_from_learning(tmp_path, mining):
    """18 of 60 entries are keys at the start of the second epoch; a loss that rises meanwhile is no reason to doubt."""
    row = of(tmp_path, cycles=[RGB | {"mining": mining, "epochs": 3}], memory={"size": 60})
    assert row["cycles"][0]["trained"] and row["cycles"][0]["learning_steps"] == 9
    assert not row["cycles"][0]["learnt"]  # random vectors make the loss too low, so it shows nothing
    assert not any("did not fall" in text or "learnt nothing" in text for text in row["warnings"])
    epochs = rows(tmp_path / "run", "epoch")
    assert [epoch["random_negatives"] for epoch in epochs] == pytest.approx([1, 42 / 60, 24 / 60])


def test_one_cycle_of_two(tmp_path):
    row = of(tmp_path, cycles=[RGB, RGB | {"epochs": 1, "mining": "cascade"}], memory={"size": 18})
    assert [cycle["trained"] for cycle in row["cycles"]] == [True, False]
    assert row["text"].endswith("No step changed the weights by a loss: rgb (cycle 2).")


@pytest.mark.parametrize("optim", [{"lr": 1e-30}, {"name": "sgd", "lr": 1e-30}])
def test_a_rate_too_small_to_move_a_weight(tmp_path, optim):
    row = of(tmp_path, optim=optim)
    assert row["learnt"] is False
    assert any("no weight changed: the learning rate is too small" in text for text in row["warnings"])


def test_a_loss_that_is_zero(tmp_path):
    """With one label for all videos every key is a positive; only the random vectors of the first epoch are not. Adam's
    weight decay still changes the weights."""
    index = Index([dataclasses.replace(video, label="same") for video in INDEX])
    row = of(tmp_path, index=index, cycles=[RGB | {"mining": "label"}])
    assert row["learnt"] is False
    assert any("the loss was 0" in text for text in row["warnings"])


def test_a_cascade_that_mines_nothing(tmp_path):
    index = Index([dataclasses.replace(video, source="one") for video in INDEX])
    row = of(tmp_path, index=index, cycles=[RGB | {"mining": "cascade"}])
    assert any("the cascade mined nothing" in text for text in row["warnings"])


def test_features_that_collapsed(tmp_path):
    row = of(tmp_path, health={"min_feature_std": 1.5})
    assert any("the features have collapsed" in text for text in row["warnings"])


def test_videos_that_could_not_be_read(tmp_path):
    class Skipping(RandomLoader):
        skipped = tuple((f"/{i}", "is empty") for i in range(6))

    config = settings(tmp_path / "run", schedule={"cycles": [RGB]})
    (row,) = rows(run(config, Skipping), "outcome")
    assert "6 of 18 videos could not be read and were replaced by others" in row["warnings"]


def test_rows_of_an_older_version():
    """Old metrics do not record whether weights changed; then a loss is enough."""
    old = [{"kind": "epoch", "cycle": 0, "epoch": e, "loss": loss, "pmr": None} for e, loss in enumerate([3.0, 2.0])]
    row = outcome(old, settings("run", schedule={"cycles": [RGB]}), 6, 18, [])
    assert row["learnt"] is True and row["cycles"][0]["learning_steps"] is None
    rising = [{**epoch, "epoch": e, "loss": 2.0 + e} for e, epoch in enumerate([*old, *old])]
    row = outcome(rising, settings("run", schedule={"cycles": [RGB]}), 6, 18, [])
    assert row["warnings"] == ["cycle 1 (rgb, mining none): the loss did not fall"]
    assert "epoch loss 2.000 to 5.000 (it did not fall)" in row["text"]


def test_a_doubt_is_told_once_with_the_cycles_and_figures_it_concerns():
    cycles = [RGB, {"view": "flow", "epochs": 2}, RGB, {"view": "flow", "epochs": 2}, RGB]
    losses = [[None], [2.0, 2.5, 3.0], [1.0, 0.98, 1.125], [3.0, 2.0, 1.0], [None]]
    rows = [{"kind": "epoch", "cycle": cycle, "epoch": e, "loss": loss, "pmr": None}
            for cycle, of_cycle in enumerate(losses) for e, loss in enumerate(of_cycle)]  # fmt: skip
    rows += [{"kind": "health", "cycle": cycle, "feature_std": {"rgb": 0.01, "flow": spread}}
             for cycle, spread in ((1, 0.5), (3, 0.02))]  # fmt: skip
    found = outcome(rows, settings("run", schedule={"cycles": cycles}), 6, 18, [])["warnings"]
    assert found == [
        "cycles 1 and 5 learnt nothing: the queue was never full, so that no step was trained; memory.size is 10",
        "cycle 2 (flow, mining cascade): the loss did not fall",
        "cycles 2 and 4: the features have collapsed: the queries spread less than health.min_feature_std 0.1 "
        "(cycle 2: rgb 0.01; cycle 4: rgb 0.01, flow 0.02)",
        "cycle 3 (rgb, mining none): the loss hardly fell",
    ]


@pytest.mark.parametrize(("last", "below"), [(2.2, True), (4.5, False)])
def test_a_loss_that_rose_but_is_below_chance_is_no_proof(last, below):
    """The older keys of a network that changes fast are easy negatives, so the loss of the first epochs is low."""
    rows = [{"kind": "epoch", "cycle": 0, "epoch": e, "loss": loss, "pmr": None, "loss_chance": 4.29}
            for e, loss in enumerate([2.0, 2.1, last])]  # fmt: skip
    text = outcome(rows, settings("run", schedule={"cycles": [RGB]}), 6, 18, [])["warnings"]
    assert "the loss did not fall" in text[0] and (", but it is better than chance; " in text[0]) == below
    assert any("is not better than chance" in sentence for sentence in text) != below


@pytest.mark.parametrize(
    ("losses", "learnt"),
    [
        ([3.99, 3.57, 3.21, 2.9, 3.04, 3.85, 4.44, 4.58], True),  # of the quick start's flow; its learning rate fell
        ([4.0, 3.9, 4.1], None),  # a fall of less than 3 % may be noise
        ([4.0, 3.87, 4.1], True),
        ([6.256, 6.264, 6.251, 6.185, 6.125, 6.212], None),  # of a run with a learning rate of 1e-9
        ([4.0, 4.0, 4.0], None),
        ([3.0, 3.5, 4.0], None),  # it only rose
        ([3.99, 2.9, 4.6, 6.5], False),  # a collapse
    ],
)
def test_a_loss_that_fell_clearly_may_rise_when_the_learning_rate_falls(losses, learnt):
    """Then the network changes less, and the old keys are no longer easy negatives."""
    rows = [{"kind": "epoch", "cycle": 0, "epoch": e, "loss": loss, "pmr": None, "loss_chance": 6.24}
            for e, loss in enumerate(losses)]  # fmt: skip
    row = outcome(rows, settings("run", schedule={"cycles": [RGB]}), 6, 18, [])
    assert row["learnt"] is learnt
    assert bool(row["warnings"]) == (learnt is not True)
    assert any("the loss did not fall" in text or "hardly fell" in text for text in row["warnings"]) == (learnt is None)
    assert ("(chance 6.240; lowest " in row["text"]) == (min(losses) <= 0.97 * losses[0])


@pytest.mark.parametrize(("first", "init", "shared", "doubted"), [
    ([3.0, 2.0, 1.5], {}, False, []), ([4.6, 4.7, 4.8], {}, False, [1, 2]),
    ([4.6, 4.7, 4.8], {"rgb": "a.pt"}, False, [1]),
    ([3.0, 2.0, 1.5], {}, True, []), ([None], {"flow": "a.pt"}, False, [2]), ([None], {"flow": "a.pt"}, True, []),
])  # fmt: skip
def test_a_cycle_that_continues_a_trained_encoder_need_not_lower_its_loss(first, init, shared, doubted):
    """If it stays better than chance; a first cycle that learnt nothing has not trained the encoder."""
    cycles = [RGB, RGB]
    rows = [{"kind": "epoch", "cycle": cycle, "epoch": e, "loss": loss, "pmr": None, "loss_chance": 4.5}
            for cycle, losses in enumerate([first, [3.4, 3.45, 3.42]]) for e, loss in enumerate(losses)]  # fmt: skip
    memory = {"kind": "bank" if shared else "queue"}
    config = settings("run", schedule={"cycles": cycles}, model={"init": init, "shared": shared}, memory=memory)
    row = outcome(rows, config, 6, 18, [])
    texts = [text.partition(" (rgb")[0] for text in row["warnings"] if "did not fall" in text]
    assert [number for number in (1, 2) if any(str(number) in text for text in texts)] == doubted, row["warnings"]
    assert row["cycles"][1]["learnt"] is None  # this cycle itself is not decided


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("last", "doubted"), [(3.4, False), (4.5, True), (4.6, True)])
def test_a_last_loss_that_is_not_below_chance_is_doubted_whatever_the_number_of_epochs(tmp_path, count, last, doubted):
    """Also with one epoch per cycle, which is too few to tell whether the loss falls."""
    config = settings(tmp_path, schedule={"cycles": [{"view": "rgb", "epochs": count, "mining": "none"}]})
    epochs = [
        {"kind": "epoch", "cycle": 0, "epoch": epoch, "loss": loss, "loss_chance": 4.5, "weights_change": 0.1}
        for epoch, loss in enumerate((5.0, 4.8, last)[-count:])
    ]
    row = outcome(epochs, config, 9, 18, [])
    said = "the loss of the last epoch is not better than chance, its value if all candidates are equally similar"
    assert (said in str(row["warnings"])) == doubted
    head = "This run has learnt nothing. The loss is not better than chance: rgb (cycle 1) epoch loss "
    assert row["text"].startswith(head) == doubted == (row["learnt"] is False)
    if count == 1:
        assert row["text"].endswith(
            f"rgb (cycle 1) epoch loss {last:.3f} (chance 4.500; only one epoch can be judged)."
        )
    else:
        assert row["text"].endswith(f" to {last:.3f} (chance 4.500).")
        assert doubted or (row["learnt"] and row["text"].startswith("The loss fell and is better than chance: rgb"))


def test_a_cycle_that_is_worse_than_before_or_than_chance_is_no_success():
    """Whatever the other cycles did: neither in the row nor in its text."""
    cycles = [RGB, {"view": "flow", "epochs": 2}, RGB, {"view": "flow", "epochs": 2}]
    losses = [[4.0, 3.0], [5.0, 4.8], [3.0, 3.5], [3.0, 2.0]]
    rows = [{"kind": "epoch", "cycle": cycle, "epoch": e, "loss": loss, "pmr": None, "loss_chance": 4.5}
            for cycle, of_cycle in enumerate(losses) for e, loss in enumerate(of_cycle)]  # fmt: skip
    row = outcome(rows, settings("run", schedule={"cycles": cycles}), 6, 18, [])
    assert row["learnt"] is None and [cycle["learnt"] for cycle in row["cycles"]] == [True, False, None, True]
    assert row["text"] == (
        "The loss fell and is better than chance: rgb (cycle 1) epoch loss 4.000 to 3.000 (chance 4.500); flow (cycle "
        "4) epoch loss 3.000 to 2.000 (chance 4.500). It is not certain whether this learnt: rgb (cycle 3) epoch loss "
        "3.000 to 3.500 (chance 4.500; it did not fall). The loss is not better than chance: flow (cycle 2) epoch "
        "loss 5.000 to 4.800 "
        "(chance 4.500)."
    )


@pytest.mark.parametrize(
    ("pmr", "chance", "queries", "doubted"),
    [(0.0, 0.1, 6, False), (0.1, 0.1, 12, False), (0.1, 0.1, 100, True), (0.0, 0.1, 40, True), (0.12, 0.1, 9999, False),
     (0.5, 0.5, 6, False), (0.5, 0.5, 40, True), (0.2, 0.5, 6, True), (0.05, 0.1, 0, False)],
)  # fmt: skip
def test_positives_at_chance_are_doubted_only_if_enough_queries_mined(pmr, chance, queries, doubted):
    """Enough to exclude that PMR is twice chance, or half-way from chance to 1."""
    row = {"kind": "epoch", "cycle": 0, "pmr": pmr, "pmr_chance": chance, "loss_chance": 4.5,
           "right_counts": [queries - queries // 2, queries // 2]}  # fmt: skip
    rows = [row | {"epoch": epoch, "loss": 4.0 - epoch} for epoch in range(2)]
    config = settings("run", schedule={"cycles": [RGB | {"mining": "cascade"}]})
    found = outcome(rows, config, 6, 18, [])
    said = [text for text in found["warnings"] if "the mined positives were not better than chance" in text]
    assert bool(said) == doubted and found["learnt"] == (None if doubted else True)
    assert all(f"chance {100 * chance:.1f} %; {queries} queries mined" in text for text in said)
    assert not outcome(rows, config, 6, 18, [], judged=False)["warnings"]


def test_a_loss_against_random_vectors_is_told_to_be_low(tmp_path):
    row = of(tmp_path, cycles=[RGB | {"epochs": 1}, RGB | {"view": "flow", "mining": "cascade", "epochs": 1}])
    loss, pmr = (row["cycles"][i][key] for i, key in ((0, "loss_last"), (1, "pmr_last")))
    assert row["text"].startswith(
        f"It is not certain whether this learnt: rgb (cycle 1) epoch loss {loss:.3f} (chance 2.398; only one epoch can "
        "be judged; low, because the queue"
    )
    assert row["text"].endswith(f"; only one epoch can be judged), PMR {100 * pmr:.1f} %.")
