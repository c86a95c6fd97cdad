"""Writes a network as one Python file that needs only torch, from the source of the modules that define it."""

from __future__ import annotations

import ast
from pathlib import Path

import cpr_fast

PACKAGE = Path(cpr_fast.__file__).parent
STANDALONE = "weights.standalone"  # also defines what the networks import from `ops` and `errors`
COPIED = ("models.", "config.pixels")

HEADER = '''\
"""modeling.py: loads this folder with torch alone. Written by `cpr-fast export --to hub` (cpr_fast {version}).

    from modeling import from_pretrained
    encoder = from_pretrained(".")
    features = encoder.features(encoder.prepare(frames))  # frames [N, T, H, W, 3] uint8
"""

from __future__ import annotations
'''


def standalone_source(module: str, network: str) -> str:
    """Returns the source of a file that defines `network` and `from_pretrained`.

    Args:
        module: below `cpr_fast`, that defines the network, such as "models.s3d".
    """
    imports: dict[str, None] = {}
    parts = [_body(name, imports) for name in (STANDALONE, *_needed(module))]
    header = HEADER.format(version=cpr_fast.__version__)
    registered = f'NETWORKS["{network}"] = {network}'
    return "\n".join([header, *sorted(imports), "", "", *["\n\n\n".join(parts), "", registered, ""]])


def _needed(module: str) -> list[str]:
    """Returns the modules that a module of networks consists of, those that it imports first."""
    found: list[str] = []
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cpr_fast."):
            name = node.module.removeprefix("cpr_fast.")
            if name.startswith(COPIED):
                found += [other for other in _needed(name) if other not in found]
    return [*found, module]


def _body(module: str, imports: dict[str, None]) -> str:
    """Returns the source of a module without its docstring and imports; adds those of other packages to `imports`."""
    lines, dropped = _path(module).read_text(encoding="utf-8").splitlines(), set()
    for number, node in enumerate(_tree(module).body):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if is_import or number == 0 and isinstance(node, ast.Expr):
            dropped.update(range(node.lineno - 1, node.end_lineno))
        if is_import and not (getattr(node, "module", None) or "").startswith(("cpr_fast", "__future__")):
            imports[ast.unparse(node)] = None
    return "\n".join(line for number, line in enumerate(lines) if number not in dropped).strip()


def _path(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))
