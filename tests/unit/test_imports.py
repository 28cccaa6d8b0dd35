"""One direction, and light: what may import what."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import FIXTURES, ROOT
from syntax_trees import nodes, tree

HEAVY = {"torch", "deepspeed", "transformers", "huggingface_hub", "accelerate", "lightning"}


def imported(path: Path, everywhere: bool) -> Iterator[str]:
    for node in nodes(path) if everywhere else tree(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_converters_know_no_trainer_and_no_ckpt() -> None:
    refused = HEAVY | {"ckpt", "pickle"}
    offences = {
        path: names
        for path in modules("converters")
        if (names := refused & set(imported(path, everywhere=True)))
    }
    assert offences == {}


def test_a_module_fits_in_the_head() -> None:
    lengths = {
        path: len(path.read_text("utf-8").splitlines())
        for path in (*modules("converters"), *modules("ckpt"))
    }
    too_long = {path: lines for path, lines in lengths.items() if lines > 370}  # about 350
    assert too_long == {}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_conversion_never_imports_torch_or_pickle_readers(dtype: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from ckpt.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as done:\n    assert not done.code\n"
        f"assert not set(sys.modules) & {HEAVY!r}, set(sys.modules)\n"
    )
    source = FIXTURES / "zero2-bf16-w3"
    args = ["to-fp32", source, "-o", tmp_path / "m", "--dtype", dtype]
    subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, check=True, timeout=60)


def test_help_imports_neither_numpy_nor_tqdm() -> None:
    code = "import sys, ckpt.cli.main; assert not {'numpy', 'tqdm', 'isal'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_reading_and_planning_import_no_numpy() -> None:
    """It costs 80 ms, and is loaded where numbers are computed."""
    rooms = "ckpt.hub.plan ckpt.cli.conversion ckpt.rewrite.reshard ckpt.rewrite.universal"
    readers = "converters.zero.universal.reader converters.zero.parallel.reader ckpt.runs.verify"
    code = (
        "import sys; [__import__(name) for name in sys.argv[1:]]; assert 'numpy' not in sys.modules"
    )
    command = [sys.executable, "-c", code, *rooms.split(), *readers.split()]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)


def test_no_module_compiles_a_regular_expression_when_it_is_imported() -> None:
    """Of ours a conversion uses 22; those that it never matched with cost 10 ms."""
    paths = [*modules("converters"), *modules("ckpt")]
    assert len(paths) > 500
    compiled = {
        str(path.relative_to(ROOT)): [ast.unparse(node) for node in compiled_at_import(tree(path))]
        for path in paths
    }
    assert {path: calls for path, calls in compiled.items() if calls} == {}


def compiled_at_import(parent: ast.AST) -> Iterator[ast.Call]:
    """The calls of ``re.compile`` outside of functions."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "re.compile":
            yield node
        yield from compiled_at_import(node)


def test_a_regular_expression_that_is_compiled_at_import_is_seen() -> None:
    source = "import re\nA = {1: re.compile('x')}\ndef f():\n    return re.compile('y')\n"
    assert [ast.unparse(node) for node in compiled_at_import(ast.parse(source))] == [
        "re.compile('x')"
    ]


def loaded_by(arguments: list[str], tmp_path: Path) -> set[str]:
    """The modules that a process has when a command is done."""
    code = (
        "import sys\n"
        "from ckpt.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "open('modules', 'w').write('\\n'.join(sys.modules))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    return set((tmp_path / "modules").read_text().split())


def ours(loaded: set[str]) -> set[str]:
    return {name for name in loaded if name.partition(".")[0] in ("ckpt", "converters")}


# What a plain conversion to fp32 asks nothing of, by the beginnings of names.
UNASKED = (
    *("ckpt.cli.results", "ckpt.cli.usage.synonyms", "ckpt.hub", "ckpt.rewrite", "ckpt.saving"),
    *("ckpt.runs.foreign.completeness", "ckpt.runs.lease.", "ckpt.runs.states.status"),
    *(
        "ckpt.weights.check.heads",
        "ckpt.weights.check.refusals",
        "ckpt.weights.conversion.lightning",
    ),
    *("ckpt.weights.layouts.reverting", "ckpt.weights.merge", "converters.formats.pytorch_bin"),
    *("converters.peft.config", "converters.peft.export", "converters.quantized.recipe"),
    *(
        "converters.torch_files.legacy_format",
        "converters.zero.native",
        "converters.zero.parallel.",
    ),
    *("converters.zero.optimizer_state", "converters.zero.stage0", "converters.zero.stage12"),
)


@pytest.mark.parametrize("fixture", ["zero3-fp32-w2", "trainer-zero3/checkpoint-2"])
def test_a_conversion_loads_what_its_input_calls_for(fixture: str, tmp_path: Path) -> None:
    """Each module costs 0.2 ms, and each dataclass of it 0.5."""
    source = str(FIXTURES / fixture)
    loaded = loaded_by(["to-fp32", source, "-o", str(tmp_path / "model")], tmp_path)

    assert {name for name in loaded if name.startswith(UNASKED)} == set()
    assert not loaded & {"socket", "subprocess", "asyncio", "ssl", "http.client", "email"}
    assert len(ours(loaded)) <= 214


def test_help_loads_the_commands_alone(tmp_path: Path) -> None:
    loaded = ours(loaded_by(["--help"], tmp_path))
    assert {name for name in loaded if name.startswith(("ckpt.", "converters."))} <= {
        *("ckpt.cli", "ckpt.cli.main", "ckpt.version", "converters.errors", "converters.options"),
        *(
            "ckpt.cli.crossing",
            "ckpt.cli.crossing.dcp",
            "ckpt.cli.joining",
            "ckpt.cli.joining.join",
        ),
        "ckpt.cli.inspection",
        *(f"ckpt.cli.inspection.{name}" for name in ("differences", "numbers", "tables")),
        *("converters.words", "ckpt.cli.usage", "ckpt.cli.usage.command", "ckpt.cli.planned"),
        *(f"ckpt.cli.{name}" for name in ("doctor", "hub", "latest", "maintenance", "options")),
        *(
            f"ckpt.cli.{name}"
            for name in ("rewrite", "runs", "verify", "weight_options", "weights")
        ),
    }


def test_a_module_that_is_loaded_late_takes_no_name_of_its_package() -> None:
    """Importing ``a.b`` sets ``b`` in ``a``: a function of this name would be gone then."""
    hidden = []
    for path in [*modules("converters"), *modules("ckpt")]:
        if path.name != "__init__.py":
            continue
        package = ".".join(path.parent.relative_to(ROOT).parts)
        functions = {node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)}
        inside = {entry.stem for entry in path.parent.iterdir()}
        hidden += [f"{package}.{name}" for name in functions & inside]

    assert hidden == []
