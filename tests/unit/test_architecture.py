"""The house: which room may import which, and what no room may do."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT
from syntax_trees import nodes, tree

PACKAGES = ("converters", "ckpt")
MAX_BODY_LINES = 40
LONG_LINE, MAX_LONG_LINES = 90, 0.04  # columns, and the share of lines that may have so many
MAX_MODULES = 16  # in a folder, its __init__.py aside

# A room is a folder, or a module that lies directly in a package. The first line is the lowest
# floor: a room imports itself, and rooms of lower floors, which are the lines before its own.
FLOORS = """
converters.extents converters.lazy_pattern
converters.walks
converters.tiles
converters.partitioned
converters.chains
converters.rank_cuts
converters.errors converters.options converters.tensors converters.words ckpt.text ckpt.version
converters.accessors converters.storage.system
converters.source converters.storage converters.pickles converters.names ckpt.runs.lease
converters.cast converters.detect
converters.computing
converters.plan converters.peft converters.quantized
converters.execute converters.torch_files converters.peft.merge
converters.values
converters.dcp.keys
converters.formats converters.zero.files converters.dcp.entries
converters.dcp
converters.zero.naming
converters.zero
converters.zero.model_ranks
converters.zero.parallel
converters.zero.pipeline
converters.zero.experts
converters.zero.merging
converters.zero.native.stages
converters.zero.native
converters.zero.universal
converters.dcp.native converters.dcp.writing

ckpt.deprecation ckpt.requirements ckpt.results
ckpt.cli.results ckpt.cli.usage ckpt.folders ckpt.distributed ckpt.weights
ckpt.engine.splitting ckpt.runs ckpt.shares
ckpt.runs.foreign ckpt.state ckpt.weights.companions
ckpt.rewrite ckpt.runs.states ckpt.saving.commit ckpt.weights.output ckpt.weights.reader
ckpt.weights.naming ckpt.weights.layouts
ckpt.engine ckpt.weights.adapters
ckpt.plain_torch ckpt.runs.upkeep ckpt.weights.merge ckpt.weights.check ckpt.weights.opening
ckpt.weights.conversion ckpt.zero_to_fp32
ckpt.inspection ckpt.live ckpt.torch_training ckpt.hub.content
ckpt.hub.client
ckpt.hub
ckpt.saving ckpt.cli
ckpt.resuming ckpt.__main__ ckpt.cli.crossing ckpt.cli.joining ckpt.cli.inspection
ckpt.trainers.hf
ckpt.trainers
ckpt converters
"""
FLOOR = {
    room: number for number, line in enumerate(FLOORS.strip().splitlines()) for room in line.split()
}
# Rooms and modules that live in a training process: only they import torch when they are imported.
INSIDE_A_TRAINING = {
    "ckpt.distributed",
    "ckpt.engine",
    "ckpt.engine.splitting",
    "ckpt.live",
    "ckpt.plain_torch",
    "ckpt.resuming",
    "ckpt.saving",
    "ckpt.saving.commit",
    "ckpt.state",
    "ckpt.torch_training",
    "ckpt.trainers",
    "ckpt.trainers.hf",
    "ckpt.weights.opening.load_into",
}
# Where converters open what no store keeps, and why. Everything else goes through the door
# (converters/storage): a call beside it would read no checkpoint of another store.
BESIDE_THE_DOOR = {
    ("converters.computing.blas", "open"): "/proc/cpuinfo, which says what the processor has",
    ("converters.computing.blas", "read_text"): "/proc/self/maps, which says what is loaded",
}
OF_A_PATH = {
    *("open", "read_text", "read_bytes", "write_text", "write_bytes", "touch"),
    *("stat", "lstat", "exists", "is_file", "is_dir", "is_symlink", "iterdir", "glob", "rglob"),
    *("unlink", "rename", "symlink_to", "readlink"),
}
OF_OS = {
    *("open", "stat", "lstat", "listdir", "scandir", "walk", "access", "replace", "rename"),
    *("unlink", "remove", "fsync", "truncate", "ftruncate", "link", "symlink", "readlink"),
}
OF_OS_PATH = {"exists", "lexists", "isfile", "isdir", "islink", "getsize", "getmtime", "samefile"}
HEAVY = {"torch", "deepspeed", "transformers", "huggingface_hub", "accelerate", "lightning"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {dotted(path): path for path in paths}


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def room(module: str) -> str:
    """The room that a module is in."""
    path = modules()[module]
    folder = dotted(path.parent / "__init__.py")
    return module if folder in PACKAGES and path.name != "__init__.py" else folder


def imports(module: str, *, when_used: bool = True) -> Iterator[str]:
    """The names that a module imports; with ``when_used`` also those inside of functions."""
    path = modules()[module]
    for node in nodes(path) if when_used else tree(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules() else node.module for name in inner)


def offences(
    check: Callable[[str], Collection[str]], names: Iterable[str]
) -> dict[str, Collection[str]]:
    """What a check has against each module or room; who has no offence is left out.

    One test for all modules, not one for each: pytest spends more on a test than a check takes.
    """
    return {name: findings for name in names if (findings := check(name))}


def own_imports(module: str) -> set[str]:
    """The modules of the packages that a module imports."""
    return {name for name in imports(module) if name in modules()} - {module}


def upward_imports(module: str) -> set[str]:
    """The modules of other rooms that a module imports from its own floor or a higher one."""
    here = room(module)
    return {
        imported
        for imported in own_imports(module)
        if room(imported) != here and FLOOR[room(imported)] >= FLOOR[here]
    }


def test_a_room_imports_only_rooms_of_lower_floors() -> None:
    assert offences(upward_imports, modules()) == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {module: own_imports(module) - {module} for module in modules()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


def test_no_folder_is_too_large_to_be_read() -> None:
    folders = {path.parent for path in modules().values()}
    sizes = {folder: len(list(folder.glob("*.py"))) - 1 for folder in folders}
    assert {folder: size for folder, size in sizes.items() if size > MAX_MODULES} == {}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and its docstring."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    last = function.body[-1].end_lineno or function.lineno
    return last - statements[0].lineno + 1 if statements else 0


def long_functions(module: str) -> dict[str, int]:
    """The functions of a module that are too long, with their lines."""
    functions = [node for node in nodes(modules()[module]) if isinstance(node, ast.FunctionDef)]
    return {node.name: body_lines(node) for node in functions if body_lines(node) > MAX_BODY_LINES}


def test_a_function_is_short() -> None:
    assert offences(long_functions, modules()) == {}


def test_few_lines_are_long() -> None:
    lines = [line for path in modules().values() for line in path.read_text("utf-8").splitlines()]
    share = sum(len(line) >= LONG_LINE for line in lines) / len(lines)
    assert share < MAX_LONG_LINES, f"{share:.1%} of all lines have {LONG_LINE} columns and more"


def test_every_room_is_on_one_floor() -> None:
    assert {room(module) for module in modules()} == FLOOR.keys()


def heavy_imports(module: str) -> set[str]:
    """The libraries of a training that a module imports when it is imported, where none may."""
    if {module, room(module)} & INSIDE_A_TRAINING:
        return set()
    return {name.partition(".")[0] for name in imports(module, when_used=False)} & HEAVY


def test_only_rooms_inside_a_training_import_torch_and_its_like() -> None:
    assert offences(heavy_imports, modules()) == {}


def opening_calls(module: str) -> Iterator[str]:
    """The calls of a module that ask the filesystem themselves."""
    for node in nodes(modules()[module]):
        match node:
            case ast.Call(func=ast.Name(id="open")):
                yield "open"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr=name)):
                yield from {name} & OF_OS
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="path"), attr=name)) if (
                name in OF_OS_PATH
            ):
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Name(id="stores" | "LOCAL"))):
                pass
            case ast.Call(func=ast.Attribute(attr=name)):
                yield from {name} & OF_A_PATH
            case ast.Name(id="mmap" | "shutil") as name:
                yield name.id


def test_what_asks_the_filesystem_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = ("open(p)", "os.open(p, 0)", "p.read_bytes()", "(a / b).iterdir()", "os.path.exists(p)")
    for number, call in enumerate((*calls, "shutil.rmtree(p)", "look.path.stat()")):
        path = tmp_path / f"module{number}.py"
        path.write_text(f"def f(p):\n    return {call}\n")
        monkeypatch.setitem(modules(), "other", path)
        assert len(list(opening_calls("other"))) == 1, call


def calls_beside_the_door(module: str) -> set[str]:
    """The opening calls that a module may not have, and those that it should have and has not."""
    allowed = {call for name, call in BESIDE_THE_DOOR if name == module}
    return set(opening_calls(module)) ^ allowed


def test_converters_open_files_through_the_door() -> None:
    outside = [
        name for name in modules() if name.startswith("converters.") and ".storage" not in name
    ]
    assert offences(calls_beside_the_door, outside) == {}


def unnamed_contents(folder: str) -> set[str]:
    """The modules and folders of a room that its docstring does not name."""
    path = ROOT / folder
    text = ast.get_docstring(tree(path / "__init__.py")) or ""
    contents = {module.stem for module in path.glob("*.py")} - {"__init__", "__main__"}
    contents |= {room.parent.name for room in path.glob("*/__init__.py")}

    return contents - set(re.findall(r"[a-z0-9_]+", text))


def test_a_room_says_what_is_in_it() -> None:
    """Each module and folder is named in the docstring of its room, where there are several."""
    inits = [path for path in modules().values() if path.name == "__init__.py"]
    folders = [path.parent.relative_to(ROOT).as_posix() for path in inits]

    assert offences(unnamed_contents, folders) == {}
