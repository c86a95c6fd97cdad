"""Compares every seek of every codec, DALI's frames and augmented clips with PyAV, PIL and torchvision.

    python bench/data/decode_parity.py [--device cuda] [--clips 4]

Writes bench/results/decode_parity.json and .md. On a CUDA device NVDEC decodes ("mixed"); on the CPU DALI decodes
VP9 and MJPEG only. Real clips come from $CPR_FAST_SHARED/data, if it exists.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import av
import nvidia.dali
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import world, write_result
from support import real_clips

from cpr_fast.config import DataConfig
from cpr_fast.data.video.probe import probe_video
from cpr_fast.doctor.parity import CODECS, clip_parity, dali_parity, decode_linearly, seek_parity, write_test_video

CLIP = 16  # frames of a compared clip


def videos(folder: Path, clips: int):
    """Yields (name, path) of a synthetic video per codec, and of real videos."""
    for codec in CODECS:
        path = write_test_video(codec, folder, frames=100, height=240, width=320)
        if path is None:
            print(f"{codec}: FFmpeg has no encoder", file=sys.stderr)
        else:
            yield f"synthetic {codec}", path
    avi = sorted((real_clips.ROOT / "ucf101_100").glob("*/*.avi"))
    for path in avi[:: max(1, len(avi) // clips)][:clips]:
        yield f"UCF101 {path.stem}", path
    for name in ("eat.mkv", "h264_10bits.mp4", "mmaction2_test.avi"):
        if (path := real_clips.ROOT / "tiny" / name).exists():
            yield f"real {name}", path


def measure(name: str, path: Path, device: torch.device) -> dict:
    truth = decode_linearly(path)
    info = probe_video(path)
    starts = range(0, len(truth) - CLIP + 1, max(1, len(truth) // 12))
    data = DataConfig(frames=CLIP, workers=1)
    return {
        "video": name,
        "codec": info.codec,
        "size": f"{info.width}x{info.height}",
        "num_frames": len(truth),
        "seek": seek_parity(path, truth, CLIP, None if len(truth) <= 200 else starts),
        "dali": dali_parity(path, truth, CLIP, starts, device),
        "clips": clip_parity(path, data, device=device),
    }


def table(rows: list[dict], about: dict) -> str:
    lines = [
        "# Decode parity",
        "",
        f"`{about['command']}`: device {about['device']}, commit {about['commit']}, DALI {about['dali']}, PyAV "
        f"{about['pyav']}.",
        "",
        f"Clips of {CLIP} frames. *Seeks*: frames identical, bit for bit, to a linear decode, by seeking and by the "
        "packets that a GPU is given. *DALI*: its decoder's frames that are the right one of five neighbours, and PSNR "
        "against FFmpeg's conversion to RGB. *Clips*: PSNR of the loader's augmented clips (128x128) against PIL's "
        "bicubic crop and flip, and with colour jitter, grayscale and blur against the published recipe on PIL.",
        "",
        "| video | codec | seeks | by seeking | by packets | DALI | PSNR mean, min | clips: crop | with colour |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seek, dali, clips = row["seek"], row["dali"], row["clips"]
        decoded = dali.get("refused") and f"{dali['decoder']}: no such codec" or f"{dali['decoder']}: " \
            f"{dali['identical']}/{dali['frames']}"  # fmt: skip
        psnr = "" if "refused" in dali else f"{dali['psnr_db']}, {dali['psnr_min_db']} dB"
        lines.append(
            f"| {row['video']} | {row['codec']} {row['size']} | {seek['seeks']} | {seek['identical']}/{seek['frames']} "
            f"| {seek['packets_identical']}/{seek['frames']} | {decoded} | {psnr} | {clips.get('plain_db', '')} dB "
            f"| {clips.get('colour_db', '')} dB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clips", type=int, default=4, help="real UCF101 clips")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in videos(Path(folder), options.clips):
            rows.append(measure(name, path, device))
            print(json.dumps(rows[-1]), flush=True)
    about = world(device.type) | {"dali": nvidia.dali.__version__, "pyav": av.__version__}
    name = "decode_parity" if device.type == "cpu" else f"decode_parity_{device.type}"
    write_result(f"{name}.json", json.dumps(about | {"rows": rows}, indent=1) + "\n")
    write_result(f"{name}.md", table(rows, about))


if __name__ == "__main__":
    main()
