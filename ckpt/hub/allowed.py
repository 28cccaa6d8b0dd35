"""The allow-list: which files of a model's folder may be published, and why the others may not.

Beside the weights these are ``model_folder.companions`` (generation config, tokenizer, processor,
chat templates), the model card, the license, and of the Python files only what ``auto_map`` names
and these import from their own folder, as transformers 5.23 fetches it (``dynamic_module_utils``).
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt import model_folder
from ckpt.hub.items import unfit
from converters.errors import CheckpointError
from converters.files import named

CARD = "README.md"
_ALSO = (CARD, "LICENSE", "LICENSE.txt", "LICENSE.md")
_SUFFIXES = (".json", ".jinja", ".md", ".model", ".py", ".spm", ".tiktoken", ".txt", ".bpe")
_AUTO_MAPS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_WHY = {  # by the end of the name; what is not here is "not on the list"
    ".safetensors": "not among the weights that are sent",
    ".bin": "a pickle: weights are sent as safetensors, arguments never",
    ".pt": "optimizer, scheduler or model state",
    ".pth": "random state",
    ".state": "random state, or state of your own",
    "_state.json": "training state",
    "manifest.json": "about the checkpoint, not the model",
    "latest": "about the checkpoint, not the model",
    "zero_to_fp32.py": "DeepSpeed's script",
    "zero_to_torch.py": "DeepSpeed's script",
    ".py": "code that no auto_map names",
}


@dataclass(frozen=True, slots=True)
class Allowed:
    """Files to send, by name; what stays here, each with why; and lines on what may be amiss."""

    files: tuple[tuple[str, Path], ...]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def allowed(root: Path, own: frozenset[str] = frozenset()) -> Allowed:
    """What of ``root`` is published beside the weights and config.json.

    ``own`` are names that the push makes or sends itself, so that neither the list of what is sent
    nor that of what stays here has them. ``CheckpointError`` if the folder cannot be read.
    """
    try:
        entries = sorted(path.name for path in root.iterdir())
        wanted = {path.relative_to(root).as_posix() for path in model_folder.companions(root)}
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or root}: {error.strerror}", "incomplete"
        ) from error
    code, warnings = _code(root)
    wanted = {name for name in wanted if not name.endswith(".py") or name in code}
    wanted |= {name for name in _ALSO if (root / name).is_file()}
    files: list[tuple[str, Path]] = []
    left_out: list[tuple[str, str]] = []
    for name in sorted(wanted - own):
        why = refusal(root, name)
        if why is None and not name.startswith("LICENSE") and Path(name).suffix not in _SUFFIXES:
            why = "not on the list of what a model needs"
        if why is None:
            files.append((name, root / name))
        else:
            left_out.append((name, why))
    listed = {name.partition("/")[0] for name in wanted}
    left_out += [(name, _why(root, name)) for name in entries if name not in listed | own]
    return Allowed(tuple(files), tuple(sorted(left_out)), tuple(warnings))


def refusal(root: Path, name: str) -> str | None:
    """Why the file ``name`` of ``root`` may not be sent under that name; ``None`` if it may."""
    path = root / name
    if (why := unfit(name)) is not None:
        return f"the name {why}"
    if not os.path.lexists(path):
        return "it is missing"
    try:
        inside = path.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return "a link that leads nowhere"
    if not inside:
        return "a link that leaves the folder"
    return None if path.is_file() else "no plain file"


def _why(root: Path, name: str) -> str:
    path = root / name
    if path.is_symlink() and (why := refusal(root, name)) is not None and "link" in why:
        return why
    if name.startswith("."):
        return "hidden"
    if path.is_dir():
        states = any(path.glob("*_states.pt*"))
        return "ZeRO states" if states else "a folder"
    ends = (why for end, why in _WHY.items() if name.endswith(end))
    return next(ends, "not on the list of what a model needs")


def _code(root: Path) -> tuple[set[str], list[str]]:
    """The Python files that the model is loaded with, and a line for each that is missing."""
    found: set[str] = set()
    warnings: list[str] = []
    rest = [(module, f"auto_map of {name}") for name, module in _named(root)]
    while rest:
        module, by = rest.pop()
        name = f"{module}.py"
        if name in found:
            continue
        if not module.isidentifier() or refusal(root, name) is not None:
            warnings.append(
                f"{root}: {by} names {module!r}, no Python file of this folder; from_pretrained "
                "fails without it"
            )
            continue
        found.add(name)
        with named(root / name):
            source = (root / name).read_bytes()
        try:
            rest += [(inner, name) for inner in _imports(source)]
        except (SyntaxError, ValueError, RecursionError):
            warnings.append(f"{root / name} is no Python; what it imports is not sent")
    return found, list(dict.fromkeys(warnings))


def _named(root: Path) -> Iterator[tuple[str, str]]:
    """Modules that an ``auto_map`` names, by its file; "org/repo--module.Class" is elsewhere."""
    for name in _AUTO_MAPS:
        auto_map = read_object(root, name).get("auto_map")
        values = auto_map.values() if isinstance(auto_map, dict) else ()
        for value in values:
            for reference in value if isinstance(value, list) else [value]:
                if isinstance(reference, str) and "--" not in reference and "." in reference:
                    yield name, reference.rpartition(".")[0]


def _imports(source: bytes) -> list[str]:
    """Modules of its own folder that a Python file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1:
                found.append("." * node.level + (node.module or ""))
            elif node.module:
                found.append(node.module)
            else:
                found += [alias.name for alias in node.names]
    return found


def read_object(root: Path, name: str) -> dict[str, Any]:
    """A JSON object beside the weights; empty where there is none that may be sent, and is JSON.

    ``OSError`` if it cannot be read: what it names would be left out.
    """
    if not (root / name).is_file() or refusal(root, name) is not None:
        return {}
    with named(root / name):
        data = (root / name).read_bytes()
    try:
        content = json.loads(data)  # the Trainer writes NaN
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
