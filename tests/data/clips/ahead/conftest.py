"""A local server, and a process that knows nothing of its files when a test begins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.machine.http_server import Served, serving

from cpr_fast.data.files import remote
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.video import numbering
from cpr_fast.data.video.reads import extents


@pytest.fixture
def server() -> Iterator[Served]:
    with serving({}) as served:
        yield served


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01, 0.01))


@pytest.fixture(autouse=True)
def _new_process():
    for known in (REMOTE._facts, extents.EXTENTS, numbering.LAYOUTS):
        known.clear()
    yield
    assert REMOTE.cache is None  # every loader was closed
