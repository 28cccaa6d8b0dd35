"""The syntax trees of the project's modules, parsed once a process for all tests that read them."""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a module, as ``ast.walk`` gives them."""
    return tuple(ast.walk(tree(path)))


@cache
def tree(path: Path) -> ast.Module:
    """The tree of a module. It is shared: nobody may change it."""
    gc.disable()  # it would take twice as long as the parser, and a new tree has no garbage
    try:
        return ast.parse(path.read_text("utf-8"))
    finally:
        gc.freeze()  # nor will it walk over the tree, which stays
        gc.enable()
