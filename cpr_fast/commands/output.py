"""Printing of a command's result: JSON for programs, or text for people."""

from __future__ import annotations

import json as json_module
from typing import Any


def show_once(result: dict[str, Any], json: bool) -> None:
    """`show` in the first process of those that torchrun started; all of them part."""
    from cpr_fast.runtime import distributed

    if distributed.is_main():
        show(result, json)
    distributed.finish()


def show(result: dict[str, Any], json: bool) -> None:
    if json:
        print(json_module.dumps(result))
        return
    from rich.console import Console

    Console().print_json(data=result)
