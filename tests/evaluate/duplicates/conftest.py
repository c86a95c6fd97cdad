"""The steps of graphs of neighbours that a test computes, and the end of a process between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from cpr_fast.evaluate.duplicates import graph
from cpr_fast.ops import KnnGraph


@pytest.fixture
def compared(monkeypatch) -> list[range]:
    """The rows of the steps that were computed."""
    begun, step = [], KnnGraph.step

    def counted(self):
        first = self.done
        step(self)
        begun.append(range(first, self.done))

    monkeypatch.setattr(KnnGraph, "step", counted)
    return begun


@pytest.fixture
def ends_after(monkeypatch, compared) -> Callable[..., AbstractContextManager[None]]:
    """A context that `error` ends after so many steps; with `killed`, nothing more is written after them."""

    @contextmanager
    def context(steps: int, error: type[BaseException], *, killed: bool = False) -> Iterator[None]:
        step = KnnGraph.step

        def ending(self):
            if len(compared) < steps:
                return step(self)
            if killed:
                patch.setattr(graph._Part, "save", lambda *_: None)
            raise error

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(KnnGraph, "step", ending)
            yield

    return context
