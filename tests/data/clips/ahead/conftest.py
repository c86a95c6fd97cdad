"""A local server, and a process that knows nothing of its files when a test begins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.machine.http_server import Served, serving
from support.machine.new_process import as_a_new_process

from cpr_fast.data.files import remote
from cpr_fast.data.files.remote import REMOTE


@pytest.fixture
def server() -> Iterator[Served]:
    with serving({}) as served:
        yield served


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01, 0.01))


@pytest.fixture(autouse=True)
def _new_process():
    as_a_new_process()
    yield
    assert REMOTE.cache is None  # every loader was closed
