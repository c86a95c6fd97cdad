"""cascade_select beside the strongest forms in plain torch.

`PYTHONPATH=. python bench/bench_cascade_select.py` measures single-thread CPU time of the process, all forms
interleaved in one run (wall time of two threads is bimodal on shared machines), and writes one JSON row per form and
shape to bench/results/cascade_select_cpu.jsonl. `pytest bench --benchmark-only` times the same forms by wall clock.
"""

import pytest
import torch
from measure import SHAPES, measure_interleaved, write_rows
from torch.nn.functional import normalize

from cpr_fast.ops import cascade_select

D, STAGES, RATIO, TOP_K = 128, 7, 0.5, 5


def schedule(K):
    views = [(STAGES - 1 - s) % 2 for s in range(STAGES)]
    return views, [max(TOP_K, int(K * RATIO**s)) for s in range(1, STAGES)] + [TOP_K]


def eager_gathered(queries, memory, views, keep):
    """The best eager form: topk(sorted=False) on shrinking, gathered sets."""
    scores = [queries[v] @ memory[v].T for v in range(2)]
    slots = None
    for view, count in zip(views, keep, strict=True):
        row = scores[view] if slots is None else scores[view].gather(1, slots)
        best = row.topk(count, dim=1, sorted=False).indices
        slots = best if slots is None else slots.gather(1, best)
    return slots


def eager_masked(queries, memory, views, keep):
    """topk on whole rows, dropped entries masked to -inf."""
    scores = [queries[v] @ memory[v].T for v in range(2)]
    dropped = torch.zeros_like(scores[0], dtype=torch.bool)
    for view, count in zip(views, keep, strict=True):
        best = scores[view].masked_fill(dropped, -torch.inf).topk(count, dim=1).indices
        dropped = torch.ones_like(dropped).scatter_(1, best, False)
    return best


def two_gemms(queries, memory, views, keep):
    """The scores alone, by torch's matrix product."""
    return [queries[v] @ memory[v].T for v in range(2)]


FORMS = {"cpr_fast": cascade_select, "eager_gathered": eager_gathered, "eager_masked": eager_masked, "gemms": two_gemms}


def arguments(B, K):
    generator = torch.Generator().manual_seed(0)
    queries, memory = (normalize(torch.randn(2, size, D, generator=generator), dim=2) for size in (B, K))
    return queries, memory, *schedule(K)


@pytest.mark.parametrize(("B", "K"), SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_cascade_select(benchmark, form, B, K):
    benchmark.extra_info.update(B=B, K=K, D=D, n=STAGES, dtype="float32", torch=torch.__version__)
    benchmark(FORMS[form], *arguments(B, K))


if __name__ == "__main__":
    rows = []
    for B, K in SHAPES:
        inputs = arguments(B, K)
        calls = {name: lambda form=form, inputs=inputs: form(*inputs) for name, form in FORMS.items()}
        shape = {"op": "cascade_select", "B": B, "K": K, "D": D, "n": STAGES, "ratio": RATIO, "top_k": TOP_K}
        rows += measure_interleaved(calls, shape | {"dtype": "float32"})
    write_rows("cascade_select_cpu.jsonl", rows)
