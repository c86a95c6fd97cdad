"""Checks a whole training step, and compares its time with the published step and with the encoders alone.

    python bench/step/training_step.py [--device cuda] [--batch 32] [--frames 32] [--size 128] [--width 1]
                                  [--arch s3d] [--memory 2048] [--seconds 20]

Check: starting from the same weights, memory and clips, a step with the fused operators and a step with their
plain-torch references must give the same loss and the same change of the weights. Time: the steps run in turn, on one
thread on the CPU (see measure.py). CPR has 7 stages. Its cascade also compares keys of the other view: "CoCLR's
encoders" are the three forward passes and the backward pass that every method with a second view needs. Writes
training_step_DEVICE.json and .md to $OUT (default bench/results). The exit status is 1 if the steps differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import RESULTS, samples_s, summary, world, write_result
from published_step import PublishedStep

from cpr_fast.config import Config
from cpr_fast.data.index.index import Index, Video
from cpr_fast.ops import cascade_select_ref, mil_nce, mil_nce_ref
from cpr_fast.pretrain.state.cascade import mine, mining_rates
from cpr_fast.pretrain.state.cycle import CycleState, initial_encoder
from cpr_fast.pretrain.step.step import train_step
from cpr_fast.runtime.distributed import World

VIDEOS, STAGES = 512, 7
LOSS, GRADIENT = 1e-5, 1e-3  # largest accepted relative differences


def start(options: argparse.Namespace, mining: str = "cascade", optimizer: str = "adam") -> CycleState:
    """Returns the state of a cycle whose memory is full of random unit vectors."""
    torch.manual_seed(0)
    index = Index(Video(Path(f"/{i}"), f"{i % 8}", f"{i // 2}", "train", 64, 25.0, 340, 256) for i in range(VIDEOS))
    values = {
        "data": {"batch_size": options.batch, "frames": options.frames, "size": options.size},
        "model": {"arch": options.arch, "width": options.width},
        "memory": {"size": options.memory},
        "mining": {"stages": STAGES},
        "optim": {"name": optimizer, "weight_decay": 0.0},
        "schedule": {"cycles": [{"view": "rgb", "epochs": 1, "mining": mining}]},
    }
    config = Config.from_dict(values)
    state = CycleState(config, config.schedule.cycles[0], {}, index, World(0, 1, torch.device(options.device)))
    ids = torch.arange(options.memory, device=options.device)
    features = normalize(torch.randn(2, options.memory, config.model.feature_dim), dim=2)[: len(state.views)]
    state.memory.enqueue(
        features.to(options.device), source=ids, video=ids % VIDEOS, label=ids % 8, start=ids, step=-1
    )  # fmt: skip
    return state


def make_batch(options: argparse.Namespace) -> SimpleNamespace:
    """Returns random clips of both views."""
    device, B = options.device, options.batch
    draw = torch.Generator().manual_seed(1)
    shape = (B, 2, 3, options.frames, options.size, options.size)
    video = torch.randperm(VIDEOS, generator=draw)[:B].to(device)
    clips = {view: torch.randn(shape, generator=draw).to(device) for view in ("rgb", "flow")}
    first = torch.zeros(B, 2, dtype=torch.int64, device=device)
    return SimpleNamespace(clips=clips, video=video, source=video // 2, label=video % 8, start=first, plan=video)


@contextmanager
def references() -> Iterator[None]:
    """Replaces the operators by their plain-torch references."""
    with (
        mock.patch("cpr_fast.pretrain.state.cascade.cascade_select", cascade_select_ref),
        mock.patch("cpr_fast.pretrain.step.contrast.mil_nce", mil_nce_ref),
    ):
        yield


def one_step(options: argparse.Namespace, batch: SimpleNamespace) -> tuple[float, Tensor]:
    """Returns the loss and the change of the weights [W] of a first step, which is proportional to the gradient."""
    state = start(options, optimizer="sgd")
    before = torch.cat([p.detach().flatten() for p in state.encoders.query.parameters()]).double()
    loss = train_step(state, batch, 0).loss.item()
    after = torch.cat([p.detach().flatten() for p in state.encoders.query.parameters()]).double()
    return loss, before - after


def agreement(options: argparse.Namespace, batch: SimpleNamespace) -> dict[str, float]:
    """Returns the relative differences of loss and gradient between the fused operators and the references."""
    loss, gradient = one_step(options, batch)
    with references():
        expected, theirs = one_step(options, batch)
    return {
        "loss_difference": abs(loss / expected - 1),
        "gradient_difference": ((gradient - theirs).norm() / theirs.norm()).item(),
    }


def steps(options: argparse.Namespace, batch: SimpleNamespace) -> dict[str, Callable]:
    """Returns the steps to compare, by name."""
    infonce, cpr = start(options, "none"), start(options)
    cascade, both = cpr.cascades[0], normalize(torch.randn(2, options.memory, cpr.memory.features.shape[2]), dim=2)
    published = {}
    for name, views, keep in (("InfoNCE", (), ()), ("CPR", cascade.views, cascade.keep)):
        encoders = [initial_encoder(cpr.config, view, {}).to(options.device) for view in ("rgb", "flow")]
        source = torch.arange(options.memory, device=options.device)
        published[name] = PublishedStep(*encoders, both.to(options.device), source, views, keep)
    encoders = start(options).encoders

    def bare(*, others: bool) -> None:
        features = encoders.encode_query(batch.clips["rgb"][:, 0])
        if others:
            with torch.no_grad():
                encoders.encode_keys(batch.clips["rgb"][:, 1], 0)
                encoders.encode_other(batch.clips["flow"][:, 1])
        features.sum().backward()
        for weight in encoders.query.parameters():
            weight.grad = None

    return {
        "query encoder, forward and backward": lambda: bare(others=False),
        "CoCLR's encoders": lambda: bare(others=True),
        "cpr_fast, InfoNCE": lambda: train_step(infonce, batch, 0),
        "cpr_fast, CPR": lambda: train_step(cpr, batch, 0),
        "published, InfoNCE": lambda: published["InfoNCE"](batch.clips, batch.source),
        "published, CPR": lambda: published["CPR"](batch.clips, batch.source),
    }


def parts(options: argparse.Namespace, batch: SimpleNamespace) -> dict[str, Callable]:
    """Returns the parts of a CPR step other than the encoders, by name."""
    state = start(options)
    width = state.config.model.feature_dim
    query = normalize(torch.randn(2, options.batch, width, device=options.device), dim=2).requires_grad_()
    mining = (query.detach(), state.memory, batch.source, state.cascades[0])
    slots = mine(*mining)

    def loss(positives: Tensor | None = None) -> None:
        torch.autograd.grad(mil_nce(query[0], query[1].detach(), state.memory.features[0], positives), query)

    return {
        "mining": lambda: mine(*mining),
        "rates of mining, for the log": lambda: mining_rates(*mining, slots, batch.label, 0),
        "loss and gradient, CPR": lambda: loss(slots),
        "loss and gradient, InfoNCE": loss,
    }


def page(report: dict) -> str:
    shape = f"{report['arch']}, "
    shape += f"batch {report['batch']}, {report['frames']}x{report['size']}x{report['size']}, width {report['width']:g}"
    lines = [
        "# A training step", "",
        f"`{report['command']}`, {report['device']}, torch {report['torch']}, commit {report['commit']}; {shape}, "
        f"memory {report['memory']}, {STAGES} stages; medians, on a CPU the time of one thread.", "",
        "| step | ms | of the published CPR step |", "|---|---|---|",
    ]  # fmt: skip
    slowest = report["steps"]["published, CPR"]["time_ms"]
    for name, row in report["steps"].items():
        lines.append(f"| {name} | {row['time_ms']:.1f} | {row['time_ms'] / slowest:.3f} |")
    lines += ["", "| part of a step | ms |", "|---|---|"]
    lines += [f"| {name} | {row['time_ms']:.3f} |" for name, row in report["parts"].items()]
    lines += [
        "",
        f"**CPR adds {100 * report['over_infonce']:.2f} % to an InfoNCE step with the same encoders**: mining, its "
        "rates and the larger loss. Fused operators against their plain-torch references, relative difference: loss "
        f"{report['loss_difference']:.1g}, gradient {report['gradient_difference']:.1g}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    defaults = {"batch": 32, "frames": 32, "size": 128, "width": 1.0, "memory": 2048, "seconds": 20.0}
    parser.add_argument("--arch", default="s3d")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True  # the two steps differ only in the operators
    torch.backends.cudnn.allow_tf32 = False
    batch = make_batch(options)
    report = vars(options) | world(options.device) | agreement(options, batch)
    for table, calls in (("parts", parts(options, batch)), ("steps", steps(options, batch))):
        budget_s = options.seconds if table == "steps" else options.seconds / 4
        report[table] = {name: summary(v) for name, v in samples_s(calls, options.device, budget_s).items()}
    of = {name: row["time_ms"] for name, row in report["parts"].items()}
    extra_ms = sum(of.values()) - 2 * of["loss and gradient, InfoNCE"]
    report["over_infonce"] = extra_ms / (report["steps"]["cpr_fast, CPR"]["time_ms"] - extra_ms)
    report["agree"] = report["loss_difference"] < LOSS and report["gradient_difference"] < GRADIENT
    folder = Path(os.environ.get("OUT", RESULTS))
    write_result(f"training_step_{options.device}.json", json.dumps(report, indent=1) + "\n", folder)
    write_result(f"training_step_{options.device}.md", page(report), folder)
    print(page(report))
    raise SystemExit(not report["agree"])


if __name__ == "__main__":
    main()
