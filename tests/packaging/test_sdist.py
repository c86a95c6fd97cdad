"""The source distribution contains every file of the repository, and no leftovers of a build."""

import subprocess
import tarfile

import pytest
from support.packaging.distribution import ROOT, build_sdist, copy_source

NOT_DISTRIBUTED = {".gitignore"}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    source = copy_source(tmp_path_factory.mktemp("a folder") / "source")
    (source / "cpr_fast" / "_C.so").touch()  # as after a build in the checkout
    (source / "cpr_fast" / "include").mkdir()
    (source / "cpr_fast" / "include" / "cpr_fast.h").touch()
    with tarfile.open(build_sdist(source, source.parent / "dist")) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    return {member.name.partition("/")[2] for member in members if member.isfile()}


def test_every_file_of_the_repository_is_there(names):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = {
        name for name in listed.stdout.splitlines() if (ROOT / name).is_file() and not (ROOT / name).is_symlink()
    }
    assert not tracked - names - NOT_DISTRIBUTED


def test_what_the_build_needs_is_there(names):
    needed = {"build_backend.py", "setup.py", "pyproject.toml", "CMakeLists.txt", "csrc/cpr_fast.h", "LICENSE"}
    assert needed | {"cmake/cpr_fast-config.cmake.in", "cpr_fast/py.typed"} <= names


def test_recipes_are_in_the_package(names):
    recipes = {path.name for path in (ROOT / "configs").glob("*.toml")}
    assert recipes and {f"cpr_fast/configs/{name}" for name in recipes} <= names


def test_nothing_that_was_built_is_there(names):
    assert not {name for name in names if name.endswith((".so", ".pyc")) or name.startswith("cpr_fast/include/")}
