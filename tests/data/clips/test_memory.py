"""Loaders that are closed leave their memory to the next one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.numbered_videos import write_video

# Prints the resident memory of the process, MiB, before the first of three loaders and after each, closed but kept.
MEASURE = """
import os
import sys
from pathlib import Path

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.index import Index, Video

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

path = Path(sys.argv[1])
copies = [path.with_name(f"{i}.mkv") for i in range(24)]
for copy in copies:
    copy.hardlink_to(path)
index = Index(Video(copy, "a", str(i), "train", 60, 25.0, 320, 240) for i, copy in enumerate(copies))
data = DataConfig(frames=2, size=16, batch_size=6, workers=2)
loaders = []
for _ in range(4):
    loaders.append(TrainLoader(index, data, ["rgb"], seed=0))
    for batch in loaders[-1].epoch(0):
        pass
    full = resident()
    loaders[-1].close()
    print(full, resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_closed_loaders_do_not_add_up(tmp_path):
    """24 videos of 13 MiB are kept by each loader, decoded by threads of its own."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 15, 20, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    path = write_video(tmp_path / "video", frames, "mjpeg-mkv")
    ran = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True)
    (first_full, first), *_, (full, last) = [map(float, line.split()) for line in ran.stdout.splitlines()]
    assert first_full - first > 200  # the videos were kept, and returned
    assert last < first + 60 and full < first_full + 60
