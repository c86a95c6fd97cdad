"""Records the output of `cpr-fast doctor` for a good and for a broken data set.

    python bench/training/doctor_report.py [--seconds 60]

Writes bench/results/doctor.md. The good set consists of small synthetic actions with flow. The broken one is the same
set with common defects: a truncated download, an HTML page instead of a video, an empty and a missing file, missing
flow, and a mistake in the index.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import ROOT, world, write_result

SYNTH = ("synth", "SET", "--classes", "4", "--videos", "8")
FLOW = ("flow", "SET/index.csv", "--out", "SET/flow")
CONFIG = """[data]
frames = 16
size = 112
batch_size = 8
workers = 2
"""


def cpr_fast(folder: Path, *arguments: str) -> tuple[int, str]:
    """Runs a command in `folder` and returns its exit code and stdout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "118", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-m", "cpr_fast", *arguments], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    return done.returncode, done.stdout


def spoil(folder: Path) -> list[str]:
    """Breaks the data set below `folder` and returns a description of each defect."""
    videos = sorted(path for path in folder.rglob("*.mp4") if not path.name.endswith(".flow.mp4"))
    cut, page, empty, lost = videos[0], videos[len(videos) // 3], videos[len(videos) // 2], videos[-2]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    page.write_text("<html><title>404 Not Found</title></html>\n")
    empty.write_bytes(b"")
    lost.unlink()
    flow = sorted(folder.rglob("*.flow.mp4"))[3:9]
    for path in flow:
        path.unlink()
    index = folder / "index.csv"
    lines = index.read_text().splitlines()
    fields = lines[5].split(",")
    lines[5] = ",".join([*fields[:4], "many", *fields[5:]])
    index.write_text("\n".join(lines) + "\n")
    name = lambda path: str(path.relative_to(folder))  # noqa: E731
    return [
        f"`{name(cut)}` cut in half",
        f"`{name(page)}` replaced by a page of HTML",
        f"`{name(empty)}` emptied",
        f"`{name(lost)}` deleted",
        f"{len(flow)} flow files deleted",
        '`num_frames` of line 6 of the index set to "many"',
    ]


def section(title: str, done: list[str], command: str, code: int, output: str) -> str:
    lines = "\n".join(line.rstrip() for line in output.rstrip().splitlines())
    steps = "".join(f"- {step}\n" for step in done)
    return f"## {title}\n\n{steps}\n    {command}\n\nExit code {code}:\n\n```\n{lines}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", default="60", help="duration of the measurement of a step's parts")
    options = parser.parse_args()
    doctor = ("doctor", "SET/index.csv", "--config", "small.toml", "--seconds", options.seconds)
    about = world("cpu")
    text = f"# doctor\n\n`{about['command']}`: {about['device']}, commit {about['commit']}, torch {about['torch']}.\n\n"
    text += "`small.toml` is\n\n" + "".join(f"    {line}\n" for line in CONFIG.splitlines()) + "\n"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.toml").write_text(CONFIG)
        for command in (SYNTH, FLOW):
            code, output = cpr_fast(folder, *command)
            if code:
                raise SystemExit(f"cpr-fast {' '.join(command)}: exit code {code}\n{output}")
        done = [f"`cpr-fast {' '.join(command)}`" for command in (SYNTH, FLOW)]
        text += section("A good data set", done, f"cpr-fast {' '.join(doctor)}", *cpr_fast(folder, *doctor)) + "\n"
        done = spoil(folder / "SET")
        text += section("A broken one", done, f"cpr-fast {' '.join(doctor)}", *cpr_fast(folder, *doctor))
        shutil.rmtree(folder / "SET")
    write_result("doctor.md", text)


if __name__ == "__main__":
    main()
