"""Decode parity for each codec: every seek is exact, DALI returns the right frames, and its clips are close to
PIL's.
"""

import os

import numpy as np
import pytest
import torch
from support.numbered_videos import shared_data

pytest.importorskip("nvidia.dali")

from cpr_fast.config import DataConfig
from cpr_fast.doctor.parity import (
    CODECS,
    check_codec,
    clip_parity,
    dali_parity,
    decode_linearly,
    seek_parity,
    write_test_video,
)

CPU_DECODES = {"vp9", "mjpeg"}  # of DALI on the CPU
CPU = torch.device("cpu")


@pytest.mark.parametrize("codec", CODECS)
def test_every_seek_of_every_codec(codec, tmp_path, capfd):
    path = write_test_video(codec, tmp_path, frames=40)
    if path is None:
        pytest.skip(f"FFmpeg has no encoder for {codec}")
    truth = decode_linearly(path)
    assert len(truth) == 40 and len({frame.tobytes() for frame in truth}) == 40  # a wrong frame would exceed this
    row = seek_parity(path, truth, 8)
    assert row["seeks"] == 33 and row["identical"] == row["packets_identical"] == row["frames"] == 33 * 8
    dali = dali_parity(path, truth, 8, range(0, 33, 6), CPU)
    if codec in CPU_DECODES:
        assert dali["identical"] == dali["frames"] and dali["psnr_min_db"] > 25
    else:
        assert "refused" in dali
    capfd.readouterr()
    assert check_codec(codec, tmp_path, CPU)["pyav"] == "exact"
    assert capfd.readouterr().err == ""  # DALI's own lines about codecs that are not used would read as errors


@pytest.mark.parametrize("codec", CODECS)
def test_writing_a_video_leaves_the_priority_of_the_process(codec, tmp_path):
    """libsvtav1 gives a thread of root real-time priority, with which it would keep all other programs waiting."""
    before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    write_test_video(codec, tmp_path, frames=4)
    assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)) == before


def test_xvid_of_ucf101_is_exact():
    paths = sorted(shared_data("ucf101_100").glob("*/*.avi"))
    for path in (paths[3], paths[57]):
        truth = decode_linearly(path)
        row = seek_parity(path, truth, 16, np.linspace(0, len(truth) - 16, 9).astype(int).tolist())
        assert row["identical"] == row["packets_identical"] == row["frames"]


@pytest.mark.parametrize("augment", ["coclr", "iic"])
def test_dalis_clips_are_near_the_reference(augment, tmp_path):
    path = write_test_video("h264", tmp_path, frames=20)
    data = DataConfig(frames=8, size=48, augment=augment, workers=1)
    row = clip_parity(path, data, epochs=12)
    assert row["plain_min_db"] > 30
    if augment == "coclr":
        assert row["colour_clips"] >= 4 and row["colour_min_db"] > 15
    else:
        assert row["colour_clips"] == 0
