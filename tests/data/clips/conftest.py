"""The index of ten small videos, shared by the tests of clips."""

import pytest
from support.data_sets.clips import ten_videos

from cpr_fast.data.index.index import Index


@pytest.fixture(scope="session")
def index(tmp_path_factory) -> Index:
    """See `ten_videos`. Tests must not change its files."""
    return ten_videos(tmp_path_factory.mktemp("videos"))
