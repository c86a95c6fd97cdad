"""The PEP 517 backend of this project: setuptools', and torch as a build requirement only where it is missing.

`pip install .` builds in an isolated environment. Requiring torch there would download its newest CUDA build even
where another torch is installed already; that one serves, because only its headers are read (stable ABI).
"""

import os
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that stay as they are


def torch_root() -> str:
    """Directory of the torch package to build against, "" if there is none: this interpreter's, then its environment's.

    pip hides the target environment by PYTHONPATH, so a child without it sees the installed packages again.
    """
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    visible = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for environment in (dict(os.environ), visible):
        found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
        if found.stdout.strip():
            return found.stdout.strip()
    return ""


def get_requires_for_build_wheel(config_settings=None):
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if torch_root() else [*requires, "torch>=2.10"]


def get_requires_for_build_editable(config_settings=None):
    requires = build_meta.get_requires_for_build_editable(config_settings)
    return requires if torch_root() else [*requires, "torch>=2.10"]
