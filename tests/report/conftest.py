"""Fixtures of the report's tests: an index of small videos, and a complete run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.report.run_folders import retrieval_rows, start_row, training_rows, write_index, write_run


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    return write_index(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path, index) -> Path:
    return write_run(tmp_path / "run", [start_row(index), *training_rows(), *retrieval_rows(index)])
