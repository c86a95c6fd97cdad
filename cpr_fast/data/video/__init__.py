"""Probing, frame-exact decoding and transcoding of video files with PyAV.

Imports `runtime` and `data.files`; the other packages of `data`, `evaluate`, `report` and `doctor` may import it.
"""

from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import read_frames
from cpr_fast.data.video.probe import VideoInfo, probe_video

__all__ = ["VideoError", "VideoInfo", "probe_video", "read_frames"]
