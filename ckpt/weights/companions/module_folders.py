"""The modules of a sentence-transformers model: which of them has which folder.

    modules.json          a list of {"name": "0", "path": "", "type": "...Transformer"}, in order
    (root)                the files of the module whose path is "": the transformer
    1_Pooling/  2_Dense/  those of the others

The model is a ``torch.nn.Sequential``, so the names of a module's tensors begin with
its name and a dot. A ``Router`` has modules of its own, in folders of their own
(``router_config.json``). As sentence-transformers 6.2 writes and reads it
(``base/model.py``, ``base/modules/router.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ckpt.weights.companions import json_files
from ckpt.weights.companions.model_code import MODULES
from converters.errors import CheckpointError
from converters.storage import stores
from converters.storage.system.names import is_name

ROUTER = "router_config.json"
MAX_MODULES = 256


class Module(NamedTuple):
    """A module: the prefix of its tensors' names, and its folder.

    The folder is "" where it is the model's own.
    """

    prefix: str
    folder: str
    kind: str


def modules(root: Path) -> tuple[Module, ...]:
    """The modules that modules.json of ``root`` lists; none where there is no such file.

    ``CheckpointError`` if it is broken, or names a folder outside ``root``.
    """
    path = root / MODULES
    if not stores.is_file(path):
        return ()

    entries = _read(path)
    if not isinstance(entries, list) or len(entries) > MAX_MODULES:
        raise CheckpointError(f"{path} holds no list of modules")

    modules: list[Module] = []
    for entry in entries:
        module = _module(path, entry)
        router = root / module.folder / ROUTER
        modules += _route_modules(router, module) if stores.is_file(router) else [module]

    return tuple(modules)


def _read(path: Path) -> Any:
    return json_files.read(path, "a list of modules")


def _module(path: Path, entry: Any) -> Module:
    keys = ("name", "path", "type")
    values = [entry.get(key) for key in keys] if isinstance(entry, dict) else []
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) != len(keys):
        raise CheckpointError(f"{path} lists a module without a name, a path or a type")

    name, folder, kind = texts
    return Module(f"{name}.", _relative_folder(path, folder), kind.rpartition(".")[2])


def _route_modules(path: Path, router: Module) -> Iterator[Module]:
    """The modules of a router, in the order of each route.

    A module that several routes share comes once for each.
    """
    content = _read(path)
    structure = content.get("structure") if isinstance(content, dict) else None
    kinds = content.get("types") if isinstance(content, dict) else None
    if not isinstance(structure, dict) or not isinstance(kinds, dict):
        raise CheckpointError(f"{path} has no structure and types of a router")

    for route, names in structure.items():
        for index, name in enumerate(names if isinstance(names, list) else ()):
            folder = PurePosixPath(router.folder, _relative_folder(path, str(name))).as_posix()
            kind = str(kinds.get(name, "")).rpartition(".")[2]
            yield Module(f"{router.prefix}sub_modules.{route}.{index}.", folder, kind)


def _relative_folder(path: Path, folder: str) -> str:
    """The folder as a path relative to the model's; "" for the model's own."""
    parts = PurePosixPath(folder)
    if "\\" in folder or not all(is_name(part) for part in parts.parts):
        raise CheckpointError(f"{path} names the folder {folder!r}, outside the model's own")
    return "" if folder in ("", ".") else parts.as_posix()
