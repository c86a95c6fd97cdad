"""`cpr-fast verify`: a replay equals the run, names the first difference, and refuses what it cannot replay."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.small_runs import INDEX, run, settings
from support.stand_in_loader import RandomLoader, make_index

from cpr_fast.cli import main
from cpr_fast.errors import InputError
from cpr_fast.experiments import replay as module
from cpr_fast.experiments.difference import compare_runs
from cpr_fast.experiments.replay import replay
from cpr_fast.pretrain.ledger.chain import FILE, Ledger, LedgerError, read_ledger
from cpr_fast.runtime.interrupt import Stopped
from cpr_fast.weights.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def replayed(folder, loader=RandomLoader, **options):
    return replay(folder, videos=INDEX, make_loader=loader, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps, with checkpoints after steps 3, 6, 9 and 12, and one of the best after step 3."""
    out = tmp_path_factory.mktemp("verify") / "run"
    return run(settings(out, run={"out": str(out), "keep_checkpoints": 9}))


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run, which a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


def rewrite(folder, change):
    """Writes the ledger again with changed rows, in a chain that fits."""
    rows = [{name: value for name, value in row.items() if name != "chain"} for row in read_ledger(folder)]
    (folder / FILE).unlink()
    ledger = Ledger(folder)
    for row in rows:
        ledger.write(row | change(row))
    ledger.close()


@pytest.mark.parametrize(
    ("options", "checkpoint", "steps"),
    [
        ({}, "step-00000009.pt", (10, 12)),
        ({"first": 1}, None, (1, 12)),
        ({"first": 3}, None, (1, 12)),
        ({"first": 4, "steps": 5}, "step-00000003.pt", (4, 8)),
        ({"first": 9, "steps": 1}, "step-00000006.pt", (7, 9)),
    ],
    ids=["default", "start", "before the first checkpoint", "a number of steps", "within an epoch"],
)
def test_a_replay_equals_the_run_and_leaves_it_untouched(trained, options, checkpoint, steps):
    before = contents(trained)
    result = replayed(trained, **options)
    assert result["equal"] and result["difference"] is None and result["environment"] == {}
    assert (result["first_step"], result["last_step"]) == steps
    assert result["checkpoint"] == (checkpoint and str(trained / "checkpoints" / checkpoint))
    assert contents(trained) == before


class OtherPixel(RandomLoader):
    """One value of one clip of step 8 is off by its last bit."""

    def epoch(self, number, start_step=0):
        for i, batch in enumerate(super().epoch(number, start_step), start_step):
            if (number, i) == (2, 1):
                clip = batch.clips["flow"][3, 1]
                clip[0, 0, 4, 4] = torch.nextafter(clip[0, 0, 4, 4], torch.tensor(9.0))
            yield batch


class OtherPlan(RandomLoader):
    def epoch(self, number, start_step=0):
        for i, batch in enumerate(super().epoch(number, start_step), start_step):
            batch.plan[2] += (number, i) == (3, 0)
            yield batch


@pytest.mark.parametrize(("loader", "step", "fields"), [(OtherPixel, 8, ["features"]), (OtherPlan, 10, ["plan"])])
def test_the_first_difference_is_named_and_ends_the_replay(trained, loader, step, fields):
    found = replayed(trained, loader, first=7)
    difference = found["difference"]
    assert not found["equal"] and found["last_step"] == step
    assert (difference["step"], difference["fields"]) == (step, fields)
    assert (difference["cycle"], difference["epoch"]) == (2, 3 if step == 8 else 4)
    name = fields[0]
    assert difference["recorded"][name] != difference["replayed"][name]


@pytest.mark.parametrize(("field", "value"), [("mined", "0" * 16), ("loss", 1.25), ("weights", "f" * 16)])
def test_a_changed_row_whose_chain_was_computed_again_does_not_fit_the_checkpoint(copied, field, value):
    """Without the checkpoints' own copies of the chain, the replay finds the change."""
    rewrite(copied, lambda row: {field: value} if row["step"] == 8 and field in row else {})
    with pytest.raises(LedgerError, match="does not fit the checkpoint after step 9"):
        replayed(copied)
    with pytest.raises(LedgerError, match="does not fit the checkpoint after step 12"):
        replayed(copied, first=1)
    for path in (copied / "checkpoints").glob("step-*.pt"):
        save_checkpoint(path, load_checkpoint(path) | {"ledger": None})
    found = replayed(copied, first=7, steps=3)
    assert found["difference"]["fields"] == [field] and found["difference"]["step"] == 9


def test_weights_that_differ_are_named(copied):
    """The checkpoint after step 9 differs from what the run had: the features of step 10 do, too."""
    path = copied / "checkpoints" / "step-00000009.pt"
    saved = load_checkpoint(path)
    saved["encoders"]["flow"]["backbone.conv1.temporal_spatial_conv.weight"][0, 0, 0, 0, 0] += 1e-3
    save_checkpoint(path, saved)
    found = replayed(copied)
    assert found["difference"]["step"] == 10 and found["difference"]["fields"][0] == "features"


def test_a_missing_last_row_is_noticed(copied, trained):
    """The row of the weights after the last step. No step is missing."""
    lines = (copied / FILE).read_text().splitlines(keepends=True)
    (copied / FILE).write_text("".join(lines[:-1]))
    for check in (lambda: replayed(copied), lambda: replayed(copied, first=1, steps=2),
                  lambda: compare_runs(trained, copied), lambda: compare_runs(copied, trained)):  # fmt: skip
        with pytest.raises(LedgerError, match="does not fit the checkpoint after step 12"):
            check()


@pytest.mark.parametrize("part", ["query", "key"])
def test_other_weights_in_a_checkpoint_after_compared_steps_are_noticed(copied, capsys, monkeypatch, part):
    path = copied / "checkpoints" / "step-00000012.pt"
    saved = load_checkpoint(path)
    network = saved["encoders"]["flow"] if part == "query" else saved["cycle_state"]["key"]
    weight = next(value for name, value in network.items() if name.endswith("weight"))
    weight[-1].neg_()
    save_checkpoint(path, saved)
    result = replayed(copied)
    assert not result["equal"] and result["difference"] is None
    found = result["other_weights"]
    assert found["checkpoint"] == str(path) and found["step"] == 12
    assert found["recorded"] == read_ledger(copied)[-1]["weights"] != found["saved"]
    assert replayed(copied, steps=2)["equal"]  # its row is not compared
    monkeypatch.setattr(module, "replay", lambda folder, **options: result)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(copied)])
    assert ended.value.code == 1
    assert f"{path} holds other weights than the run had after step 12" in capsys.readouterr().out


def test_a_run_that_goes_on_while_it_is_verified(copied, monkeypatch):
    """Steps 10 to 12 and their checkpoint are written after the ledger was read, and the checkpoint that the replay
    starts from is removed."""
    lines, checkpoints = (copied / FILE).read_text().splitlines(keepends=True), copied / "checkpoints"
    later = checkpoints / "step-00000012.pt"
    hidden = later.rename(copied / "hidden")
    (copied / FILE).write_text("".join(lines[:12]))
    monkeypatch.setattr(module, "read_ledger", lambda folder: [read_ledger(folder), hidden.rename(later)][0])
    prepare = module._prepare

    def removed(out, folder, checkpoint):
        prepare(out, folder, checkpoint)
        checkpoint.unlink()

    monkeypatch.setattr(module, "_prepare", removed)
    result = replayed(copied)
    assert result["equal"] and (result["first_step"], result["last_step"]) == (7, 9)
    assert result["checkpoint"].endswith("step-00000006.pt")


def test_a_checkpoint_that_the_run_removes_before_it_is_linked(copied, monkeypatch):
    path = copied / "checkpoints" / "step-00000009.pt"
    monkeypatch.setattr(module, "_require_processes", lambda *checked: path.unlink())
    with pytest.raises(InputError, match=r"step-00000009.pt' was removed meanwhile by the run"):
        replayed(copied)


def continued_by_two(folder, step):
    """Notes that two processes computed the steps after `step`."""
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    config = load_checkpoint(folder / "checkpoints" / "step-00000009.pt")["config"]
    config["data"]["batch_size"] //= 2
    note = {"kind": "note", "text": f"resumed at step {step}", "processes": 2, "config": config}
    path.write_text("".join([*rows, json.dumps(note) + "\n"]))


def test_the_starts_of_a_run_are_read_from_their_field_and_in_older_runs_from_the_text(tmp_path):
    """A start removes those of later steps, which it repeats; notes of other things are no starts."""
    rows = [
        {"kind": "run", "processes": 1},
        {"kind": "note", "text": "resumed at step 4", "processes": 2},
        {"kind": "note", "text": "the learning rate was changed at step 5"},
        {"kind": "note", "text": "resumed at step 9", "processes": 3},
        {"kind": "note", "text": "continued", "resumed_step": 7, "processes": 4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(step, row["processes"]) for step, row in module._starts(tmp_path)] == [(0, 1), (4, 2), (7, 4)]


def test_a_replay_ends_where_another_number_of_processes_went_on(copied, capsys, monkeypatch):
    continued_by_two(copied, 6)
    result = replayed(copied, first=1)
    assert result["equal"] and (result["first_step"], result["last_step"]) == (1, 6)
    assert result["rest"] == {"step": 7, "processes": 2}
    assert replayed(copied, first=1, steps=6)["rest"] is None
    with pytest.raises(InputError, match=r"step 7 was computed by 2 processes, .* got 1. Run: torchrun .* --from 7"):
        replayed(copied, first=7)
    monkeypatch.setattr(module, "replay", lambda folder, **options: result)
    assert main(["verify", str(copied), "--from", "1"]) == 0
    said = "not replayed: the steps from 7 on, which 2 processes computed: torchrun --nproc-per-node 2 -m cpr_fast ver"
    assert said in capsys.readouterr().out


def test_steps_of_other_processes_whose_checkpoint_is_gone_are_refused(copied):
    continued_by_two(copied, 7)
    with pytest.raises(InputError, match=r"--from: step 8 was computed by 2 .* expected a step from 7 to 7, or one "):
        replayed(copied, first=8)
    assert replayed(copied, first=7)["last_step"] == 7


def test_a_damaged_config_is_named(copied):
    (copied / "config.json").write_text('{"run": ')
    with pytest.raises(InputError, match=r"config\.json"):
        replayed(copied, first=1)


def test_a_replay_writes_no_checkpoint(trained, monkeypatch):
    monkeypatch.setattr("cpr_fast.pretrain.run.loop.save_step", None)
    assert replayed(trained, first=4, steps=4)["equal"]


def test_the_best_checkpoint_is_used_where_no_other_is_left(copied):
    (copied / "checkpoints" / "step-00000003.pt").rename(copied / "checkpoints" / "best.pt")
    (copied / "checkpoints" / "step-00000006.pt").unlink()
    result = replayed(copied, first=5, steps=1)
    assert result["equal"] and result["checkpoint"] == str(copied / "checkpoints" / "best.pt")
    assert replayed(copied, first=2, steps=1)["checkpoint"] is None


def test_other_versions_and_devices_are_told(copied, monkeypatch):
    now = module.environment(torch.device("cpu"))
    monkeypatch.setattr(module, "environment", lambda device: now | {"device": "cpu (another)", "date": "now"})
    assert replayed(copied, steps=1)["environment"] == {"device": [now["device"], "cpu (another)"]}
    assert replayed(copied, first=1, steps=1)["environment"] == {"device": [now["device"], "cpu (another)"]}


def test_what_cannot_be_replayed_is_refused(copied):
    for first in (13, 0, -2):
        with pytest.raises(InputError, match=f"--from: expected a step from 1 to 12, the last .*, got {first}"):
            replayed(copied, first=first)
    with pytest.raises(InputError, match="was trained on 18 videos, got 16 videos"):
        replay(copied, videos=make_index(16), make_loader=RandomLoader)
    with pytest.raises(InputError, match="was trained on 18 videos, got 16 videos"):
        replay(copied, videos=make_index(16), make_loader=RandomLoader, first=1)
    path = copied / "checkpoints" / "step-00000009.pt"
    save_checkpoint(path, load_checkpoint(path) | {"processes": 2})
    with pytest.raises(
        InputError, match=r"by 2 processes, .* got 1. Run: torchrun --nproc-per-node 2 -m cpr_fast ver.* --from 10"
    ):
        replayed(copied)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"step-00000009.pt' (is|has|ends|was)"):
        replayed(copied)
    lines = (copied / FILE).read_text().splitlines(keepends=True)
    (copied / FILE).write_text("".join(lines[:-3]))
    with pytest.raises(
        LedgerError, match="cut off: it ends after 10 steps, but a checkpoint was written after 12 steps"
    ):
        replayed(copied, first=1)
    (copied / FILE).unlink()
    with pytest.raises(LedgerError, match="has no ledger.jsonl"):
        replayed(copied)


def test_a_run_that_the_settings_end_before_its_ledger(copied):
    """The ledger of a longer run."""
    shutil.rmtree(copied / "checkpoints")
    ledger = Ledger(copied)
    ledger.write({"step": 12, "epoch": 4, "cycle": 1, "plan": "0", "features": "0", "mined": None, "loss": 1.0})
    ledger.close()
    with pytest.raises(LedgerError, match="goes on after step 12, where the run ends"):
        replayed(copied, first=12)


def test_a_signal_ends_a_replay_without_a_trace(trained, tmp_path, monkeypatch):
    class Asking(RandomLoader):
        def epoch(self, number, start_step=0):
            for batch in super().epoch(number, start_step):
                yield batch
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(Stopped):
        replayed(trained, Asking)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_result_and_exits_with_it(trained, capsys, monkeypatch):
    def given(loader):
        monkeypatch.setattr(module, "replay", lambda folder, **options: replayed(folder, loader, **options))

    given(RandomLoader)
    assert main(["verify", str(trained)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        f"equal: steps 10 to 12 of {trained}, replayed from {trained}/checkpoints/step-00000009.pt\n"
    )
    given(OtherPixel)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(trained), "--from", "8"])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert f"different: steps 7 to 8 of {trained}" in said
    assert "first difference: step 8, in epoch 3 and cycle 2: the features" in said
    with pytest.raises(SystemExit):
        main(["verify", str(trained), "--from=8", "--json"])
    assert json.loads(capsys.readouterr().out)["difference"]["fields"] == ["features"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify"], "RUN"),
        (["verify", "{run}", "--from", "0"], "--from: expected 1 or more, got 0"),
        (["verify", "{run}", "--from", "x"], "--from: expected a whole number, got 'x'"),
        (["verify", "{run}", "--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["verify", "{run}", "--index", "none.csv"], "--index: expected a file"),
        (["verify", "{run}/checkpoints"], "did you mean"),
        (["diff", "{run}"], "RUNS: expected two run folders, got 1"),
        (["diff", "{run}", "{run}", "{run}"], "RUNS: expected two run folders, got 3"),
        (["diff", "{run}", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_of_the_commands_exits_with_2(trained, capsys, words, said):
    try:
        code = main([word.format(run=trained) for word in words])
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2 and said in captured.err + captured.out


def test_settings_that_write_or_measure_are_off(trained, monkeypatch):
    seen = []

    def stand_in(config, **options):
        seen.append(config)
        options["ledger"].done = len(options["ledger"].rows)

    monkeypatch.setattr(module, "pretrain", stand_in)
    recorded = load_checkpoint(trained / "checkpoints" / "step-00000009.pt")
    writes = dict.fromkeys(("tensorboard", "wandb", "trackio", "dump_memory"), True)
    changed = settings(trained, run={"out": str(trained), "checkpoint_every": 1, **writes})
    changed = dataclasses.replace(changed, health=dataclasses.replace(changed.health, online_every=1))
    monkeypatch.setattr(module, "load_checkpoint", lambda path: recorded | {"config": changed.to_dict()})
    replayed(trained)
    (config,) = seen
    assert not any(getattr(config.run, name) for name in (*writes, "checkpoint_every"))
    assert config.health.online_every == 0 and Path(config.run.out) != trained
