"""A video transformer: a ViT [Dosovitskiy et al. 2021, arXiv:2010.11929] over cuboids of pixels ("tubelets") [Arnab et
al. 2021, arXiv:2103.15691].

Letters: N clips, T frames, H x W pixels, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpr_fast.errors import InputError

_INIT_STD = 0.02  # standard deviation of the initial weights of the linear layers, positions and class token


class Attention(nn.Module):
    """Self-attention of several heads: [N, L, D] -> [N, L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [N, heads, L, D / heads]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a network of two layers, each after a LayerNorm and with a shortcut.

    `drop_path` is the probability, in training, that a clip skips each of the two.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        hidden = int(mlp_ratio * width)
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attention(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        kept = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(kept) / kept


class VideoTransformer(nn.Module):
    """A video transformer, `model.arch = "vit"`. Maps clips [N, 3, T, H, W] to features [N, D].

    Args:
        clip_frames, clip_size: T, and H = W, of the clips; a config need not name them.
        tubelet: frames, height and width of a tubelet, which divide those of the clips.
        depth, width, heads: number of blocks, D, and number of attention heads, which divides D.
        mlp_ratio: width of the hidden layer of a block's network, as a multiple of D.
        positions: "sincos": fixed, from D / 6 frequencies for each of time, height and width; "learned": trained.
        class_token: return the feature of a further token instead of the mean of all tokens.
        drop_path: probability of skipping the last block's layers in training; it grows linearly with the depth.
    """

    def __init__(
        self, clip_frames: int, clip_size: int, tubelet: Sequence[int] = (2, 16, 16), depth: int = 12, width: int = 384,
        heads: int = 6, mlp_ratio: float = 4.0, positions: Literal["sincos", "learned"] = "sincos",
        class_token: bool = False, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        tubelet = tuple(tubelet)
        self.clip_frames, self.clip_size = clip_frames, clip_size
        self._check(tubelet, depth, width, heads, positions, drop_path)
        self.embed = nn.Conv3d(3, width, tubelet, tubelet)
        grid = [length // part for length, part in zip((clip_frames, clip_size, clip_size), tubelet, strict=True)]
        if positions == "sincos":
            self.register_buffer("positions", sincos(grid, width), persistent=False)
        else:
            self.positions = nn.Parameter(torch.empty(math.prod(grid), width))
            nn.init.trunc_normal_(self.positions, std=_INIT_STD)
        self.class_token = (
            nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=_INIT_STD)) if class_token else None
        )
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, clips: Tensor) -> Tensor:
        shape = [3, self.clip_frames, self.clip_size, self.clip_size]
        if list(clips.shape[1:]) != shape:
            raise ValueError(f"clips: expected [N, {', '.join(map(str, shape))}], got {list(clips.shape)}")
        x = self.embed(clips).flatten(2).transpose(1, 2) + self.positions
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0] if self.class_token is not None else x.mean(1)

    def _check(
        self, tubelet: tuple[int, ...], depth: int, width: int, heads: int, positions: str, drop_path: float
    ) -> None:
        """Raises InputError that names the argument that is out of range."""
        lengths = (self.clip_frames, self.clip_size, self.clip_size)
        fits = len(tubelet) == 3 and all(p > 0 and n % p == 0 for n, p in zip(lengths, tubelet, strict=True))
        if not fits:
            raise InputError(
                f"model.args.tubelet: expected three numbers that divide the {self.clip_frames} frames, the height and "
                f"the width of {self.clip_size} pixels of a clip, got {list(tubelet)}"
            )
        if depth < 1 or width < 6 or heads < 1 or width % heads:
            raise InputError(
                "model.args: expected a depth of 1 or more, and a width of 6 or more that is a multiple of heads, got "
                f"depth {depth}, width {width} and heads {heads}"
            )
        if positions not in ("sincos", "learned"):
            raise InputError(f"model.args.positions: expected 'sincos' or 'learned', got {positions!r}")
        if not 0 <= drop_path < 1:
            raise InputError(f"model.args.drop_path: expected a probability in [0, 1), got {drop_path}")


def sincos(grid: Sequence[int], width: int) -> Tensor:
    """Returns fixed positions of the cells of a grid of time, height and width, [cells, D]: for each of the three, the
    sines and cosines of D / 6 angles per step, from 1 down to about 1 / 10,000."""
    count = width // 6
    frequencies = 10_000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    places = torch.cartesian_prod(*(torch.arange(length, dtype=torch.float64) for length in grid))  # [cells, 3]
    angles = (places[:, :, None] * frequencies).flatten(1)  # [cells, 3 * count]
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width - 6 * count)).float()
