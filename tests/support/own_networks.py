"""A Python file with networks as users write them, named by `model.arch = "net.py:..."`."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''
import torch
from torch import nn

SCALE = torch.linspace(0.5, 1.5, 8)


class Tokens(nn.Module):
    """Without BatchNorm, with dropout, a parameter of its own, a frozen one, a buffer, and two layers that share their
    weights; every linear layer is used twice."""

    def __init__(self, width: int = 8, depth: int = 2, dropout: float = 0.1, output: str = "tokens"):
        super().__init__()
        self.output = output
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.fixed = nn.Parameter(torch.randn(1, 1, width), requires_grad=False)
        self.register_buffer("scale", SCALE[:width].clone())
        self.embed = nn.Conv3d(3, width, (4, 8, 8), (4, 8, 8))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.blocks[0][1].weight

    def forward(self, clips):
        maps = self.embed(clips)
        x = maps.flatten(2).transpose(1, 2) * self.scale + self.fixed
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = x + self.drop(torch.tanh(block(x)))
        x = self.tied(x)
        if self.output == "maps":
            return x[:, 1:].transpose(1, 2).unflatten(2, maps.shape[2:])
        return x if self.output == "tokens" else x[:, 0]


class Normed(nn.Module):
    """Maps, with BatchNorm."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, width, (2, 4, 4), (2, 4, 4)), nn.BatchNorm3d(width), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU())

    def forward(self, clips):
        return self.layer1(self.stem(clips))


def tokens(depth):
    return Tokens(depth=depth)


class Returns(nn.Module):
    """Returns what its function makes of the clips."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(3, 4)

    def forward(self, clips):
        return self.function(self.linear(clips.mean((2, 3, 4))), clips)


def refuses():
    def function(x, clips):
        raise ValueError(f"T must be 16, got {clips.shape[2]}")
    return Returns(function)


RETURNED = {
    "number": lambda x, clips: 3.0,
    "pair": lambda x, clips: (x, x),
    "whole": lambda x, clips: x.long(),
    "image": lambda x, clips: x[:, :, None, None],
    "vector": lambda x, clips: x[0],
    "rows": lambda x, clips: torch.cat([x, x]),
    "nothing": lambda x, clips: x[:, :0],
    "fewer": lambda x, clips: x if len(x) == 1 else x[:, :3],
    "tokens": lambda x, clips: x if len(x) == 1 else x[:, None],
    "half": lambda x, clips: x.bfloat16(),
    "nan": lambda x, clips: x / 0 * 0,
}


def returns(what):
    return Returns(RETURNED[what])


def half():
    return Tokens().bfloat16()


def meta():
    with torch.device("meta"):
        return Tokens()


def no_network():
    return 3


def fails():
    raise RuntimeError("no luck")


def leaves():
    raise SystemExit(3)


def declares(**values):
    network = Normed()
    for name, value in values.items():
        setattr(network, name, value)
    return network


def lazy():
    return nn.Sequential(nn.Conv3d(3, 4, 8, 8), nn.Flatten(), nn.LazyLinear(6))


from os import system  # noqa: E402
'''


def write(folder: Path, source: str = SOURCE) -> str:
    """Writes net.py and returns its path."""
    path = folder / "net.py"
    path.write_text(source)
    return str(path)
