"""An error is one line: what is wrong and what to do stand in one sentence, parted by ";"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracles import ROOT
from syntax_trees import nodes

MODULES = sorted(path for room in ("ckpt", "converters") for path in (ROOT / room).rglob("*.py"))
_SECOND_SENTENCE = re.compile(r"\w\. [A-Z][a-z]")


def _messages(path: Path) -> Iterator[str]:
    """The texts that errors of a module are made of, a name or a value in them as "x"."""
    for node in nodes(path):
        is_error = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")
        if is_error and node.args:
            parts = (part for part in ast.walk(node.args[0]) if isinstance(part, ast.JoinedStr))
            yield from (_text(part) for part in parts)
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def _text(joined: ast.JoinedStr) -> str:
    values = (value.value if isinstance(value, ast.Constant) else "x" for value in joined.values)
    return "".join(map(str, values))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_error_has_two_sentences(path: Path) -> None:
    assert [text for text in _messages(path) if _SECOND_SENTENCE.search(text)] == []
