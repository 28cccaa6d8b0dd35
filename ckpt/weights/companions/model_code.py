"""The Python files that a model, its tokenizer or its processor is loaded with.

These are what an ``auto_map`` names and what those import from their own folder, as
transformers 5.23 fetches it (``dynamic_module_utils``). Every other ``.py`` beside a
checkpoint is the user's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt.weights.companions import json_files
from converters.storage import stores
from converters.storage.local import naming_path

if TYPE_CHECKING:
    import ast

AUTO_MAPS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
MODULES = "modules.json"
MAX_CODE_BYTES = 16 << 20  # bytes of a Python file that is looked through for imports


class Code(NamedTuple):
    """Names of Python files in a folder, and a note on each that is not there or broken.

    ``vocabulary`` are the names of files that tokenizers of this code say they read.
    """

    files: frozenset[str]
    notes: tuple[str, ...]
    vocabulary: frozenset[str] = frozenset()


def is_file(path: Path) -> bool:
    """Whether a plain file, or a link to one, can be read there."""
    return stores.is_file(path)


def code(
    root: Path,
    is_readable: Callable[[Path], bool] = is_file,
    configs: Sequence[str] = AUTO_MAPS,
) -> Code:
    """The Python files of ``root`` that the model is loaded with.

    ``is_readable`` says which files may be taken, ``configs`` are the files whose
    ``auto_map`` counts. ``OSError`` if one of them cannot be read.
    """
    files: set[str] = set()
    notes: list[str] = []
    vocabulary: set[str] = set()

    modules = _auto_map_modules(root, is_readable, configs)
    queue = [(module, f"auto_map of {name}") for name, module in modules]
    queue += [(module, MODULES) for module in _custom_modules(root, is_readable)]
    while queue:
        module, origin = queue.pop()
        name = f"{module}.py"
        if name in files:
            continue

        if not module.isidentifier() or not is_readable(root / name):
            notes.append(f"{origin} {_names_missing(module)}; from_pretrained fails without it")
            continue

        files.add(name)
        tree = _parsed(root / name)
        if tree is None:
            notes.append(f"{name} is not Python; the files that it imports are left out")
            continue

        queue += [(inner, name) for inner in _imports(tree)]
        vocabulary |= set(_vocabulary(tree))

    return Code(frozenset(files), tuple(dict.fromkeys(notes)), frozenset(vocabulary))


def is_on_missing(note: str, module: str) -> bool:
    """Whether a note says that the file of a module is missing."""
    return _names_missing(module) in note


def _names_missing(module: str) -> str:
    return f"names {module!r}, but this folder has no such Python file"


def read_object(path: Path, is_readable: Callable[[Path], bool] = is_file) -> dict[str, Any]:
    """The JSON object in a file; empty if it may not be taken or is not JSON.

    ``OSError`` if it cannot be read: the files that it names would be left out.
    """
    content = read_json(path, is_readable)
    return content if isinstance(content, dict) else {}


def read_json(path: Path, is_readable: Callable[[Path], bool] = is_file) -> Any:
    """The same of any JSON; ``None`` where there is none."""
    if (
        not stores.is_file(path)
        or not is_readable(path)
        or stores.status(path).size > json_files.MAX_JSON_BYTES
    ):
        return None

    with naming_path(path):
        data = stores.content(path)
    try:
        return json.loads(data)  # the Trainer writes NaN
    except (ValueError, RecursionError):
        return None


def _auto_map_modules(
    root: Path, is_readable: Callable[[Path], bool], configs: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Pairs of a file with an ``auto_map`` and a module that it names.

    References to other repositories, such as "org/repo--module.Class", are left out.
    """
    for name in configs:
        auto_map = read_object(root / name, is_readable).get("auto_map")
        values = auto_map.values() if isinstance(auto_map, dict) else ()
        for value in values:
            for reference in value if isinstance(value, list) else [value]:
                if isinstance(reference, str) and "--" not in reference and "." in reference:
                    yield name, reference.rpartition(".")[0]


def _parsed(path: Path) -> ast.Module | None:
    """The syntax of a Python file; ``None`` if it is not Python, or too large for it."""
    import ast  # takes 10 ms, and few checkpoints have code

    with naming_path(path):
        if stores.status(path).size > MAX_CODE_BYTES:
            return None
        content = stores.content(path)

    try:
        return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _custom_modules(root: Path, is_readable: Callable[[Path], bool]) -> Iterator[str]:
    """Modules of the folder's own code that modules.json names."""
    content = read_json(root / MODULES, is_readable)
    entries = content if isinstance(content, list) else []
    for entry in entries:
        kind = entry.get("type") if isinstance(entry, dict) else None
        module = kind.rpartition(".")[0] if isinstance(kind, str) else ""
        if module.isidentifier() and is_readable(root / f"{module}.py"):
            yield module


def _imports(tree: ast.Module) -> list[str]:
    """Modules of its own folder that a Python file imports, wherever in it."""
    import ast

    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1:
                modules.append("." * node.level + (node.module or ""))
            elif node.module:
                modules.append(node.module)
            else:
                modules += [alias.name for alias in node.names]

    return modules


def _vocabulary(tree: ast.Module) -> Iterator[str]:
    """The values of the tables ``VOCAB_FILES_NAMES`` and ``vocab_files_names``."""
    import ast

    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue

        names = [target.id.lower() for target in node.targets if isinstance(target, ast.Name)]
        if "vocab_files_names" in names:
            for value in node.value.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.removeprefix("./")
