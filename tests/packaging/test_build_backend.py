"""The build backend: torch is a build requirement only if it is not installed; read-only sources; old build tools."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from support.packaging.distribution import ROOT, attempt, build_sdist, copy_source


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("CPR_TORCH_ROOT", raising=False)
    import build_backend

    return build_backend


def fake_torch(folder: Path, version: str) -> Path:
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    return package


def test_an_installed_torch_is_built_against(backend):
    import torch

    assert Path(backend.torch_root()) == Path(torch.__file__).parent


@pytest.mark.parametrize(("version", "suitable"), [("2.9.1+cu128", False), ("2.10.0", True), ("3.0.0a0+git", True)])
def test_torch_older_than_2_10_counts_as_missing(backend, tmp_path, version, suitable):
    assert backend._is_suitable(str(fake_torch(tmp_path, version))) == suitable


@pytest.mark.parametrize("root", ["", "torch"])
def test_torch_is_required_only_where_it_is_missing(backend, monkeypatch, tmp_path, root):
    monkeypatch.chdir(copy_source(tmp_path / "source"))
    monkeypatch.setattr(backend, "torch_root", lambda: root)
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert ("torch>=2.10" in hook()) == (not root)


def test_the_variable_names_the_torch_to_build_against(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("CPR_TORCH_ROOT", str(fake_torch(tmp_path, "2.11.0")))
    assert backend.torch_root() == str(tmp_path / "torch")
    monkeypatch.setenv("CPR_TORCH_ROOT", str(tmp_path))
    with pytest.raises(SystemExit, match="CPR_TORCH_ROOT=.* is not the directory of a torch package >= 2.10"):
        backend.torch_root()


def install_metadata(folder: Path, name: str, version: str) -> Path:
    """Writes the metadata of a distribution, as pip does in site-packages."""
    (folder / f"{name}-{version}.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    return folder


def test_old_setuptools_is_one_line(backend, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(install_metadata(tmp_path, "setuptools", "65.5.0")))
    with pytest.raises(SystemExit, match=r"needs setuptools >= 77 to build, found 65.5.0: run `pip install"):
        backend.get_requires_for_build_wheel()


def test_the_version_of_setuptools_is_not_that_of_another_distribution(backend, monkeypatch, tmp_path):
    """pip 25.0 to 26.2 put this finder first, which ignores the name that is asked for; so does setuptools'
    `__version__` then."""

    class BackendPathFinder:
        def find_spec(self, name, path=None, target=None):
            return None

        def find_distributions(self, context=None):
            context = metadata.DistributionFinder.Context(path=[str(tmp_path)])
            return metadata.MetadataPathFinder.find_distributions(context)

    install_metadata(tmp_path, "cpr_fast", "0.1.0")
    monkeypatch.setattr(sys, "meta_path", [BackendPathFinder(), *sys.meta_path])
    assert metadata.version("setuptools") == "0.1.0"
    monkeypatch.setattr(setuptools, "__version__", "0.1.0")
    backend.require_setuptools()
    install_metadata(tmp_path, "setuptools", "65.5.0")
    with pytest.raises(SystemExit, match="found 65.5.0"):
        backend.require_setuptools()


def test_a_read_only_source_is_built_from_a_copy(backend, monkeypatch, tmp_path):
    source = copy_source(tmp_path / "source")
    before = sorted(source.rglob("*"))
    monkeypatch.chdir(source)
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: source != Path(path).resolve() and writable(path, mode))
    (tmp_path / "dist").mkdir()
    backend.build_sdist("../dist")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    assert sorted(source.rglob("*")) == before and Path.cwd() == source
    with pytest.raises(SystemExit, match="an editable install builds inside .*, which cannot be written"):
        backend.get_requires_for_build_editable()


@pytest.mark.parametrize("module", ["cmake", "pybind11"])
def test_a_missing_build_tool_is_one_line(tmp_path, module):
    source = copy_source(tmp_path / "source")
    hide = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['setup.py', 'build_ext']; import runpy; "
    program = hide + "runpy.run_path('setup.py', run_name='__main__')"
    done = attempt(sys.executable, "-c", program, folder=source, PATH="")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"{module} is not installed: run `pip install cmake ninja pybind11`"


def test_the_version_is_written_once():
    printed = subprocess.run([sys.executable, "-m", "cpr_fast", "--version"], cwd=ROOT, capture_output=True, text=True)
    version = printed.stdout.split()[-1]
    listed = [ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "cpr_fast/__init__.py")]
    assert [path.name for path in listed if f'"{version}"' in path.read_text()] == ["__init__.py"]


def test_the_sdist_carries_that_version(tmp_path):
    import cpr_fast

    archive = build_sdist(copy_source(tmp_path / "source"), tmp_path / "dist")
    assert archive.name == f"cpr_fast-{cpr_fast.__version__}.tar.gz"
