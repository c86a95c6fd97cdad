"""Compares the accuracy and the time of training with torch's BatchNorm and with that of cpr_fast, on the CPU.

    OMP_WAIT_POLICY=passive python bench/step/batch_norm.py [--seconds 60] [--clips 16] [--draws 9]

Accuracy: relative differences from float64 of a layer, of the pooled features of a network, and of the gradient of its
weights for a random gradient of the features. Time: InfoNCE steps run in turn, see measure.py. On two threads it is the
sum over both; OMP_WAIT_POLICY=passive leaves out the time in which one waits for the other. The other sums over clips
and pixels that occur in the networks are measured, too. Writes batch_norm.json and .md to $OUT (default bench/results).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import RESULTS, samples_s, summary, world, write_result
from training_step import make_batch, start

from cpr_fast.models import C3D, R3D, S3D
from cpr_fast.models.s3d import SelfGating, TemporalConv
from cpr_fast.ops import BatchNorm1d, BatchNorm3d, batch_norm
from cpr_fast.pretrain.step.step import train_step

FIRST, LAST = torch.contiguous_format, torch.channels_last_3d
LAYERS = {  # N, C, T, H, W and the mean of the inputs, whose standard deviation is 1
    "S3D's first, 64 clips": ((64, 16, 4, 32, 32), 0.0),
    "the same, mean 3": ((64, 16, 4, 32, 32), 3.0),
    "the same, mean 1000": ((64, 16, 4, 32, 32), 1000.0),
    "in the middle": ((64, 48, 4, 16, 16), 0.5),
    "near the end": ((64, 128, 2, 4, 4), 0.5),
    "a matrix of 1024 rows": ((1024, 256), 0.5),
}
NETWORKS = {
    "S3D, width 1/4, 8x64x64": (lambda: S3D(0.25), (3, 8, 64, 64)),
    "R3D, width 1/8, 8x32x32": (lambda: R3D(0.125), (3, 8, 32, 32)),
    "C3D, width 1/8, 8x32x32": (lambda: C3D(0.125), (3, 8, 32, 32)),
}
STEPS = {
    "S3D, width 1/4, 64 clips 8x64x64": {"arch": "s3d", "width": 0.25, "batch": 64, "frames": 8, "size": 64},
    "R3D, width 1/8, 32 clips 8x32x32": {"arch": "r3d", "width": 0.125, "batch": 32, "frames": 8, "size": 32},
}


def torchs() -> AbstractContextManager:
    """Makes all layers run torch's BatchNorm and ReLU."""
    return mock.patch.object(batch_norm, "_has_kernel", lambda *_: False)


def exact_forward(self: nn.Module, x: Tensor, relu: bool = False) -> Tensor:
    """Computes BatchNorm and ReLU in float64: what is left of a network's error is that of its convolutions."""
    y = F.batch_norm(x.double().contiguous(), None, None, self.weight.double(), self.bias.double(), True, 0.0, self.eps)
    return (F.relu(y) if relu else y).to(x.dtype).contiguous(memory_format=LAST)


FORMS: dict[str, tuple[Callable, torch.memory_format]] = {
    "torch, contiguous": (torchs, FIRST),
    "torch, channels last": (torchs, LAST),
    "cpr_fast, channels last": (nullcontext, LAST),
}
EXACT = {
    "BatchNorm in float64, channels last": (lambda: mock.patch.object(BatchNorm3d, "forward", exact_forward), LAST)
}


def outputs(network: nn.Module, x: Tensor, grad: Tensor, memory: torch.memory_format) -> dict[str, Tensor]:
    """Returns the output of a network, and the gradients of x and of all weights as vectors."""
    network = copy.deepcopy(network).to(x.dtype)
    if x.dim() == 5:
        network, x = network.to(memory_format=memory), x.contiguous(memory_format=memory)
    x = x.clone().requires_grad_()
    y = network(x)
    y.backward(grad.to(x.dtype).contiguous(memory_format=memory if y.dim() == 5 else FIRST))
    return {"y": y.detach(), "x": x.grad} | {name: weight.grad for name, weight in network.named_parameters()}


def errors(network: nn.Module, x: Tensor, grad: Tensor, forms: dict = FORMS) -> dict[str, dict[str, float]]:
    """Returns form -> result -> relative difference from float64."""
    exact = outputs(network, x.double(), grad, FIRST)
    found = {}
    for form, (context, memory) in forms.items():
        with context():
            got = outputs(network, x, grad, memory)
        found[form] = {name: ((got[name] - value).norm() / value.norm()).item() for name, value in exact.items()}
        all_got, all_exact = (torch.cat([v.flatten() for v in list(r.values())[2:]] or [r["x"].flatten()])
                              for r in (got, exact))  # fmt: skip
        found[form]["all weights"] = ((all_got - all_exact).norm() / all_exact.norm()).item()
    return found


class Pooled(nn.Module):
    """The features of a backbone [N, C] in the precision of its weights."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x).mean((2, 3, 4))


def layer_errors() -> dict[str, dict]:
    found = {}
    for name, (shape, mean) in LAYERS.items():
        torch.manual_seed(0)
        norm = (BatchNorm3d if len(shape) == 5 else BatchNorm1d)(shape[1])
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        found[name] = errors(norm, torch.randn(shape) + mean, torch.randn(shape) + 0.1)
    return found


def network_errors(clips: int, draws: int) -> dict[str, dict]:
    """Returns the medians over draws of weights and clips, and the largest values as "largest ...".

    A rounding near a jump, of ReLU or max pooling, can move the gradient of a whole network by per cents. The smaller
    the errors in the features are, the fewer draws meet one.
    """
    found = {}
    for name, (build, shape) in NETWORKS.items():
        rows = []
        for seed in range(draws):
            torch.manual_seed(seed)
            network = Pooled(build())
            grad = torch.randn(clips, network.backbone.out_channels)
            rows.append(errors(network, torch.randn(clips, *shape), grad, FORMS | EXACT))
        found[name] = {}
        for form in FORMS | EXACT:
            values = {key: [row[form][key] for row in rows] for key in ("y", "x", "all weights")}
            found[name][form] = {key: statistics.median(of) for key, of in values.items()}
            found[name][form] |= {f"largest {key}": max(of) for key, of in values.items()}
    return found


def other_errors() -> dict[str, dict]:
    """Returns the errors of the other operations that sum over clips, frames or pixels."""
    clips, matrix = (32, 16, 4, 32, 32), (1024, 256)
    operations = {
        "mean pool": (Pooled(nn.Identity()), clips),
        "SelfGating": (SelfGating(16), clips),
        "Conv3d 3x3x3 with bias": (nn.Conv3d(16, 16, 3), clips),
        "Conv3d 1x1x1": (nn.Conv3d(16, 16, 1, bias=False), clips),
        "TemporalConv": (TemporalConv(16, 3, 1), clips),
        "max pool 3x3x3, stride 1": (nn.MaxPool3d(3, 1, 1), clips),
        "Linear, 1024 rows": (nn.Linear(256, 128), matrix),
    }
    found = {}
    for name, (module, shape) in operations.items():
        torch.manual_seed(0)
        x = torch.randn(shape) + 0.5
        with torch.no_grad():
            grad = torch.randn(module(x).shape) + 0.3
        found[name] = errors(module, x, grad)
    return found


def step_times(seconds: float) -> dict[str, dict]:
    """Returns network and threads -> form -> CPU time of an InfoNCE step."""
    found = {}
    for name, shape in STEPS.items():
        options = SimpleNamespace(device="cpu", memory=256, **shape)
        state, batch = start(options, "none"), make_batch(options)

        def before(state=state, batch=batch) -> None:
            with torchs():
                train_step(state, batch, 0)

        calls = {"torch": before, "cpr_fast": lambda state=state, batch=batch: train_step(state, batch, 0)}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[f"{name}; {threads} thread{'s' * (threads > 1)}"] = {
                form: summary(samples) for form, samples in samples_s(calls, "cpu", seconds).items()
            }
    return found


def error_table(title: str, found: dict[str, dict], columns: dict[str, str]) -> list[str]:
    lines = ["", f"| {title} | form | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for name, forms in found.items():
        for form, row in forms.items():
            cells = (f"{row[key]:.1e}" if key in row else "" for key in columns.values())
            lines.append(f"| {name} | {form} | {' | '.join(cells)} |")
    return lines


def page(report: dict) -> str:
    lines = [
        "# BatchNorm in training on the CPU", "",
        f"`{report['command']}`, {report['device']}, torch {report['torch']}, commit {report['commit']}. Errors are "
        "relative differences from float64, in the Euclidean norm. torch's layers are followed by its ReLU; cpr_fast "
        "computes both together.",
        *error_table("one layer", report["layers"],
                     {"output": "y", "gradient of x": "x", "of the weight": "weight", "of the bias": "bias"}),
        *error_table(f"network, {report['draws']} draws of {report['clips']} clips: median", report["networks"],
                     {"pooled features": "y", "largest": "largest y", "gradient of all weights": "all weights",
                      "largest ": "largest all weights"}),
        "", "| InfoNCE step, CPU time | torch, ms | cpr_fast, ms | ratio |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, row in report["steps"].items():
        old, new = row["torch"]["time_ms"], row["cpr_fast"]["time_ms"]
        lines.append(f"| {name} | {old:.0f} | {new:.0f} | {new / old:.3f} |")
    lines += [
        "",
        "Medians; both forms run in turn, and with two threads the time is the sum over both.",
        "",
        "Other sums over clips, frames or pixels, all torch's:",
    ]
    lines += error_table("operation", {name: {form: row for form, row in forms.items() if form.startswith("torch")}
                                       for name, forms in report["others"].items()},
                         {"output": "y", "gradient of x": "x", "of the weights": "all weights"})  # fmt: skip
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time budget of each row of steps; 0 for none")
    parser.add_argument("--clips", type=int, default=16, help="clips for the accuracy of networks")
    parser.add_argument("--draws", type=int, default=9, help="draws of weights and clips for the accuracy of networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = vars(options) | world("cpu")
    report["command"] = f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', '')} {report['command']}"
    report |= {
        "layers": layer_errors(),
        "others": other_errors(),
        "networks": network_errors(options.clips, options.draws),
    }
    report["steps"] = step_times(options.seconds) if options.seconds else {}
    out = Path(os.environ.get("OUT", RESULTS))
    write_result("batch_norm.json", json.dumps(report, indent=1) + "\n", out)
    write_result("batch_norm.md", page(report), out)
    print(page(report))


if __name__ == "__main__":
    main()
