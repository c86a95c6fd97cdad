"""The PEP 517 build backend: setuptools' own, with two additions.

* torch is a build requirement only where no suitable torch is installed. `pip install .` builds in an isolated
  environment, where a fixed requirement would download the newest CUDA build (5 GB) even if another torch is already
  installed. Any torch >= 2.10 serves, because the build uses nothing but its headers for the stable ABI.
* A source directory that cannot be written is copied first, because setuptools writes into the directory that it
  builds from.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import setuptools
from setuptools import build_meta

TORCH = "torch>=2.10"
SETUPTOOLS = 77  # the first release that reads the license field of pyproject.toml
# Directories at the top of a checkout that no build reads. They can be large.
NOT_COPIED = {".git", ".venv", "build", "dist", "runs"}


def require_setuptools() -> None:
    """Exits with one line where setuptools is too old; older releases print pages of JSON schema instead."""
    version = _setuptools_version()
    if int(re.match(r"\d+", version)[0]) < SETUPTOOLS:
        raise SystemExit(
            f"cpr_fast needs setuptools >= {SETUPTOOLS} to build, found {version}: "
            f"run `pip install 'setuptools>={SETUPTOOLS}'`"
        )


def _setuptools_version() -> str:
    """Returns the version of the installed setuptools.

    `setuptools.__version__` can be that of cpr_fast: pip 25.0 to 26.2 (pyproject_hooks 1.2) answer a question about any
    installed distribution with those in the source directory first, and an earlier step of the build writes the
    metadata of cpr_fast there.
    """
    found = metadata.distributions(name="setuptools")
    return next((one.version for one in found if one.metadata["Name"] == "setuptools"), setuptools.__version__)


def torch_root() -> str:
    """Returns the directory of the torch package to build against, or "" if there is none of at least version 2.10.

    The variable CPR_TORCH_ROOT comes first, then this interpreter's torch, then the torch of the environment that pip
    installs into. pip hides that environment with PYTHONPATH, so a child process without PYTHONPATH finds it.
    """
    if given := os.environ.get("CPR_TORCH_ROOT"):
        if not _is_suitable(given):
            raise SystemExit(f"CPR_TORCH_ROOT={given} is not the directory of a torch package >= 2.10")
        return given
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    visible = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for environment in (dict(os.environ), visible):
        # -P: a directory called torch in the working directory is not the package.
        found = subprocess.run([sys.executable, "-P", "-c", probe], env=environment, capture_output=True, text=True)
        if _is_suitable(found.stdout.strip()):
            return found.stdout.strip()
    return ""


def _is_suitable(root: str) -> bool:
    version = Path(root, "version.py")
    if not root or not version.is_file():
        return False
    number = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version.read_text())
    return bool(number) and tuple(map(int, number.groups())) >= (2, 10)


@contextlib.contextmanager
def _writable_source() -> Iterator[None]:
    """Enters a temporary copy of the working directory where setuptools could not write into the original."""
    source = Path.cwd()
    written = [source, *source.glob("build"), *source.glob("*.egg-info")]
    if all(os.access(path, os.W_OK) for path in written):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "source")
        # Without the permissions of the original, which may be read-only.
        shutil.copytree(
            source,
            copy,
            ignore=lambda folder, names: NOT_COPIED & set(names) if Path(folder) == source else (),
            copy_function=shutil.copyfile,
        )
        for path in (copy, *copy.rglob("*/")):
            path.chmod(0o755)
        os.chdir(copy)
        try:
            yield
        finally:
            os.chdir(source)


def _requires_torch(requires: list[str]) -> list[str]:
    return requires if torch_root() else [*requires, TORCH]


def get_requires_for_build_sdist(config_settings=None):
    require_setuptools()
    with _writable_source():
        return build_meta.get_requires_for_build_sdist(config_settings)


def get_requires_for_build_wheel(config_settings=None):
    require_setuptools()
    with _writable_source():
        return _requires_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    require_setuptools()
    if not os.access(".", os.W_OK):
        raise SystemExit(
            f"an editable install builds inside {Path.cwd()}, which cannot be written: use `pip install .`"
        )
    return _requires_torch(build_meta.get_requires_for_build_editable(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    metadata_directory = os.path.abspath(metadata_directory)
    with _writable_source():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_sdist(sdist_directory, config_settings=None):
    sdist_directory = os.path.abspath(sdist_directory)
    with _writable_source():
        return build_meta.build_sdist(sdist_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    wheel_directory = os.path.abspath(wheel_directory)
    metadata_directory = metadata_directory and os.path.abspath(metadata_directory)
    with _writable_source():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_editable = build_meta.build_editable
