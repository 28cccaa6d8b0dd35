"""The base model that an adapter is merged into, where the checkpoint does not hold it.

    --base DIR                       what the user names
    base_model_name_or_path          a folder, or a model in the Hub's local cache

Nothing is downloaded. The cache is laid out as huggingface_hub does it (2.4,
``file_download.py``): ``models--ORG--NAME/refs/REVISION`` names a folder of
``snapshots``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt.weights.adapters import base_names
from ckpt.weights.companions import model_folder
from ckpt.weights.reader.audience import Audience
from ckpt.weights.request import Request
from converters import quantized
from converters.errors import CheckpointError
from converters.formats.model_files import READERS
from converters.lazy_pattern import LazyPattern
from converters.options import BASE
from converters.peft import embeddings
from converters.peft.config import AdapterConfig
from converters.tensors import DType, Weights
from converters.torch_files import reader
from converters.torch_files.record_checksums import located

HEAD = "lm_head.weight"
_GENERATING = ("ForCausalLM']", "LMHeadModel']", "ForConditionalGeneration']")
_NAME = LazyPattern(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = LazyPattern(r"[\w.-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The folder of a base model; ``revision`` is its commit in the Hub's cache."""

    folder: Path
    revision: str | None = None

    @property
    def place(self) -> str:
        """Where the base model is, for a reader."""
        return f"{self.folder}" + (f" (revision {self.revision})" if self.revision else "")

    @property
    def holds_weights(self) -> bool:
        """Whether the folder holds weights of a model."""
        return any((self.folder / name).is_file() for name in READERS)


def chosen(request: Request) -> BaseModel | None:
    """The base that ``--base`` names; ``CheckpointError`` if there is no model."""
    folder = request.base
    if folder is None:
        return None

    model = BaseModel(folder, _revision_of(folder))
    if not model.holds_weights:
        problem = f"holds none of {', '.join(READERS)}" if folder.is_dir() else "is not a folder"
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it is an adapter: name the model that the adapter was trained on"
        raise CheckpointError(f"{BASE(folder)} {problem}{hint}", "incomplete")

    return model


def locate(config: AdapterConfig) -> BaseModel | None:
    """The base that an adapter's configuration names, if it is on this machine."""
    return next(_candidates(config), None)


def absence(config: AdapterConfig) -> str:
    """Why the base that an adapter's configuration names cannot be taken, in words."""
    name = config.base_model_name_or_path
    if not name or "\0" in name:
        return "no base model is named"

    model = locate(config)
    if model is not None:
        return f"the base model, {model.place}, holds none of {', '.join(READERS)}"
    if Path(name).is_dir():
        return f"the base model, the folder {name}, has no config.json (copy it there)"

    return (
        f"the base model, {name}, is not on this machine (it was looked for as a "
        "folder and in the Hub's cache)"
    )


def _candidates(config: AdapterConfig) -> Iterator[BaseModel]:
    name = config.base_model_name_or_path
    if not name or "\0" in name:
        return

    local = Path(name)
    if local.is_dir() and (local / "config.json").is_file():
        yield BaseModel(local, _revision_of(local))
    if _NAME.fullmatch(name) is None or ".." in name:
        return

    entry = cache() / f"models--{name.replace('/', '--')}"
    stated = config.values.get("revision")
    revision = stated if isinstance(stated, str) and _REVISION.fullmatch(stated) else "main"
    for commit in (_commit(entry / "refs" / revision), revision):
        folder = entry / "snapshots" / (commit or "")
        if commit and (folder / "config.json").is_file():
            yield BaseModel(folder, commit)


def _commit(reference: Path) -> str | None:
    try:
        commit = reference.read_text("utf-8", "replace")[:200].strip()
    except OSError:
        return None

    return commit if _REVISION.fullmatch(commit) and ".." not in commit else None


def _revision_of(folder: Path) -> str | None:
    """The commit of a folder that is a snapshot of the Hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def cache() -> Path:
    """The Hub's cache, by the variables that huggingface_hub reads."""
    general = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    home = os.environ.get("HF_HOME", os.path.join(general, "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights of a base model, and the files that they are in, with their digests.

    ``inner`` is the prefix that their names got, as they were saved from within the
    model. ``architecture`` is the class that its config.json names.
    """

    weights: Weights
    files: Mapping[Path, str | None]
    inner: str = ""
    architecture: str | None = None


def load(
    base: BaseModel,
    adapted_names: Collection[str],
    dtype: DType | None,
    trained: Iterable[str] = (),
) -> Loaded:
    """The weights of a base model, by the names that the trained model has for them.

    ``adapted_names`` are the names that the adapter changes, ``trained`` are all known
    names of the trained model. A base that was saved without its head, or from within a
    model, has another prefix. Quantized weights are dequantized to ``dtype``, or to the
    type of their library. A name that the model ties to another, and that is in no
    file, becomes an alias. ``CheckpointError`` for what cannot be read.
    """
    name, read = next((n, r) for n, r in READERS.items() if (base.folder / n).is_file())
    weights = read(base.folder)
    paths = sorted({extent.path for ref in weights.tensors.values() for extent in ref.extents})
    files: dict[Path, str | None] = dict.fromkeys(paths)
    if ".bin" in name:
        opened = [reader.read(path) for path in paths]
        files = {path: file.digest for path, file in zip(paths, opened, strict=True)}
        weights = replace(weights, checksums=located(weights.tensors.values(), opened))

    path = base.folder / "config.json"
    config = model_folder.read_object(path) if path.is_file() else None
    if quantized.groups(weights, config):
        weights = quantized.dequantized(weights, config, dtype)
    if config is not None:
        weights = base_names.running(weights, {*adapted_names, *trained}, config, base.folder)
    weights, inner = _aligned(weights, adapted_names)
    if config is None:
        return Loaded(weights, files, inner)

    architecture = model_folder.architecture(config)
    return Loaded(_with_ties(weights, config), files, inner, architecture)


def _with_ties(weights: Weights, config: Mapping[str, Any]) -> Weights:
    """The weights with the names that the model ties to others, which are in no file."""
    reader = next(iter(Audience(Path(), config, alone=True).readers), None)
    if reader is None:
        return _with_head(weights, config)
    return replace(weights, aliases=reader.tied(weights.tensors, config))


def _with_head(weights: Weights, config: Mapping[str, Any]) -> Weights:
    """The weights with the head of a language model, if it is tied to the embedding."""
    architectures = config.get("architectures")
    generates = str(architectures).endswith(_GENERATING) and model_folder.ties(config)
    inputs = embeddings.inputs(weights.tensors)
    if not generates or inputs is None or HEAD in weights.tensors:
        return weights

    return replace(weights, aliases={HEAD: inputs})


def _aligned(weights: Weights, adapted_names: Collection[str]) -> tuple[Weights, str]:
    """The weights with a prefix more or less, if that fits better; and the added one."""
    names = {name: name for name in weights.tensors}
    new_names, prefix = names, ""
    best_count = sum(name in weights.tensors for name in adapted_names)
    if best_count * 2 >= len(adapted_names):
        return weights, ""

    for added_prefix, removed_prefix in _prefixes(weights, adapted_names):
        changed = {name: added_prefix + name.removeprefix(removed_prefix) for name in names}
        count = len(set(adapted_names) & set(changed.values()))
        if count > best_count and len(set(changed.values())) == len(changed):
            new_names, prefix, best_count = changed, added_prefix, count

    tensors = {new_names[name]: ref for name, ref in weights.tensors.items()}
    return replace(weights, tensors=tensors), prefix


def _prefixes(weights: Weights, adapted_names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Pairs of prefixes to add and to remove that turn some name into an adapted one."""
    pairs: dict[tuple[str, str], None] = {}
    for name in list(adapted_names)[:20]:
        for stored_name in weights.tensors:
            if name.endswith(f".{stored_name}"):
                pairs[name.removesuffix(stored_name), ""] = None
            elif stored_name.endswith(f".{name}"):
                pairs["", stored_name.removesuffix(name)] = None

    yield from pairs
