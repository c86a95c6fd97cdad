"""The data set shared by the tests of stored flow."""

import pytest
from support.data_sets.flow import LONG, write_video

from cpr_fast.data.index.build import build_index


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Five videos of several lengths, one longer than a batch (16 pairs), one with an odd width."""
    monkeypatch.setattr("cpr_fast.data.flow.write.batch_pixels", lambda device: 16 * 48 * 32)
    lengths = {"train/A/a_c01": 6, "train/A/a_c02": 2, "train/B/b": LONG, "test/A/c": 9, "test/B/d": 5}
    for name, frames in lengths.items():
        write_video(tmp_path / "set" / f"{name}.mkv", frames, width=49 if name.endswith("d") else 48)
    build_index(tmp_path / "set", out=tmp_path / "set" / "index.csv")
    return tmp_path / "set" / "index.csv"
