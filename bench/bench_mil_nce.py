"""mil_nce, loss and gradient to the query, beside the strongest forms in plain torch.

`PYTHONPATH=. python bench/bench_mil_nce.py` measures single-thread CPU time of the process, all forms interleaved in
one run, and writes one JSON row per form and shape to bench/results/mil_nce_cpu.jsonl. `pytest bench --benchmark-only`
times the same forms by wall clock.
"""

import pytest
import torch
from measure import SHAPES, measure_interleaved, write_rows
from torch.nn.functional import normalize

from cpr_fast.ops import mil_nce

D, P, TEMPERATURE = 128, 5, 0.07


def eager_lean(query, own_key, memory, positives):
    """Difference of two logsumexps; the positives' scores are gathered."""
    own = (query * own_key).sum(1, keepdim=True)
    scores = torch.cat([own, query @ memory.T], 1) / TEMPERATURE
    picked = torch.cat([scores[:, :1], scores[:, 1:].gather(1, positives)], 1)
    return (scores.logsumexp(1) - picked.logsumexp(1)).mean()


def eager_published(query, own_key, memory, positives):
    """softmax, mask, log: the form of the published code."""
    own = (query * own_key).sum(1, keepdim=True)
    scores = torch.cat([own, query @ memory.T], 1) / TEMPERATURE
    mask = torch.zeros_like(scores).scatter_(1, positives + 1, 1.0)
    mask[:, 0] = 1
    return -(scores.softmax(1) * mask).sum(1).log().mean()


def sdpa(query, own_key, memory, positives):
    """Attention whose values are the keys returns logsumexp and the gradient's sum in one fused call."""
    keys = memory[None, None]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.detach()[None, None], keys, keys, scale=1 / TEMPERATURE
    )[:2]
    query_rows, output, lse = query.detach(), output[0, 0], lse.flatten()
    picked = torch.cat([own_key[:, None], memory[positives]], 1)  # [B, 1 + P, D]
    picked_scores = torch.einsum("bd,bpd->bp", query_rows, picked) / TEMPERATURE
    all_lse = torch.logaddexp(lse, picked_scores[:, 0])
    weights = picked_scores.softmax(1)
    expected_all = output * (lse - all_lse).exp()[:, None] + own_key * (picked_scores[:, :1] - all_lse[:, None]).exp()
    grad = (expected_all - torch.einsum("bp,bpd->bd", weights, picked)) / (TEMPERATURE * len(query))
    return (all_lse - picked_scores.logsumexp(1)).mean(), grad


def with_gradient(loss_form):
    def call(query, own_key, memory, positives):
        loss = loss_form(query, own_key, memory, positives)
        return loss, torch.autograd.grad(loss, query)[0]

    return call


FORMS = {
    "cpr_fast": with_gradient(mil_nce),
    "eager_lean": with_gradient(eager_lean),
    "eager_published": with_gradient(eager_published),
    "sdpa": sdpa,
}


def arguments(B, K):
    generator = torch.Generator().manual_seed(0)
    query, own_key, memory = (normalize(torch.randn(size, D, generator=generator), dim=1) for size in (B, B, K))
    positives = torch.rand(B, K, generator=generator).topk(P, dim=1).indices
    return query.requires_grad_(), own_key, memory, positives


@pytest.mark.parametrize(("B", "K"), SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_mil_nce(benchmark, form, B, K):
    benchmark.extra_info.update(B=B, K=K, D=D, P=P, dtype="float32", torch=torch.__version__)
    benchmark(FORMS[form], *arguments(B, K))


if __name__ == "__main__":
    rows = []
    for B, K in SHAPES:
        inputs = arguments(B, K)
        loss, grad = FORMS["cpr_fast"](*inputs)
        for form in FORMS.values():  # the peers compute the same thing
            other_loss, other_grad = form(*inputs)
            torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other_grad, grad, rtol=1e-3, atol=1e-6)
        calls = {name: lambda form=form, inputs=inputs: form(*inputs) for name, form in FORMS.items()}
        rows += measure_interleaved(calls, {"op": "mil_nce", "B": B, "K": K, "D": D, "P": P, "dtype": "float32"})
    write_rows("mil_nce_cpu.jsonl", rows)
