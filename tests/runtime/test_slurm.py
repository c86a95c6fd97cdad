"""The job scripts in examples/slurm, run with scripts in place of SLURM's commands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from support.small_runs import wait_for_step

from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "slurm"

COMMANDS = {
    # runs the step in its own process session, so that scancel reaches all of its processes
    "srun": 'echo "$*" >> srun.log; setsid "$@" & echo $! > step.pid; wait $!',
    "scancel": '[ "$*" = "--signal=TERM 7.0" ] && pkill -TERM -s "$(cat step.pid)"',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$*" >> scontrol.log',
    "cpr-fast": f'exec {sys.executable} -m cpr_fast "$@"',
}


@pytest.fixture
def cluster(tmp_path):
    """Returns a folder with the commands of a cluster, and the environment of a job."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{script}\n")
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}
    return tmp_path, os.environ | variables


@pytest.mark.slow
def test_a_job_that_is_out_of_time_saves_goes_back_to_the_queue_and_goes_on(cluster):
    folder, environment = cluster
    index = write_synthetic(folder / "set", classes=4, videos=6, frames=8, width=64, height=48)
    (folder / "config.toml").write_text("""
data = { frames = 8, size = 32, batch_size = 4 }
model = { width = 0.125 }
memory = { size = 8 }
schedule = { cycles = [{ view = "rgb", epochs = 12, mining = "none" }] }
""")
    environment |= {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2",
                    "RENDEZVOUS_PORT": "0"}  # fmt: skip
    command = ["bash", str(SCRIPTS / "pretrain.sbatch"), "config.toml", "--data.index", str(index)]
    command += ["--run.out", "run", "--run.device", "cpu"]

    def job() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)

    first = job()
    wait_for_step(folder / "run", 2, first)
    first.send_signal(signal.SIGUSR1)
    errors = first.communicate(timeout=300)[1]
    saved = load_checkpoint(folder / "run" / "checkpoints" / "last.pt")["step"]
    assert 3 <= saved < 36, errors
    assert f"stopped by SIGTERM after step {saved}; saved" in errors
    assert first.returncode != 0
    assert (folder / "scontrol.log").read_text() == "requeue 7\n"

    second = job()
    errors = second.communicate(timeout=300)[1]
    assert second.returncode == 0, errors
    rows = read_metrics(folder / "run")
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(36))
    assert f"resumed at step {saved}" in [row.get("text") for row in rows]
    assert (folder / "scontrol.log").read_text() == "requeue 7\n"  # not again
    assert "--nnodes 1 --nproc-per-node 2 --rdzv-backend c10d" in (folder / "srun.log").read_text()


def test_a_job_that_fails_does_not_come_again(cluster):
    folder, environment = cluster
    environment |= {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1",
                    "RENDEZVOUS_PORT": "0"}  # fmt: skip
    command = ["bash", str(SCRIPTS / "pretrain.sbatch"), str(ROOT / "configs" / "cpr_ucf101.toml")]
    command += ["--data.index", "missing.csv", "--run.device", "cpu"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "'missing.csv' does not exist" in done.stderr
    assert not (folder / "scontrol.log").exists()


@pytest.mark.slow
def test_an_array_of_tasks_computes_all_flow(cluster):
    folder, environment = cluster
    index = write_synthetic(folder / "set", classes=4, videos=2, frames=3, width=64, height=48)
    environment |= {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_CPUS_PER_TASK": "1"}
    tasks = [
        subprocess.Popen(["bash", str(SCRIPTS / "flow.sbatch"), str(index), "--out", "flow"], cwd=folder,
                         env=environment | {"SLURM_ARRAY_TASK_ID": str(number)})
        for number in (1, 2, 3)
    ]  # fmt: skip
    assert [task.wait(timeout=300) for task in tasks] == [0, 0, 0]
    videos = list(Index.load(index))
    assert len(videos) == 12 and all(video.flow_path.is_file() for video in videos)
