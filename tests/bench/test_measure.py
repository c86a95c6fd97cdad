"""What belongs to every result: the command that others can repeat, and the commit of the code that was measured."""

import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("bench/study.py /mnt/videos --sets jhmdb", "bench/study.py WORK --sets jhmdb"),
        ("bench/x.py /mnt/videos --results /mnt/out --seeds 0 1", "bench/x.py WORK --results RESULTS --seeds 0 1"),
        ("bench/x.py --runs /mnt/a /mnt/b --threads 1 /mnt/c", "bench/x.py --runs RUNS RUNS --threads 1 WORK"),
        ("bench/x.py --before-run=/mnt/a /mnt/b", "bench/x.py --before-run=BEFORE_RUN WORK"),
        ("bench/x.py --out '/mnt/my runs/a'", "bench/x.py --out OUT"),
        ("bench/x.py --out ../elsewhere ..", "bench/x.py --out OUT OUT"),
        ("bench/x.py found JHMDB=/a/index.csv:/b/last.pt", "bench/x.py found JHMDB=WORK:WORK"),
        ("bench/x.py --base size=32 iic=8,5 --data runs/a", "bench/x.py --base size=32 iic=8,5 --data runs/a"),
        ("bench/x.py --from http://host/a s3://b/c a/../b", "bench/x.py --from http://host/a s3://b/c a/../b"),
        ("-m pytest bench -k 'a and not b'", "-m pytest bench -k 'a and not b'"),
    ],
)  # fmt: skip
def test_a_command_names_no_folder_of_a_machine(measure, words, shown):
    assert measure.recorded_command(shlex.split(words)) == f"python {shown}"


def test_paths_below_the_repository_are_relative_to_it(measure, monkeypatch, tmp_path):
    words = [str(ROOT / "bench" / "x.py"), "--data", str(ROOT / "shared" / "data"), str(ROOT)]
    assert measure.recorded_command(words) == "python bench/x.py --data shared/data ."
    (tmp_path / "link").symlink_to(ROOT)
    assert measure.recorded_command([str(tmp_path / "link" / "bench" / "x.py")]) == "python bench/x.py"
    monkeypatch.chdir(ROOT / "docs")
    assert measure.recorded_command(["../bench/x.py", "../../out"]) == "python bench/x.py WORK"
    assert measure.recorded_command([f"{ROOT}-other/bench/x.py"]) == "python WORK"


def test_the_world_of_a_result_has_the_command_of_the_process(measure, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "-m", "pytest", "bench", "--basetemp", "/mnt/a"])
    assert measure.world("cpu")["command"] == "python -m pytest bench --basetemp BASETEMP"


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit of a file of code and one result."""
    for name in ("cpr_fast/a.py", "bench/results/a.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("1\n")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_says_when_the_code_differs_from_it(measure, checkout):
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, text=True).strip()
    assert measure.commit_of(checkout) == head
    (checkout / "bench" / "results" / "a.json").write_text("2\n")
    (checkout / "bench" / "results" / "new.json").write_text("2\n")
    (checkout / "notes.txt").write_text("2\n")
    assert measure.commit_of(checkout) == head
    (checkout / "cpr_fast" / "a.py").write_text("2\n")
    assert measure.commit_of(checkout) == f"{head}-dirty"
    (checkout / "cpr_fast" / "a.py").write_text("1\n")
    assert measure.commit_of(checkout) == head
    (checkout / "bench" / "new.py").write_text("2\n")
    assert measure.commit_of(checkout) == f"{head}-dirty"


def test_without_git_the_commit_is_unknown(measure, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measure.commit_of(tmp_path) == "unknown"


def test_a_page_says_which_rows_were_measured_with_uncommitted_changes(measure):
    clean, one, other = ({"commit": commit} for commit in ("abc", "def-dirty", "012-dirty"))
    assert measure.uncommitted([clean, clean]) == "" == measure.uncommitted([])
    assert measure.uncommitted([clean, one, other, one]) == (
        "3 of 4 rows were measured with uncommitted changes of the code (012-dirty and def-dirty)."
    )
    assert measure.uncommitted([clean, one]) == (
        "1 of 2 rows was measured with uncommitted changes of the code (def-dirty)."
    )
    assert measure.uncommitted([one, one]) == (
        "All 2 rows were measured with uncommitted changes of the code (def-dirty)."
    )
