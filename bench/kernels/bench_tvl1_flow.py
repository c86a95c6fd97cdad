"""Compares tvl1_flow with OpenCV's DualTVL1OpticalFlow: CPU time of one thread, interleaved, on real clips.

    python bench/kernels/bench_tvl1_flow.py [--clips 8] [--repeats 3]

Reads videos of UCF101, JHMDB and SHREC'17 from $CPR_FAST_SHARED/data (default ../shared), at the size in which the
latter two are stored there; writes bench/results/tvl1_flow_cpu.json.
It measures CPU time instead of wall time, because the machine may be shared. OpenCV does not report its number of
iterations, so both times are divided by ours; tests/ops/test_tvl1_flow.py checks that the flow is OpenCV's.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import cpu_name, cpu_variants, force_variant, world, write_result
from support import real_clips

from cpr_fast.ops import tvl1_flow

CLIPS = (  # set, width and height, first frame
    ("ucf101_100", (340, 256), 20),
    ("ucf101_100", (160, 120), 20),
    ("jhmdb", (192, 144), 5),
    ("shrec17_depth", (112, 112), 10),
)
MOVING_PX = 0.5  # a pixel counts as moving from this length of OpenCV's flow on
DEFAULTS = (0.25, 0.15, 0.3, 5, 0.8, 5, 0.01, 30, 10, 5)


def opencv_flow(clip: torch.Tensor) -> torch.Tensor:
    """Converts frames [T, H, W] to pairs [T-1, 2, H, W]."""
    pairs = zip(clip.numpy()[:-1], clip.numpy()[1:], strict=True)
    flows = [cv2.optflow.createOptFlow_DualTVL1().calc(first, second, None) for first, second in pairs]
    return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)


def cpu_seconds(function, argument) -> tuple[float, torch.Tensor]:
    start = time.process_time()
    result = function(argument)
    return time.process_time() - start, result


def measure(clips: torch.Tensor, repeats: int) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """Returns the least CPU seconds of OpenCV and of tvl1_flow over the same clips, in turn, and both flows."""
    theirs, ours = [], []
    for _ in range(repeats):
        timed = [(cpu_seconds(opencv_flow, clip), cpu_seconds(tvl1_flow, clip)) for clip in clips]
        theirs.append(sum(opencv[0] for opencv, _ in timed))
        ours.append(sum(own[0] for _, own in timed))
    expected, flow = (torch.stack([pair[side][1] for pair in timed]) for side in (0, 1))
    return min(theirs), min(ours), expected, flow


def spread_of_opencv(clips: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the mean endpoint error of OpenCV without its optimised code against OpenCV with it, pixels.

    The median filter and the stop test amplify a difference in the last bit, in flat images most of all.
    """
    cv2.setUseOptimized(False)
    flow = torch.stack([opencv_flow(clip) for clip in clips])
    cv2.setUseOptimized(True)
    return round((flow - expected).norm(dim=-3).mean().item(), 5)


def endpoint_errors(flow: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    error, moving = (flow - expected).norm(dim=-3), expected.norm(dim=-3) > MOVING_PX
    row = {}
    for name, selected in (("static", ~moving), ("moving", moving)):
        row[f"epe_mean_{name}_px"] = round(error[selected].mean().item(), 5)
        row[f"epe_p99_{name}_px"] = round(float(np.quantile(error[selected].numpy(), 0.99)), 5)
        row[f"{name}_pixels"] = int(selected.sum())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    about = world("cpu")
    rows = []
    for name, size, first in CLIPS:
        clips = real_clips.read_gray(options.clips, 3, size, name, first)
        _, pixel_iterations = torch.ops.cpr_fast.tvl1_flow(clips, *DEFAULTS)
        spread = None
        for variant in cpu_variants():
            force_variant(variant)
            opencv_s, own_s, expected, flow = measure(clips, options.repeats if variant != "portable" else 1)
            total = int(pixel_iterations.sum())
            spread = spread_of_opencv(clips, expected) if spread is None else spread
            rows.append(
                {
                    "op": "tvl1_flow",
                    "set": name,
                    "shape": [*clips.shape],
                    "variant": variant,
                    "ns_per_pixel_iteration": round(own_s / total * 1e9, 3),
                    "opencv_ns_per_pixel_iteration": round(opencv_s / total * 1e9, 2),
                    "ratio": round(opencv_s / own_s, 2),
                    "pair_ms": round(own_s / pixel_iterations.numel() * 1e3, 2),
                    "pixel_iterations": total,
                    **endpoint_errors(flow, expected),
                    "epe_mean_px": round((flow - expected).norm(dim=-3).mean().item(), 5),
                    "epe_mean_opencv_unoptimised_px": spread,
                    "device": f"{cpu_name()}, 1 thread",
                    "commit": about["commit"],
                    "torch": about["torch"],
                    "opencv": cv2.__version__,
                    "command": about["command"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    force_variant(None)
    write_result("tvl1_flow_cpu.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
