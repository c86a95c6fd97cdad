"""The run folder: one writer, no overwritten files, resuming with the same settings, damaged checkpoints."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_runs import MODERN, Killed, assert_same, killed_at, rows, run, settings, stopped, trained
from support.stand_in_loader import RandomLoader

from cpr_fast.commands.training.pretrain import parse
from cpr_fast.config import RunConfig, load
from cpr_fast.config.recipes import resume_command
from cpr_fast.errors import InputError
from cpr_fast.pretrain.run.folder import only_writer
from cpr_fast.runtime.files import RUN_LOCK
from cpr_fast.weights.checkpoint import load_checkpoint, save_checkpoint
from cpr_fast.weights.reading import CheckpointError

ROOT = Path(__file__).parents[4]

pytestmark = pytest.mark.usefixtures("one_thread")


def killed_and_resumed(config, *death):
    """Trains until the run is killed at the epoch and step of `death`, continues it, and returns its folder."""
    with pytest.raises(Killed):
        run(config, killed_at(*death))
    run(config, resume=True)
    return Path(config.run.out)


def assert_same_run(straight, out):
    assert_same(trained(straight), trained(out))
    for kind in ("step", "epoch", "mined"):
        assert rows(straight, kind) == rows(out, kind)


# In the start-up fill, at the end of an epoch and of a cycle, while mining; with checkpoints at every step, every
# second one (so that some steps are done twice) and only at the ends of epochs.
@pytest.mark.parametrize(("every", "death"), [(1, (0, 1)), (0, (1, 0)), (2, (2, 0)), (2, (2, 2)), (1, (3, 2))])
def test_resume_equals_straight_through(finished, tmp_path, every, death):
    out = tmp_path / "run"
    killed_and_resumed(settings(out, run={"out": str(out), "checkpoint_every": every}), *death)
    assert_same_run(finished, out)
    (note,) = rows(out, "note")
    assert note["text"].startswith("resumed at step ")


def test_resume_after_the_end_does_nothing(finished, tmp_path):
    before = trained(finished)
    count = len(rows(finished, "step"))
    run(settings(finished), resume=True)
    assert_same(before, trained(finished))
    assert len(rows(finished, "step")) == count


def test_optimiser_of_the_published_baseline_resumes(tmp_path):
    straight = tmp_path / "straight"
    sections = {
        "optim": {"name": "sgd", "lr": 0.01},
        "loss": {"protocol": "coclr"},
        "memory": {"size": 10, "shuffle_bn_groups": 2},
    }
    run(settings(straight, **sections))
    out = killed_and_resumed(settings(tmp_path / "run", **sections), 3, 1)
    assert_same(trained(straight), trained(out))


@pytest.fixture(scope="module")
def modern(tmp_path_factory):
    return run(settings(tmp_path_factory.mktemp("modern"), **MODERN))


# In the middle of a warm-up and of a cosine, at the end of an epoch, while the queue fills, and in the second warm-up.
@pytest.mark.parametrize("death", [(0, 1), (1, 1), (2, 0), (2, 1), (3, 0), (3, 2)])
def test_resume_within_warm_ups_and_cosines_equals_straight_through(modern, tmp_path, death):
    out = tmp_path / "run"
    killed_and_resumed(settings(out, **MODERN | {"run": {"out": str(out), "checkpoint_every": 1}}), *death)
    assert_same_run(modern, out)


RGB, FLOW = {"view": "rgb", "epochs": 2, "mining": "none"}, {"view": "flow", "epochs": 2, "milestones": [1]}


@pytest.mark.parametrize(
    ("sections", "differs"),
    [
        ({"optim": {"lr": 0.5}}, "optim.lr: the run has 0.001, this command asks for 0.5."),
        ({"mining": {"anchor": "query"}}, 'mining.anchor: the run has no value, this command asks for "query".'),
        ({"data": {"batch_size": 3}}, "data.batch_size x processes: the run has 6, this command asks for 3."),
        ({"schedule": {"cycles": [RGB | {"epochs": 300}, FLOW | {"epochs": 300, "milestones": [150]}]}},
         "schedule: the run has 2 cycles of 2 epochs, this command asks for 300 epochs."),
        ({"optim": {"name": "adamw", "warmup_epochs": 0.5}}, 'optim.name: the run has "adam", this command asks for '
         '"adamw"; optim.warmup_epochs: the run has 0.0, this command asks for 0.5.'),
        ({"schedule": {"cycles": [RGB | {"epochs": 1, "warmup_epochs": 1}, FLOW]}},
         "schedule: the run has 2 cycles of 2 epochs, this command asks for 1 and 2 epochs."),
        ({"schedule": {"cycles": [RGB | {"epochs": 1}, FLOW]}},
         "schedule: the run has 2 cycles of 2 epochs, this command asks for 1 and 2 epochs."),
        ({"schedule": {"cycles": [RGB | {"epochs": 1}]}},
         "schedule: the run has 2 cycles of 2 epochs, this command asks for 1 cycle of 1 epoch."),
        ({"schedule": {"cycles": [RGB | {"lr": 0.1}, FLOW | {"milestones": []}]}},
         "schedule.cycles[0].lr (cycle 1): the run has no value, this command asks for 0.1; "
         "schedule.cycles[1].milestones (cycle 2): the run has [1], this command asks for []."),
    ],
)  # fmt: skip
def test_resuming_with_other_settings_says_which_and_what_to_type(finished, sections, differs):
    with pytest.raises(CheckpointError) as refused:
        run(settings(finished, **sections), resume=True)
    said = str(refused.value)
    assert f"the run in {str(finished)!r}: {differs} Repeat the" in said
    assert said.endswith(f"settings: cpr-fast pretrain {finished}/config.json --run.out {finished} --resume")
    assert "{" not in said and len(said.replace(str(finished), "RUN")) < 450


def test_of_many_other_settings_the_first_are_named(finished):
    optim = {"lr": 0.5, "weight_decay": 0.5, "name": "sgd"}
    sections = {"optim": optim, "mining": {"ratio": 0.3}, "memory": {"size": 9}, "loss": {"temperature": 0.5}}
    with pytest.raises(CheckpointError, match=r"memory.size: .*mining.ratio: .*; and 2 more\. Repeat the"):
        run(settings(finished, **sections), resume=True)


def test_the_command_that_is_named_continues_the_run(tmp_path, monkeypatch):
    """The folder was moved since, its name needs quotes, and the command is typed in another folder."""
    stopped(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "my run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        run(settings(Path("my run"), optim={"lr": 0.5}), resume=True)
    monkeypatch.chdir("/")
    said = re.search(r"settings: cpr-fast pretrain (.*)", str(refused.value))[1]
    given = parse(shlex.split(said))
    assert (given.config, given.flags) == (str(moved / "config.json"), {"--resume"})
    assert given.overrides == ["--run.out", str(moved)]
    run(dataclasses.replace(load(given.config), run=RunConfig(out=str(moved))), resume=True)


def test_the_command_that_is_named_starts_as_many_processes(finished):
    said = resume_command(finished, processes=2)
    assert said.startswith(f"torchrun --nproc-per-node 2 -m cpr_fast pretrain {finished}/config.json --run.out ")


def test_resuming_without_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = rf"run.out: expected the folder of a run to continue, but 'none' does not exist \(.*, '{tmp_path}'; a new"
    with pytest.raises(CheckpointError, match=said):
        run(settings(Path("none")), resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"last.pt' does not exist"):
        run(settings(tmp_path / "empty"), resume=True)


def test_a_folder_with_a_run_is_not_overwritten(finished):
    with pytest.raises(InputError, match=r"run.out: .* already holds a run \(checkpoints/last.pt\)"):
        run(settings(finished))


# ---- one writer ------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path):
    out = tmp_path / "run"
    with only_writer(out):
        (out / "metrics.jsonl").write_text("of the first\n")
        for resume in (False, True, "auto"):
            with pytest.raises(InputError, match=rf"another run is writing to '.*run' \(process {os.getpid()} on "):
                run(settings(out), resume=resume)
        assert sorted(path.name for path in out.iterdir()) == [RUN_LOCK, "metrics.jsonl"]
        assert (out / "metrics.jsonl").read_text() == "of the first\n"
    run(settings(out))


def test_the_lock_ends_with_its_process_however_it_ends(tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from cpr_fast.pretrain.run.folder import only_writer
with only_writer(Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"process {process.pid} on "), only_writer(tmp_path):
        pass
    process.kill()
    process.communicate()
    with only_writer(tmp_path):
        pass


REFUSED = {
    "model.init.rgb: ": {"model": {"init": {"rgb": "FILE"}}},
    "health.online_split: ": {"health": {"online_every": 1, "online_split": "none"}, "data": {"index": "INDEX"}},
    "run.out: .* does not exist|checkpoint .* does not exist": {},  # and resume
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("existing", [False, True])
def test_a_refused_run_leaves_no_folder_and_changes_none(tmp_path, message, existing):
    (tmp_path / "no.pt").write_text("no checkpoint")
    (tmp_path / "index.csv").write_text(
        "path,label,source,split,num_frames,fps,width,height,flow_path\nindex.csv,a,s,train,9,25,64,48,\n"
    )
    out = tmp_path / "results" / "run"
    if existing:
        (out / "empty").mkdir(parents=True)
        (out / "notes.txt").write_text("of the user\n")
    text = repr(REFUSED[message]).replace("FILE", f"{tmp_path}/no.pt").replace("INDEX", f"{tmp_path}/index.csv")
    with pytest.raises(InputError, match=message):
        run(settings(out, run={"tensorboard": True}, **ast.literal_eval(text)), resume=not REFUSED[message])
    if existing:
        assert sorted(path.name for path in out.iterdir()) == ["empty", "notes.txt"]
    else:
        assert not (tmp_path / "results").exists()


def test_a_refused_run_removes_no_file_of_others(tmp_path):
    """Another program may write to the folder meanwhile."""
    with pytest.raises(InputError), only_writer(tmp_path / "run"):
        (tmp_path / "run" / "other").mkdir()
        (tmp_path / "run" / "other" / "result.txt").write_text("of another program\n")
        raise InputError("refused")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["other", "result.txt"]


def test_one_clip_that_becomes_one_position_names_the_batch_size(tmp_path):
    """BatchNorm cannot average over a single value; torch's error names neither the setting nor what to do."""
    config = settings(
        tmp_path / "run", data={"batch_size": 1}, memory={"size": 2},
        schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"data.batch_size: .* expected 2 clips or more"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_an_input_error_after_the_first_step_keeps_the_run(tmp_path):
    class Broken(RandomLoader):
        def epoch(self, number, start_step=0):
            for i, batch in enumerate(super().epoch(number, start_step), start_step):
                if (number, i) == (0, 2):
                    raise InputError("could not write 'x': the disk is full")
                yield batch

    with pytest.raises(InputError, match="full"):
        run(settings(tmp_path / "run"), Broken)
    assert [row["step"] for row in rows(tmp_path / "run", "step")] == [0, 1]


# ---- which checkpoint ------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.glob("step-*.pt"))
    }


@pytest.mark.parametrize("resume", [True, "auto"])
def test_without_last_a_run_continues_from_its_newest_step(finished, tmp_path, resume):
    out = stopped(tmp_path / "run")
    checkpoints = out / "checkpoints"
    (checkpoints / "last.pt").unlink()
    with pytest.raises(InputError, match=r"already holds a run \(checkpoints/step-00000006.pt\)"):
        run(settings(out))
    run(settings(out), resume=resume)
    assert_same(trained(finished), trained(out))
    assert rows(finished, "step") == rows(out, "step")


def test_a_finished_run_without_last_stays_as_it_is(tmp_path):
    out = run(settings(tmp_path / "run"))
    checkpoints = out / "checkpoints"
    (checkpoints / "last.pt").unlink()
    before, log = contents(checkpoints), (out / "metrics.jsonl").read_text()
    run(settings(out), resume="auto")
    assert contents(checkpoints) == before
    assert (out / "metrics.jsonl").read_text().startswith(log)
    assert len(rows(out, "outcome")) == 1
    assert load_checkpoint(checkpoints / "last.pt")["step"] == 12


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_damaged_checkpoint_is_set_aside(finished, tmp_path, damage, caplog):
    out = stopped(tmp_path / "run")
    for name in ("last.pt", "step-00000006.pt"):
        path = out / "checkpoints" / name
        content = {"empty": b"", "truncated": path.read_bytes()[:5000], "text": b"not a checkpoint"}[damage]
        path.unlink()
        path.write_bytes(content)
    run(settings(out), resume=True)
    assert "continuing from step-00000003.pt, after step 3" in caplog.text
    kept = sorted(path.name for path in (out / "checkpoints").glob("*.damaged"))
    assert kept == ["last.pt.damaged", "step-00000006.pt.damaged"]
    assert_same(trained(finished), trained(out))
    assert rows(finished, "step") == rows(out, "step")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path):
    out = stopped(tmp_path / "run")
    for path in (out / "checkpoints").iterdir():
        path.unlink()
        path.write_bytes(b"")
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    for resume in (True, "auto"):
        with pytest.raises(CheckpointError, match=r"no checkpoint in '.*' can be read: last.pt is empty; step-"):
            run(settings(out), resume=resume)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names


def test_a_checkpoint_of_a_newer_version_is_not_passed_over(tmp_path):
    out = stopped(tmp_path / "run")
    last = out / "checkpoints" / "last.pt"
    last.unlink()
    save_checkpoint(last, {"version": 99})
    with pytest.raises(CheckpointError, match=r"has version 99; expected"):
        run(settings(out), resume="auto")
    assert last.exists()
