"""mil_nce and its peers: 5 positives per row, temperature .07, D = 128.

"forward": only the loss. "gradient": the loss and its gradient to the query. "memory gradient": to the memory too.
Letters: B queries, K memory entries, D width, P positives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forms import Unavailable, compiled, graphed, in_variant, need_cuda, peer

from cpr_fast.ops import mil_nce, mil_nce_ref

OP, DIRECTIONS = "mil_nce", ("forward", "gradient", "memory gradient")
D, P, TEMPERATURE = 128, 5, 0.07


@dataclass(frozen=True)
class Inputs:
    query: Tensor  # [B, D]
    own_key: Tensor  # [B, D]
    memory: Tensor  # [K, D]
    positives: Tensor  # [B, P]
    direction: str

    @property
    def all(self) -> tuple[Tensor, ...]:
        return self.query, self.own_key, self.memory, self.positives


def make_inputs(B: int, K: int, device: str, direction: str, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    features = [torch.randn(rows, D, generator=generator, device=device) for rows in (B, B, K)]
    features = [normalize(rows, dim=1).to(dtype) for rows in features]
    first = torch.randint(K, (B, 1), generator=generator, device=device)
    slots = (first + torch.arange(P, device=device) * (K // P)) % K  # distinct within a row
    features[0].requires_grad_(direction != "forward")
    features[2].requires_grad_(direction == "memory gradient")
    return Inputs(*features, slots, direction)


def work(B: int, K: int, direction: str) -> tuple[float, float]:
    """Returns the operations and the moved elements that every form needs.

    The loss needs the scores; the gradient to the query, their product with the keys. The gradient to the memory needs
    the scores again and another product, and is written once.
    """
    passes, sweeps = {"forward": (1, 1), "gradient": (2, 1), "memory gradient": (4, 3)}[direction]
    return passes * 2 * B * K * D, (sweeps * K + 4 * B) * D


def error(inputs: Inputs, result: tuple | Tensor) -> float:
    """Returns the largest error of the loss and of the gradient's first rows, relative to the largest float64 value
    of each.
    """
    B, K = len(inputs.query), len(inputs.memory)
    step = max(1, 2**23 // K)
    query, own_key, memory = (x.detach().double() for x in inputs.all[:3])
    query.requires_grad_()
    with torch.set_grad_enabled(inputs.direction != "forward"):
        losses, gradient = [], None
        for rows in (slice(begin, begin + step) for begin in range(0, B, step)):
            loss = mil_nce_ref(query[rows], own_key[rows], memory, inputs.positives[rows], reduction="none")
            losses.append(loss.detach())
            if gradient is None and inputs.direction != "forward":
                gradient = torch.autograd.grad(loss.sum() / B, query)[0][rows]
    found = result if isinstance(result, tuple) else (result,)
    pairs = [(found[0].detach().double(), torch.cat(losses).mean())]
    if gradient is not None:
        pairs.append((found[1][: len(gradient)].double(), gradient))
    return max(((value - truth).abs().max() / truth.abs().max()).item() for value, truth in pairs)


# ---- in plain torch ------------------------------------------------------------------------------------------
def lean(query: Tensor, own_key: Tensor, memory: Tensor, positives: Tensor) -> Tensor:
    """Computes the difference of two logsumexps; the scores of positives are gathered."""
    own = (query * own_key).sum(1, keepdim=True)
    scores = torch.cat([own, query @ memory.T], 1) / TEMPERATURE
    picked = torch.cat([scores[:, :1], scores[:, 1:].gather(1, positives)], 1)
    return (scores.logsumexp(1) - picked.logsumexp(1)).mean()


def published(query: Tensor, own_key: Tensor, memory: Tensor, positives: Tensor) -> Tensor:
    """Computes softmax, mask and log, as the published code does."""
    own = (query * own_key).sum(1, keepdim=True)
    scores = torch.cat([own, query @ memory.T], 1) / TEMPERATURE
    mask = torch.zeros_like(scores).scatter_(1, positives + 1, 1.0)
    mask[:, 0] = 1
    return -(scores.softmax(1) * mask).sum(1).log().mean()


def attention(query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Returns softmax(query . memory / temperature) @ memory [B, D], and the logsumexp [B]."""
    rows, keys = query.detach()[None, None], memory.detach()[None, None]
    aten, scale = torch.ops.aten, 1 / TEMPERATURE
    if not query.is_cuda:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, keys, scale=scale)[:2]
    elif query.dtype == torch.float32:
        output, lse = aten._scaled_dot_product_efficient_attention(rows, keys, keys, None, True, scale=scale)[:2]
    else:
        output, lse = aten._scaled_dot_product_flash_attention(rows, keys, keys, scale=scale)[:2]
    return output[0, 0], lse.flatten()[: len(query)]


def attention_form(query: Tensor, own_key: Tensor, memory: Tensor, positives: Tensor, with_gradient: bool):
    """Uses attention with the keys as values: one fused call returns the logsumexp and the sum of the gradient."""
    output, lse = attention(query, memory)
    picked = torch.cat([own_key[:, None], memory.detach()[positives]], 1)  # [B, 1 + P, D]
    picked_scores = torch.einsum("bd,bpd->bp", query.detach(), picked) / TEMPERATURE
    all_lse = torch.logaddexp(lse, picked_scores[:, 0])
    loss = (all_lse - picked_scores.logsumexp(1)).mean()
    if not with_gradient:
        return loss
    expected_all = output * (lse - all_lse).exp()[:, None] + own_key * (picked_scores[:, :1] - all_lse[:, None]).exp()
    mean_positive = torch.einsum("bp,bpd->bd", picked_scores.softmax(1), picked)
    return loss, (expected_all - mean_positive) / (TEMPERATURE * len(query))


# ---- forms: inputs -> call -----------------------------------------------------------------------------------
def with_gradient(function: Callable, inputs: Inputs) -> Callable:
    """Returns the call for `inputs.direction`; `function` maps the four inputs to the loss."""
    wanted = [x for x in (inputs.query, inputs.memory) if x.requires_grad]

    def call():
        loss = function(*inputs.all)
        return (loss, *torch.autograd.grad(loss, wanted)) if wanted else loss

    return call


def variant(name: str) -> Callable:
    def prepare(inputs: Inputs) -> Callable:
        pairs = len(inputs.query) * len(inputs.memory)
        return in_variant(name, with_gradient(mil_nce, inputs), inputs.query.device, pairs)

    return prepare


def sdpa(inputs: Inputs) -> Callable:
    if inputs.direction == "memory gradient":
        raise Unavailable("the gradient to keys that are also values is not the fused call's")
    return lambda: attention_form(*inputs.all, inputs.direction == "gradient")


def single_positive(cross_entropy: Callable) -> Callable:
    """Wraps peers that support one positive per row: the own keys (B rows) are concatenated in front of the memory."""

    def function(query: Tensor, own_key: Tensor, memory: Tensor, positives: Tensor) -> Tensor:
        targets = torch.arange(len(query), device=query.device)
        return cross_entropy(query / TEMPERATURE, torch.cat([own_key, memory]), targets)

    return function


def cut_cross_entropy(inputs: Inputs) -> Callable:
    need_cuda(inputs.query.device, "cut-cross-entropy")
    library = peer("cut_cross_entropy", "cut-cross-entropy")

    def cross_entropy(rows, keys, targets):  # takes only 16-bit inputs
        return library.linear_cross_entropy(rows.bfloat16(), keys.bfloat16(), targets)

    return with_gradient(single_positive(cross_entropy), inputs)


def liger(inputs: Inputs) -> Callable:
    need_cuda(inputs.query.device, "Liger")
    library = peer("liger_kernel.transformers.functional", "liger-kernel")

    def cross_entropy(rows, keys, targets):
        return library.liger_fused_linear_cross_entropy(rows, keys, targets)

    return with_gradient(single_positive(cross_entropy), inputs)


def inf_cl(inputs: Inputs) -> Callable:
    need_cuda(inputs.query.device, "Inf-CL")
    library = peer("inf_cl", "inf-cl")

    def cross_entropy(rows, keys, targets):
        return library.cal_flash_loss(rows, keys, targets, head_dim=D).mean()

    return with_gradient(single_positive(cross_entropy), inputs)


def own(inputs: Inputs) -> Callable:
    return with_gradient(mil_nce, inputs)


NO_ERROR = ("cut-cross-entropy", "Liger", "Inf-CL")  # one positive per row, so it is a different loss
FORMS: dict[str, Callable[[Inputs], Callable]] = {
    "cpr_fast": own,
    "cpr_fast again": own,
    "cpr_fast avx2": variant("avx2"),
    "cpr_fast portable": variant("portable"),
    "cpr_fast graphed": lambda inputs: graphed(own(inputs), inputs.query.device),
    "lean eager": lambda inputs: with_gradient(lean, inputs),
    "lean eager graphed": lambda inputs: graphed(with_gradient(lean, inputs), inputs.query.device),
    "published form": lambda inputs: with_gradient(published, inputs),
    "SDPA with LSE": sdpa,
    "torch.compile": lambda inputs: with_gradient(compiled(lean), inputs),
    "cut-cross-entropy": cut_cross_entropy,
    "Liger": liger,
    "Inf-CL": inf_cl,
}
