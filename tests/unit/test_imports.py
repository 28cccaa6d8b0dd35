"""One direction, and light: what may import what."""

from __future__ import annotations

import ast
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
