"""A short training with the fused operators beside the same training with their plain-torch references.

    python bench/step_comparison.py [--device cuda] [--steps 20] [--batch 32] [--frames 32] [--size 128] [--width 1]
                                    [--seconds 20]

Both start from the same weights, memory and clips. The first loss must agree to rounding, the later ones closely:
small differences grow with training. Also: what mining and loss cost of a step, for 7 stages and for InfoNCE alone.
Writes step_comparison_DEVICE.json into $OUT (default bench/results); exit status 1 where the losses part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from measure import RESULTS, samples_s, world, write_result
from torch.nn.functional import normalize

from cpr_fast.config import Config
from cpr_fast.data.index import Index, Video
from cpr_fast.distributed import World
from cpr_fast.ops import cascade_select_ref, mil_nce, mil_nce_ref
from cpr_fast.pretrain.cycle import CycleState
from cpr_fast.pretrain.mining import mine, mining_rates
from cpr_fast.pretrain.step import train_step

VIDEOS, K = 512, 2048
FIRST, LATER = 1e-4, 2e-2  # relative differences of the first loss, of the mean of the last five


def start(options: argparse.Namespace) -> CycleState:
    """A cycle of CPR with 7 stages whose memory is full of random unit features."""
    torch.manual_seed(0)
    index = Index(Video(Path(f"/{i}"), f"{i % 8}", f"{i // 2}", "train", 64, 25.0, 340, 256) for i in range(VIDEOS))
    values = {
        "data": {"batch_size": options.batch, "frames": options.frames, "size": options.size},
        "model": {"width": options.width},
        "memory": {"size": K},
        "mining": {"stages": 7},
        "schedule": {"cycles": [{"view": "rgb", "epochs": 1}]},
    }
    config = Config.from_dict(values)
    state = CycleState(config, config.schedule.cycles[0], {}, index, World(0, 1, torch.device(options.device)))
    state.set_learning_rate(1e-3)
    features = normalize(torch.randn(2, K, config.model.feature_dim), dim=2).to(options.device)
    ids = torch.arange(K, device=options.device)
    state.memory.enqueue(features, source=ids, video=ids % VIDEOS, label=ids % 8, start=ids, step=-1)
    return state


def batches(options: argparse.Namespace):
    """Random clips that repeat every fourth step."""
    device, B = options.device, options.batch
    shape = (B, 2, 3, options.frames, options.size, options.size)
    for step in range(options.steps):
        draw = torch.Generator(device).manual_seed(step % 4)
        video = torch.randperm(VIDEOS, generator=torch.Generator().manual_seed(step % 4))[:B].to(device)
        clips = {view: torch.randn(shape, generator=draw, device=device) for view in ("rgb", "flow")}
        first = torch.zeros(B, 2, dtype=torch.int64, device=device)
        yield SimpleNamespace(clips=clips, video=video, source=video // 2, label=video % 8, start=first)


@contextmanager
def references():
    """The operators' plain-torch twins in their place."""
    with (
        mock.patch("cpr_fast.pretrain.mining.cascade_select", cascade_select_ref),
        mock.patch("cpr_fast.pretrain.contrast.mil_nce", mil_nce_ref),
    ):
        yield


def losses(options: argparse.Namespace) -> list[float]:
    state = start(options)
    return [train_step(state, batch, step).loss.item() for step, batch in enumerate(batches(options))]


def shares(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step, and in it of mining, of the rates logged of it, and of the loss with its gradient."""
    state, batch = start(options), next(batches(options))
    query = normalize(torch.randn(2, options.batch, 128, device=options.device), dim=2).requires_grad_()
    mining = (query.detach(), state.memory, batch.source, state.cascades[0])
    slots = mine(*mining)

    def loss(positives=None):
        value = mil_nce(query[0], query[1].detach(), state.memory.features[0], positives)
        torch.autograd.grad(value, query)

    calls = {
        "step": lambda: train_step(state, batch, 0),
        "mining_7_stages": lambda: mine(*mining),
        "mining_rates": lambda: mining_rates(*mining, slots, batch.label, 0),
        "loss_mined": lambda: loss(slots),
        "loss_infonce": loss,
    }
    return {
        f"{name}_ms": 1e3 * statistics.median(v)
        for name, v in samples_s(calls, options.device, options.seconds).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in {"steps": 20, "batch": 32, "frames": 32, "size": 128, "width": 1.0, "seconds": 20.0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    torch.backends.cudnn.deterministic = True  # the two runs may differ in the operators alone
    torch.backends.cudnn.allow_tf32 = False
    fused = losses(options)
    with references():
        plain = losses(options)
    report = vars(options) | world(options.device) | shares(options) | {"fused": fused, "plain": plain}
    report["first_difference"] = abs(fused[0] / plain[0] - 1)
    report["later_difference"] = abs(sum(fused[-5:]) / sum(plain[-5:]) - 1)
    extra_ms = report["mining_7_stages_ms"] + report["loss_mined_ms"] - report["loss_infonce_ms"]
    report["cost_over_infonce"] = extra_ms / report["step_ms"]
    report["agree"] = report["first_difference"] < FIRST and report["later_difference"] < LATER
    folder = Path(os.environ.get("OUT", RESULTS))
    write_result(f"step_comparison_{options.device}.json", json.dumps(report, indent=1) + "\n", folder)
    print(json.dumps({key: value for key, value in report.items() if key not in ("fused", "plain")}, indent=1))
    raise SystemExit(not report["agree"])


if __name__ == "__main__":
    main()
