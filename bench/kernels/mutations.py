"""The mutation score of the tests of the CUDA kernels: which seeded faults of csrc/cuda they catch.

    python bench/kernels/mutations.py                # all that have no result yet
    python bench/kernels/mutations.py --only no-release tie-break
    python bench/kernels/mutations.py --table        # writes the table again
    python bench/kernels/mutations.py --sanitizer    # measures how long the sanitizer takes without a fault

Each fault of bench/kernels/seeded_faults is applied to a copy of csrc, which is compiled for the host and tested: by
the test that was written for it, if the fault names one; then under the sanitizer (tests/ops/cuda/sanitizer), by the
other host tests, and by the large ones; at last its PTX is executed (tests/ops/cuda/ptx). A fault is caught if a test
fails, a process dies or ends beyond its time, or the compiler warns. Rows go to bench/results/mutations.json as they
are measured, and the table by class to mutations.md; the time of the sanitizer goes to sanitizer.json.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import ROOT, commit_of, world, write_result
from support.cuda_emulation.compile import build

FAULTS = Path(__file__).parent / "seeded_faults"
RESULTS = ROOT / "bench" / "results" / "mutations.json"
SANITIZER = "sanitizer.json"
TESTS = ROOT / "tests" / "ops" / "cuda"
NOT_LARGE = ("-m", "not large")
NOT_COMPILED = "does not compile"
LIMIT_S = 400  # CPU seconds of one stage, so that other load does not matter; an operator's tests take about 40
PATIENCE = 10  # the limit in wall time, for tests that wait without computing: so many times LIMIT_S
TEST_FAILED, INTERRUPTED = 1, 2  # exit statuses of pytest; above these, pytest itself did not work


def read_faults() -> list[dict]:
    """Returns every fault: class, name, operator, file below csrc/cuda, why, edits [[text, replacement]], and for some
    the test below tests/ops/cuda that was written for it, which then runs before the stages."""
    faults = []
    for path in sorted(FAULTS.glob("*.toml")):
        content = tomllib.loads(path.read_text())
        faults += [{"class": content["class"], **fault} for fault in content["fault"]]
    return faults


def apply(fault: dict, csrc: Path) -> None:
    """Applies a fault to a copy of csrc. Raises ValueError if a text of it does not occur exactly once."""
    path = csrc / "cuda" / fault["file"]
    text = path.read_text()
    for old, new in fault["edits"]:
        if text.count(old) != 1:
            raise ValueError(f"{fault['name']}: {path} has {text.count(old)} times, expected once: {old!r}")
        text = text.replace(old, new)
    path.write_text(text)


def stages(operator: str) -> dict[str, list[str]]:
    """Returns pytest's arguments for every stage of an operator's tests, in the order in which they run."""
    host = sorted(map(str, TESTS.glob(f"test_{operator}*.py")))
    sanitizer = str(TESTS / "sanitizer" / f"test_{operator}.py")
    return {
        "sanitizer": [sanitizer, *NOT_LARGE],
        "host execution": [*host, *NOT_LARGE],
        "large": [sanitizer, "-m", "large"],
        "compiled code": [str(TESTS / "ptx" / f"test_{operator}.py")],
    }


def steps(fault: dict) -> list[tuple[str, list[str]]]:
    """Returns the stages of a fault, after the test that was written for it as a part of its own stage."""
    all_stages = list(stages(fault["operator"]).items())
    if "test" not in fault:
        return all_stages
    stage = {"sanitizer": "sanitizer", "ptx": "compiled code"}.get(fault["test"].split("/")[0], "host execution")
    return [(stage, [str(TESTS / fault["test"])]), *all_stages]


def run_stage(arguments: list[str], environment: dict[str, str]) -> tuple[bool, str]:
    """Returns whether a test failed, and how."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "--no-header", "-p", "no:cacheprovider", "--tb=short"]
    limited = ["prlimit", f"--cpu={LIMIT_S}", *command, *arguments]
    try:
        done = subprocess.run(
            limited, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE * LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return True, f"no end within {PATIENCE * LIMIT_S} s"
    if done.returncode == -signal.SIGXCPU:
        return True, f"no end within {LIMIT_S} s of CPU time"
    output = done.stdout + done.stderr
    if done.returncode == 0 or (done.returncode == 5 and "large" in arguments):  # 5: no test of this kind
        return False, ""
    stopped = done.returncode == -signal.SIGTERM or "No space left on device" in output
    if stopped or done.returncode > INTERRUPTED:
        raise RuntimeError(f"pytest did not work:\n{output[-2000:]}")
    if "CalledProcessError" in output:
        error = next((line for line in output.splitlines() if " error: " in line), "")
        return True, f"{NOT_COMPILED}: {error}"[:160]
    lines = output.splitlines()
    # A process that died says why before pytest's traceback; otherwise the assertion says it.
    died = [line for line in lines if line.startswith(("sanitizer:", "emulated device", "Fatal Python error"))]
    told = [line.removeprefix("E").strip() for line in lines if line.startswith("E   ")]
    told = [line for line in told if "the sanitizer reports" not in line]
    return True, (died + told + lines[-1:])[0].replace("\t", " ")[:160]


def measure(fault: dict) -> dict:
    """Tests a fault in a copy of csrc and returns its row; "by" is the stage that caught it, None if none did."""
    folder = ROOT / "build" / "mutations" / fault["name"]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    apply(fault, folder / "csrc")
    environment = os.environ | {
        "CPR_FAST_CUDA_SOURCES": str(folder / "csrc"),
        "CPR_FAST_CUDA_OPERATORS": fault["operator"],
        # Without lines, a report of TV-L1's harmless reads could not be told from others.
        "CPR_FAST_CUDA_DEBUG": "-g" if fault["operator"] == "tvl1_flow" else "-g0",
        "OMP_NUM_THREADS": "1",
    }
    begin, by, message = time.monotonic(), None, ""
    for stage, arguments in steps(fault):
        caught, message = run_stage(arguments, environment)
        if caught:
            by = "compiler" if message.startswith(NOT_COMPILED) else stage
            break
    shutil.rmtree(folder)
    message = message.replace(f"{folder}/", "")
    row = {key: fault[key] for key in ("name", "class", "operator", "file", "why")}
    return row | {"edits": digest(fault), "by": by, "message": message, "time_s": round(time.monotonic() - begin, 1)}


def digest(fault: dict) -> str:
    """Identifies the edits of a fault: a row of other edits is measured again."""
    return hashlib.sha256(json.dumps([fault["file"], fault["edits"]]).encode()).hexdigest()[:12]


def saved_rows(faults: list[dict]) -> dict[str, dict]:
    """Returns the saved rows of the present faults by name."""
    current = {fault["name"]: digest(fault) for fault in faults}
    saved = json.loads(RESULTS.read_text())["faults"] if RESULTS.exists() else []
    return {row["name"]: row for row in saved if current.get(row["name"]) == row["edits"]}


def save(row: dict, faults: list[dict]) -> None:
    """Adds a row to the results; several processes may measure different faults."""
    with open(ROOT / "build" / "mutations.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = saved_rows(faults) | {row["name"]: row}
        ordered = [rows[fault["name"]] for fault in faults if fault["name"] in rows]
        RESULTS.write_text(json.dumps({"commit": commit_of(), "faults": ordered}, indent=1) + "\n")


def time_sanitizer() -> dict:
    """Runs the tests of the sanitizer, but for large ones, in one process; returns their number and CPU seconds.

    The time includes starting Python and what the tests start, but not the compilation of the kernels. Raises
    RuntimeError if a test fails or is skipped.
    """
    build(sanitize=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "sanitizer"), *NOT_LARGE]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = done.stdout.splitlines()[-1] if done.stdout else ""
    passed = re.match(r"(\d+) passed(?!.* skipped)", summary)
    if done.returncode or not passed:
        raise RuntimeError(f"expected tests that pass, got {summary!r}:\n{(done.stdout + done.stderr)[-2000:]}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return world("cpu") | {"cases": int(passed[1]), "cpu_s": round(cpu_s, 1)}


def sanitizer_line(row: dict) -> str:
    return (
        f"Without a fault, the {row['cases']} cases of `tests/ops/cuda/sanitizer` (but for large ones) take "
        f"{row['cpu_s']:.0f} s of CPU time of one core, compilation not included: `{row['command']}` at "
        f"{row['commit']}, {row['device']}."
    )


def write_table(faults: list[dict], rows: dict[str, dict]) -> None:
    """Writes mutations.md: the score by class, and every fault that no test catches."""
    commit, sanitizer = json.loads(RESULTS.read_text())["commit"], RESULTS.with_name(SANITIZER)
    text = [
        "# Mutation score of the CUDA kernels",
        "",
        "Seeded faults of `csrc/cuda` (`bench/kernels/seeded_faults`) that the tests catch:",
        f"`python bench/kernels/mutations.py`. A fault is measured again when its edits change, the last at {commit}.",
        '"Equivalent" faults change no behaviour and do not count.',
        "",
        *([sanitizer_line(json.loads(sanitizer.read_text())), ""] if sanitizer.exists() else []),
        "| class | faults | equivalent | caught | by the sanitizer | by host execution | by others |",
        "|---|---|---|---|---|---|---|",
    ]
    measured = [fault for fault in faults if fault["name"] in rows]
    for name in [*dict.fromkeys(fault["class"] for fault in measured), "all"]:
        own = [fault for fault in measured if name in (fault["class"], "all")]
        counted = [fault for fault in own if "equivalent" not in fault]
        by = [rows[fault["name"]]["by"] for fault in counted]
        others = sum(stage not in ("sanitizer", "host execution", None) for stage in by)
        caught = len(by) - by.count(None)
        text.append(
            f"| {name} | {len(own)} | {len(own) - len(counted)} | {caught} of {len(by)} | {by.count('sanitizer')} | "
            f"{by.count('host execution')} | {others} |"
        )
    if missing := len(faults) - len(measured):
        text += ["", f"{missing} faults have no result yet."]
    survivors = [fault for fault in measured if rows[fault["name"]]["by"] is None]
    text += ["", "## Not caught", ""] if survivors else []
    for fault in survivors:
        reason = fault.get("equivalent", fault.get("survives", "not explained"))
        text.append(f"- `{fault['name']}` ({fault['class']}): {fault['why']} {reason}")
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="measure these faults, whether they have a result or not"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table")
    parser.add_argument("--sanitizer", action="store_true", help="measure how long the sanitizer takes, nothing else")
    options = parser.parse_args()
    if options.sanitizer:
        write_result(SANITIZER, json.dumps(time_sanitizer(), indent=1) + "\n")
        return
    faults = read_faults()
    if unknown := set(options.only or ()) - {fault["name"] for fault in faults}:
        parser.error(f"--only: no fault of this name: {', '.join(sorted(unknown))}")
    for fault in () if options.table else faults:
        if fault["name"] not in options.only if options.only else fault["name"] in saved_rows(faults):
            continue
        row = measure(fault)
        print(
            f"{row['class']:32} {row['name']:32} {row['by'] or 'NOT CAUGHT':16} {row['time_s']:6} s  {row['message']}"
        )
        sys.stdout.flush()
        save(row, faults)
    write_table(faults, saved_rows(faults))


if __name__ == "__main__":
    main()
