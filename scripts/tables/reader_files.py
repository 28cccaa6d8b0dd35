"""Writes ckpt/weights/companions/reader_files.py: the files that tokenizers of transformers name.

    python scripts/tables/reader_files.py SITE_PACKAGES/transformers [ANOTHER/transformers ...]

Every ``VOCAB_FILES_NAMES`` (and ``vocab_files_names``) in the sources of these versions is read. No
tokenizer is imported: one whose library is not installed counts too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "ckpt/weights/companions/reader_files.py"


def vocabulary_files(package: Path) -> set[str]:
    """The file names in the tokenizers' tables of one version of transformers."""
    names: set[str] = set()
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "vocab_files_names" in text.lower():
            names |= _table_values(ast.parse(text))
    return names


def version(package: Path) -> str:
    """The version that the package states."""
    text = (package / "__init__.py").read_text(encoding="utf-8")
    statement = re.search(r'^__version__ = "([^"]+)"', text, re.M)
    if statement is None:
        raise SystemExit(f"{package} states no __version__")
    return statement[1]


def _table_values(tree: ast.Module) -> set[str]:
    constants = {
        name: value.value
        for name, value in _assignments(tree)
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }
    names: set[str] = set()
    for name, value in _assignments(tree):
        if name.lower() != "vocab_files_names" or not isinstance(value, ast.Dict):
            continue
        for entry in value.values:
            if isinstance(entry, ast.Constant) and isinstance(entry.value, str):
                names.add(entry.value)
            elif isinstance(entry, ast.Name) and entry.id in constants:
                names.add(constants[entry.id])
    return names


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from ((t.id, node.value) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def text(packages: list[Path]) -> str:
    """The module's source."""
    names = sorted(set().union(*map(vocabulary_files, packages)))
    versions = ", ".join(map(version, packages))
    lines = [
        f'"""Files that the tokenizers of transformers {versions} name.',
        "",
        "Made by scripts/tables/reader_files.py; tests/oracle/test_model_folder.py compares it",
        'with the installed transformers."""',
        "",
        f"VERSIONS = {tuple(map(version, packages))!r}",
        "VOCABULARY_FILES = (",
        *(f'    "{name}",' for name in names),
        ")",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    TARGET.write_text(text([Path(argument) for argument in sys.argv[1:]]))
    subprocess.run(["ruff", "format", str(TARGET)], check=False)
