"""cascade_mil_nce and two calls, cascade_select and mil_nce, in one run: mining and loss of queries that both compare.

    python bench/kernels/joint_forms.py [--shapes 32x2048 ...] [--seconds 6] [--out bench/results]

It prints the comparison and writes cascade_mil_nce_cpu.json and .md. The inputs are those of the two operators' own
benchmarks. "forward": the loss and the selected slots. "gradient": the gradient to the query too.
Letters: B queries, K memory entries, D width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cascade_forms
import loss_forms
from forms import CPU_SHAPES
from measure import RESULTS, measure_rates, world, write_result
from page import HEADER, markdown_table, tables

from cpr_fast.ops import cascade_mil_nce, cascade_select, mil_nce

OP, DIRECTIONS = "cascade_mil_nce", ("forward", "gradient")
D, VIEW = cascade_forms.D, 0


@dataclass(frozen=True)
class Inputs:
    cascade: cascade_forms.Inputs
    query: Tensor  # [B, D], the queries of the cascade in VIEW
    own_key: Tensor  # [B, D]
    direction: str


def make_inputs(B: int, K: int, device: str, direction: str, dtype: torch.dtype) -> Inputs:
    cascade = cascade_forms.make_inputs(B, K, device, direction, dtype)
    own_key = loss_forms.make_inputs(B, K, device, direction, dtype).own_key
    cascade.queries.requires_grad_(direction == "gradient")
    return Inputs(cascade, cascade.queries[VIEW], own_key, direction)


def work(B: int, K: int, direction: str) -> tuple[float, float]:
    """Returns the operations and the moved elements that every form needs: the scores of both views, which are also
    those of the loss, and for the gradient their product with the keys of one view."""
    return (2 if direction == "forward" else 3) * 2 * B * K * D, 2 * (B + K) * D


def error(inputs: Inputs, result: tuple) -> float:
    """Returns the error of loss and gradient for the slots that the form selected."""
    loss, slots, *gradient = result
    memory = inputs.cascade.memory[VIEW]
    sides = loss_forms.Inputs(inputs.query, inputs.own_key, memory, slots, inputs.direction)
    return loss_forms.error(sides, (loss, *(x[VIEW] for x in gradient)))


def with_gradient(function: Callable[[Inputs], tuple[Tensor, Tensor]]) -> Callable[[Inputs], Callable]:
    def prepare(inputs: Inputs) -> Callable:
        queries = inputs.cascade.queries

        def call():
            loss, slots = function(inputs)
            return (loss, slots, *(torch.autograd.grad(loss, queries) if queries.requires_grad else ()))

        return call

    return prepare


def joint(inputs: Inputs) -> tuple[Tensor, Tensor]:
    queries, memory, views, keep = inputs.cascade.all
    return cascade_mil_nce(queries, inputs.own_key, memory, views, keep, view=VIEW, temperature=loss_forms.TEMPERATURE)


def two_calls(inputs: Inputs) -> tuple[Tensor, Tensor]:
    queries, memory, views, keep = inputs.cascade.all
    slots, _ = cascade_select(queries, memory, views, keep)
    loss = mil_nce(queries[VIEW], inputs.own_key, memory[VIEW], slots, temperature=loss_forms.TEMPERATURE)
    return loss, slots


def eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    queries, memory, views, keep = inputs.cascade.all
    slots = cascade_forms.gathered(queries.detach(), memory, views, keep)
    return loss_forms.lean(queries[VIEW], inputs.own_key, memory[VIEW], slots), slots


NO_ERROR = ()
FORMS: dict[str, Callable[[Inputs], Callable]] = {
    "cpr_fast": with_gradient(joint),
    "cpr_fast again": with_gradient(joint),
    "two calls": with_gradient(two_calls),
    "best eager and lean eager": with_gradient(eager),
}


def run(shapes: list[tuple[int, int]], budget_s: float, out: Path) -> None:
    import compare

    torch.set_num_threads(1)
    this, rates, rows = sys.modules[__name__], measure_rates("cpu"), []
    for direction, shape in product(DIRECTIONS, shapes):
        rows += compare.compare(this, list(FORMS), shape, direction, torch.float32, rates, budget_s)
        print(f"{OP}, {direction}, B = {shape[0]}, K = {shape[1]}: done", flush=True)
    report = {"world": world("cpu"), "rows": rows}
    about = report["world"]
    text = [
        "# Mining and loss in one call\n",
        f"`{about['command']}` at {about['commit']}, torch {about['torch']}, on {about['device']}.\n",
        "CPU time of one thread, the forms in turn in one process: medians (quartiles). `x ours`: how many times as "
        "long as one call of `cascade_mil_nce` (`cpr_fast`) the form takes; `cpr_fast again` is the same call once "
        "more. The other columns are those of kernels_cpu.md. The error is that of the loss and the gradient.\n",
    ]
    for title, table in tables(report):
        text += [f"## {title}\n", markdown_table(HEADER, table)]
    write_result(f"{OP}_cpu.json", json.dumps(report, indent=1) + "\n", out)
    write_result(f"{OP}_cpu.md", "\n".join(text), out)
    print("\n".join(text))


def main() -> None:
    import compare

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=compare.shape_of, nargs="+", default=CPU_SHAPES, help="BxK")
    parser.add_argument("--seconds", type=float, default=6, help="total time of all forms of a shape")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    run(options.shapes, options.seconds, options.out)


if __name__ == "__main__":
    main()
