"""`cpr-fast ray`: shards as tasks of a Ray cluster. What the shards write is what the command alone writes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.data_sets.empty_videos import adopted, write_empty_videos
from support.data_sets.flow import write_video

import cpr_fast
from cpr_fast.cli import main
from cpr_fast.commands.data import ray as ray_command
from cpr_fast.commands.data.ray import ShardError, parse_and_run, run_call
from cpr_fast.data.index.index import Index, Video
from cpr_fast.errors import FailedError

ROOT = Path(cpr_fast.__file__).resolve().parents[1]


@pytest.fixture
def videos(tmp_path):
    for number, name in enumerate("abcdef"):
        write_video(tmp_path / "set" / "train" / "AB"[number % 2] / f"{name}.mkv", 12, width=64)
    assert main(["index", str(tmp_path / "set"), "--out", str(tmp_path / "index.csv")]) == 0
    return tmp_path


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two machines with one CPU each, which all tests of the module use."""
    pytest.importorskip("ray", reason="needs the package ray")
    from ray.cluster_utils import Cluster

    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path["PYTHONPATH"])
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        yield made.address
        made.shutdown()


def start(folder: Path, *words: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-m", "cpr_fast", "ray", *words], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def ran(folder: Path, *words: str) -> tuple[int, str, str]:
    process = start(folder, *words)
    output, errors = process.communicate(timeout=500)
    return process.returncode, output, errors


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_flow_of_two_machines_is_that_of_one_command(videos, cluster):
    assert main(["flow", str(videos / "index.csv"), "--out", str(videos / "alone")]) == 0
    expected = {path.relative_to(videos / "alone"): path.read_bytes() for path in (videos / "alone").rglob("*.mp4")}
    assert len(expected) == 6
    assert main(["index", str(videos / "set"), "--out", str(videos / "other.csv")]) == 0
    code, output, errors = ran(videos, "--address", cluster, "--shards", "3", "flow", "other.csv", "--out", "flow",
                               "--json")  # fmt: skip
    assert code == 0, errors
    assert all(f"Shard {shard}/3 ended on " in errors for shard in range(3))
    found = {path.relative_to(videos / "flow"): path.read_bytes() for path in (videos / "flow").rglob("*.mp4")}
    assert found == expected
    assert json.loads(output)["without_flow"] == 0 and json.loads(output)["written"] == 0
    assert all(row["flow_path"] for row in rows(videos / "other.csv"))
    before = {path: path.stat().st_mtime_ns for path in (videos / "flow").rglob("*.mp4")}
    code, output, _ = ran(videos, "--address", cluster, "flow", "other.csv", "--out", "flow", "--json")
    assert code == 0 and json.loads(output)["kept"] == 6  # the default is a shard for each machine
    assert {path: path.stat().st_mtime_ns for path in (videos / "flow").rglob("*.mp4")} == before


@pytest.mark.slow
def test_an_index_of_shards_is_that_of_one_command(videos, cluster):
    code, output, errors = ran(videos, "--address", cluster, "--shards", "2", "index", "set", "--out", "shards.csv")
    assert code == 0, errors
    assert rows(videos / "shards.csv") == rows(videos / "index.csv")
    assert output.startswith("shards.csv: 6 videos, 2 classes")


@pytest.mark.slow
def test_the_store_of_two_machines_is_that_of_one_command(videos, cluster):
    """260 videos are two shards of a store, of which each machine computes one."""
    facts = {Path(row["path"]).stem: row for row in rows(videos / "index.csv")}
    (videos / "links").mkdir()
    listed = []
    for number in range(260):
        fact = facts["abcdef"[number % 6]]
        link = videos / "links" / f"v{number:03}.mkv"
        link.symlink_to(videos / fact["path"])
        listed.append(Video(link, fact["label"], link.stem, "train", 12, float(fact["fps"]), 64, int(fact["height"])))
    Index(listed).save(videos / "many.csv")
    (videos / "clips.toml").write_text(
        '[data]\nframes = 8\nsize = 16\nstride = 1\n[model]\narch = "r3d"\nwidth = 0.0625\n'
    )
    words = ("embed", "many.csv", "--encoder", "clips.toml", "--samples", "1", "--device", "cpu", "--out")
    command = [sys.executable, "-m", "cpr_fast", *words, "alone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    alone = subprocess.run(command, cwd=videos, capture_output=True, text=True, env=environment)
    assert alone.returncode == 0, alone.stderr
    code, _, errors = ran(videos, "--address", cluster, "--shards", "2", *words, "shards")
    assert code == 0, errors
    assert all(f"Shard {shard}/2 ended on " in errors for shard in range(2))
    expected = {path.name: path.read_bytes() for path in (videos / "alone").iterdir()}
    assert {path.name: path.read_bytes() for path in (videos / "shards").iterdir()} == expected
    assert sum(name.endswith(".safetensors") for name in expected) >= 2


@pytest.mark.slow
def test_the_near_duplicates_of_two_machines_are_those_of_one_command(tmp_path, cluster):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, 16)).astype("float32").repeat(3, 0)  # three copies of each
    names = [f"v{number}" for number in range(len(features))]
    write_empty_videos(tmp_path, [(f"videos/{name}.mp4", "run", name) for name in names])
    adopted(tmp_path, names, rgb=features)
    words = ("dedup", "index.csv", "--features", "store", "--neighbours", "4", "--json", "--out")
    alone = subprocess.run([sys.executable, "-m", "cpr_fast", *words, "alone.csv"], cwd=tmp_path, capture_output=True,
                           text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    code, output, errors = ran(tmp_path, "--address", cluster, "--shards", "3", *words, "shards.csv")
    assert code == 0, errors
    assert all(f"Shard {shard}/3 ended on " in errors for shard in range(3))
    assert json.loads(output)["duplicate"] == json.loads(alone.stdout)["duplicate"]
    assert json.loads(output)["duplicate"] == {"threshold": 0.95, "groups": 60, "clips": 180, "largest": 3}
    for name in (".csv", "-groups.csv", "-graph.safetensors"):
        assert (tmp_path / f"shards{name}").read_bytes() == (tmp_path / f"alone{name}").read_bytes()
    assert not list(tmp_path.glob("*-of-*")) and json.loads(output)["sources"] == 60


@pytest.mark.slow
def test_bad_input_of_a_shard_ends_the_command_once_and_at_once(videos, cluster):
    (videos / "empty.csv").write_text("path,label\n")
    code, output, errors = ran(videos, "--address", cluster, "--shards", "4", "flow", "empty.csv", "--out", "flow")
    assert code == 2 and not output
    assert "on " in errors.splitlines()[-1] and "empty.csv" in errors.splitlines()[-1]
    code, _, errors = ran(videos, "--address", cluster, "--cpus", "2", "flow", "index.csv", "--out", "flow")
    assert code == 2 and "no machine of the cluster has 2 CPUs" in errors


@pytest.mark.slow
def test_a_stopped_command_stops_its_shards_and_continues(videos, cluster):
    process = start(videos, "--address", cluster, "--shards", "2", "flow", "index.csv", "--out", "flow")
    deadline = time.monotonic() + 300
    while not list((videos / "flow").rglob("*.mp4")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=300)[1]
    if process.returncode == 0:  # it had finished before
        pytest.skip("the shards ended before the signal came")
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "what was finished is kept; to continue: cd " in errors and "cpr-fast ray --address" in errors
    kept = {path: path.stat().st_mtime_ns for path in (videos / "flow").rglob("*.mp4")}
    code, output, errors = ran(videos, "--address", cluster, "flow", "index.csv", "--out", "flow", "--json")
    assert code == 0, errors
    assert json.loads(output)["without_flow"] == 0
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


def shard(folder: Path, *words: str, version: str = cpr_fast.__version__):
    return run_call([*words, "--shard", "0/2"], 1, str(folder), version)


def test_what_a_shard_says_comes_back(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ended = shard(videos, "index", "set", "--out", "other.csv")
    assert ended.code == 0 and ended.errors.count("\n") < 20
    ended = shard(videos, "flow", "nothing.csv", "--out", "flow")
    assert ended.code == 2 and ended.errors == "cpr-fast: INDEX: expected a file, but 'nothing.csv' does not exist"
    ended = shard(videos, "flow")
    assert ended.code == 2 and "index" in ended.errors.lower()  # several lines in a frame
    ended = shard(tmp_path / "elsewhere", "flow", "index.csv")
    assert ended.code == 2 and "elsewhere" in ended.errors and "on every machine" in ended.errors
    ended = shard(videos, "flow", "index.csv", version="0.0.1")
    assert ended.code == 2 and "expected cpr_fast 0.0.1" in ended.errors


def test_shards_do_not_wait_without_end_for_a_cluster_that_has_lost_its_machines(monkeypatch):
    """A stand-in for Ray, whose machines go and of which one comes back once; tasks stay pending then."""
    machine = {"Alive": True, "Resources": {"CPU": 2.0}}
    states, looked, cancelled = [[machine], [], [], [machine]], [], []

    def nodes() -> list[dict]:
        looked.append(time.monotonic())
        return states[len(looked) - 1] if len(looked) <= len(states) else [machine | {"Alive": False}]

    task = SimpleNamespace(remote=lambda *_: "pending")
    stand_in = SimpleNamespace(remote=lambda **_: lambda _: task, nodes=nodes, cancel=cancelled.append,
                               wait=lambda waiting, **_: ([], waiting))  # fmt: skip
    for name, seconds in (("LOOK_S", 0.01), ("LOST_S", 0.2), ("POLL_S", 0.02)):
        monkeypatch.setattr(ray_command, name, seconds)
    options = SimpleNamespace(cpus=2, gpus=0.0, retries=0)
    with pytest.raises(
        FailedError, match="no machine of the cluster has had 2 CPUs and 0 GPUs for .*computes the rest"
    ):
        ray_command._run(stand_in, {"shard 0/1": ["flow"]}, options)
    assert len(looked) > len(states) + 2 and looked[-1] - looked[3] > 0.15 and cancelled == ["pending"]


def test_a_shard_that_fails_can_be_run_again(videos, monkeypatch):
    """A failure is an exception, which Ray answers with another try; bad input is a result."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (videos / "cpr_fast").mkdir()
    (videos / "cpr_fast" / "__init__.py").write_text("raise RuntimeError('no memory for this')")  # found first
    with pytest.raises(ShardError, match=r"exit code 1: (?s:.*)no memory for this"):
        shard(videos, "flow", "index.csv", "--out", "flow")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train x", "COMMAND: expected one of index, flow, embed, dedup"),
        ("--shards 0 flow x", "--shards: expected a whole number of at least 1, got '0'"),
        ("--cpus two flow x", "--cpus: expected a whole number of at least 1, got 'two'"),
        ("--retries -1 flow x", "--retries"),
        ("--gpus 1.5 flow x", "--gpus: expected a whole number or a part of one GPU, got '1.5'"),
        ("--shard 0/2 flow x", "--shard"),
        ("--shards 2", "COMMAND"),
        ("flow nothing.csv --out f", "INDEX: expected a file, but 'nothing.csv' does not exist"),
    ],
)
def test_bad_options_are_named_before_a_cluster_is_looked_for(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ray", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_shard_option_of_the_command_and_a_missing_ray_are_named(videos, capsys, monkeypatch):
    monkeypatch.chdir(videos)
    assert main(["ray", "flow", "index.csv", "--out", "f", "--shard", "0/2"]) == 2
    assert "expected --shards N before COMMAND" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["ray", "flow", "index.csv", "--out", "f"]) == 2
    assert "pip install 'ray>=2.9'" in capsys.readouterr().err


class Rays:
    """In place of the package ray: calls tasks at once, in this process, and notes the addresses it is given."""

    class exceptions:
        RayError = RuntimeError

    def __init__(self) -> None:
        self.addresses, self.gpus = [], []

    def init(self, address: str | None, **_) -> None:
        self.addresses.append(address)

    def shutdown(self) -> None:
        pass

    def remote(self, *, num_gpus: float, **_):
        self.gpus.append(num_gpus)
        return lambda call: SimpleNamespace(remote=lambda *given: Result(call(*given)))

    def wait(self, waiting, **_):
        return waiting[:1], waiting[1:]

    def get(self, ready):
        return ready.ended


class Result:
    def __init__(self, ended) -> None:
        self.ended = ended


@pytest.mark.parametrize(("given", "set_to", "used"), [([], "", "local"), ([], "head:1", "head:1"),
                                                       (["--address", "other:2"], "head:1", "other:2")])  # fmt: skip
def test_the_cluster_and_the_devices_that_are_used(videos, monkeypatch, capfd, given, set_to, used):
    """Without an address Ray itself would join a cluster that runs on this machine. The call that joins what the shards
    have written has their GPUs, because stores of another kind of device are refused."""
    rays = Rays()
    monkeypatch.setitem(sys.modules, "ray", rays)
    monkeypatch.setenv("RAY_ADDRESS", set_to)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(videos)
    parse_and_run([*given, "--shards", "1", "--gpus", "0.5", "index", "set", "--out", "rays.csv"])
    assert rays.addresses == [used] and rays.gpus == [0.5, 0.5]
    assert capfd.readouterr().out.startswith("rays.csv: 6 videos, 2 classes")
    assert rows(videos / "rays.csv") == rows(videos / "index.csv")
