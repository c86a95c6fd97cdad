"""A loader with a disk cache whose threads have ended: no wait without end."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("fsspec", reason="fsspec is an extra: pip install fsspec aiohttp")
pytest.importorskip("aiohttp", reason="aiohttp is an extra: pip install fsspec aiohttp")
pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")

from support.data_sets.served_clips import on_server, open_loader


def test_a_read_does_not_wait_for_bytes_that_nobody_fetches_any_more(index, server, tmp_path, monkeypatch):
    loader, found = open_loader(on_server(index, server), tmp_path), []
    ahead, plan = loader._ahead, loader._ahead._plan
    monkeypatch.setattr(ahead.cache, "fetch", lambda *_: None)  # the threads that fetch are gone

    def planned(step: int) -> None:
        if step == 2:
            raise RuntimeError("can't start new thread")
        plan(step)

    def read() -> None:
        try:
            found.extend(loader.epoch(0))
        except RuntimeError as error:
            found.append(error)

    monkeypatch.setattr(ahead, "_plan", planned)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(8)
    assert not thread.is_alive() and str(found[-1]) == "can't start new thread"
    loader.close()
