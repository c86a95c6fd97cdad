"""`make setup` leaves an environment that imports the checkout, and runs its command line, from any folder."""

import subprocess
import venv
from pathlib import Path

import cpr_fast

ROOT = Path(__file__).resolve().parents[2]


def test_the_environment_of_make_finds_the_checkout_from_any_folder(tmp_path):
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    (folder / ".installed").touch()  # the packages are not needed here, and `-o` keeps make from installing them
    target = folder / "bin" / "cpr-fast"
    subprocess.run(["make", f"VENV={folder}", "-o", folder / ".installed", target], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    python = folder / "bin" / "python"
    for command in ([target], [python, "-m", "cpr_fast"]):
        printed = subprocess.run([*command, "--version"], cwd=tmp_path, check=True, capture_output=True, text=True)
        assert printed.stdout == f"cpr-fast {cpr_fast.__version__}\n"
    found = subprocess.run([python, "-c", "import cpr_fast; print(cpr_fast.__file__)"], cwd=tmp_path, check=True,
                           capture_output=True, text=True)  # fmt: skip
    assert Path(found.stdout.strip()) == ROOT / "cpr_fast" / "__init__.py"
    failed = subprocess.run([target, "no-such-command"], cwd="/", capture_output=True, text=True)
    assert failed.returncode == 2 and "unknown command" in failed.stderr  # the exit code is that of the command
