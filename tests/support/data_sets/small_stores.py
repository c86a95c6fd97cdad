"""Small stores of features for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpr_fast.data.features.clips import Clip
from cpr_fast.data.features.store import Description, FeatureStore
from cpr_fast.data.features.write import Computed, planned_shards, write_store


def make_clips(count: int, classes: int = 4) -> list[Clip]:
    """Two clips per source, classes in turn by source; every fifth source is in the test split."""
    return [
        Clip(f"c{i // 2 % classes}/v{i}.avi", f"c{i // 2 % classes}", f"s{i // 2}", "train" if i // 2 % 5 else "test")
        for i in range(count)
    ]


def features_of(count: int, samples: int, width: int, view: str, classes: int = 4, noise: float = 1.0) -> np.ndarray:
    """Samples [count, samples, width] float32 around the centre of each clip's class."""
    random = np.random.default_rng([len(view), width])
    centres = random.standard_normal((classes, 1, width), np.float32)
    spread = random.standard_normal((count, samples, width), np.float32)
    return centres[np.arange(count) // 2 % classes] + noise * spread


def make_store(
    folder: Path,
    clips: list[Clip] | None = None,
    *,
    count: int = 61,
    samples: int = 3,
    widths: dict[str, int] | None = None,
    dtype: str = "float16",
    shard: int = 23,
    **kind: float,
) -> FeatureStore:
    """Writes a store whose features are those of `features_of`."""
    clips = make_clips(count) if clips is None else clips
    widths = widths or {"rgb": 16, "flow": 16}
    values = {view: features_of(len(clips), samples, width, view, **kind) for view, width in widths.items()}
    about = Description(widths, samples, False, dtype, {}, "a test", planned_shards(len(clips), shard))

    def compute(positions: range) -> Computed:
        rows = np.array(positions)
        return Computed(rows, {view: some[rows] for view, some in values.items()})

    write_store(folder, clips, about, compute)
    return FeatureStore(folder)
