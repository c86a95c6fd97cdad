"""Flow computed in batches of frame pairs of several videos is bitwise equal to flow of each pair computed alone."""

import numpy as np
import pytest
import torch

from cpr_fast.data.flow.batches import pack, solve
from cpr_fast.data.flow.levels import FlowSolver, pair_flow, quantise
from cpr_fast.data.video.container import VideoError


@pytest.mark.parametrize("pairs", [1, 2, 7, 1000])
def test_batches_of_pairs_across_videos_change_no_bit(pairs):
    """Compares TV-L1 flow in batches of every kind with each pair alone; videos have two sizes, one is unreadable."""
    rng = np.random.default_rng(0)
    shapes = [(4, 24, 30), (2, 24, 30), (6, 24, 30), (3, 20, 24)]
    videos = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
    solver = FlowSolver(torch.device("cpu"))
    batches = list(pack([(0, videos[0]), (1, videos[1]), (9, VideoError("x", "gone")), (2, videos[2]), (3, videos[3])],
                        pairs * 24 * 30))  # fmt: skip
    whole: dict[int, list] = {}
    for batch in batches:
        for segment, levels in solve(batch, solver):
            whole.setdefault(segment.position, []).append(levels)
    assert isinstance(whole.pop(9)[0], VideoError)
    assert len(batches) == 1 + {1: 9 + 2, 2: 5 + 1, 7: 2 + 1, 1000: 1 + 1}[pairs]
    for position, gray in enumerate(videos):
        alone = [quantise(pair_flow(torch.from_numpy(gray[None, i : i + 2]))) for i in range(len(gray) - 1)]
        np.testing.assert_array_equal(np.concatenate(whole[position]), torch.cat(alone).numpy())
