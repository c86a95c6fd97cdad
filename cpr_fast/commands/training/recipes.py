"""`cpr-fast recipes`."""

from __future__ import annotations

import textwrap

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.config.recipes import recipes as known


def recipes(*, json: Json = False) -> None:
    """List the recipes that come with the package, which `cpr-fast pretrain NAME` finds from any folder."""
    found = known()
    width = max(map(len, found))
    indent = " " * (width + 2)
    lines = [textwrap.fill(f"{name:<{width}}  {text}", 120, subsequent_indent=indent) for name, text in found.items()]
    show({"recipes": found}, json, lines=lines, next_step="cpr-fast pretrain NAME --data.index INDEX.csv")
