"""What collecting the tests costs: no test module imports a heavy library.

Each process of xdist imports all test modules, and runs the tests of some.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import tomllib
from paths import ROOT
from syntax_trees import tree

# What no test needs to be collected. With what it imports, peft alone takes four seconds.
HEAVY = {
    *("accelerate", "bitsandbytes", "deepspeed", "lightning", "matplotlib", "networkx", "peft"),
    *("sentence_transformers", "scipy", "sklearn", "sympy", "torchmetrics", "transformers"),
    *("torch._dynamo", "torch._inductor", "uvicorn"),
}


def search_path() -> list[Path]:
    """The folders that pytest imports our modules from, and those that tests add for scripts."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    folders = settings["tool"]["pytest"]["ini_options"]["pythonpath"]
    return [ROOT / folder for folder in (*folders, "scripts/tables")]


@cache
def own_modules() -> Mapping[str, Path]:
    """Our modules by the names that tests import them under."""
    modules = {}
    for folder in search_path():
        rooms = ("ckpt", "converters") if folder == ROOT else (".",)
        for path in (path for room in rooms for path in (folder / room).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those for checkers of types."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue

        is_for_types = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(
            statement.test
        )
        for field in ("body", "orelse", "finalbody"):
            if not (is_for_types and field == "body"):
                yield from statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from statements(handler.body)


def imports(path: Path) -> Iterator[str]:
    """The modules that a module imports when it is imported, each with the packages it lies in."""
    for statement in statements(tree(path).body):
        names: list[str] = []
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            module = statement.module
            names = [module, *(f"{module}.{alias.name}" for alias in statement.names)]

        for parts in (name.split(".") for name in names):
            yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def heavy_chains(*starts: Path) -> Iterator[str]:
    """How modules come to import heavy libraries, and through which modules of ours."""
    chains, visited = [(start, start.name) for start in starts], {*starts}
    while chains:
        path, chain = chains.pop()
        for name in dict.fromkeys(imports(path)):
            if name in HEAVY:
                yield f"{chain} imports {name}"
            source = own_modules().get(name)
            if source is not None and source not in visited:
                visited.add(source)
                chains.append((source, f"{chain} imports {name}, which"))


def test_collecting_the_tests_imports_no_heavy_library() -> None:
    """``heavy_libraries.LateModule`` stands for one; a function may import it too."""
    modules = [ROOT / "tests/conftest.py", *sorted((ROOT / "tests").rglob("test_*.py"))]
    assert len(modules) > 100

    assert [*heavy_chains(*modules)] == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import peft", ["peft"]),
        ("from transformers.trainer import Trainer", ["transformers"]),
        ("try:\n    import deepspeed\nexcept ImportError:\n    pass", ["deepspeed"]),
        ("class A:\n    import lightning", ["lightning"]),
        ("from torch import distributed", []),
        ("from torch import _dynamo", ["torch._dynamo"]),
        ("def f():\n    import peft", []),
        ("if TYPE_CHECKING:\n    import peft\nelse:\n    import sklearn", ["sklearn"]),
        ("import ckpt.trainers.hf.stopping", ["transformers"]),
    ],
)
def test_what_is_imported_at_once_is_seen(text: str, names: list[str], tmp_path: Path) -> None:
    module = tmp_path / "test_x.py"
    module.write_text(text)

    assert {chain.rpartition(" imports ")[2] for chain in heavy_chains(module)} >= {*names}
    assert bool(names) == any(heavy_chains(module))
