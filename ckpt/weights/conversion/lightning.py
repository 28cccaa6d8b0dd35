"""``--format lightning``: the file that ``LightningModule.load_from_checkpoint`` reads.

Lightning's strategy saves a folder ``X.ckpt`` whose model states hold, beside what
DeepSpeed keeps, the entries of a Lightning checkpoint but for ``state_dict``. Lightning
2.6.6 reads ``state_dict``, ``pytorch-lightning_version`` and ``hyper_parameters``
(``core/saving.py``), its migrations ``epoch``, ``global_step`` and ``loops``
(``utilities/migration/migration.py``); what the module's own ``on_save_checkpoint``
added is there for its ``on_load_checkpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.naming import packed
from ckpt.weights.output.product import Product
from ckpt.weights.reader.verdict import LoadVerdict
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.formats import wrapped_state_dict
from converters.names.selection import renamed
from converters.options import (
    ADAPTER_CONFIG,
    BASE,
    CHECK,
    CONFIG,
    DEQUANTIZE,
    EXCLUDE_FROZEN,
    FORMAT,
    MERGE,
    PART,
    RENAME,
    SELECT,
    STRIP,
    TIED,
    TOKENIZER,
    UNTIE,
)
from converters.pickles.values import Global
from converters.plan import Tied
from converters.source import Source
from converters.tensors import TensorRef
from converters.words import counted, with_article
from converters.zero.files import state_files
from converters.zero.files.keys import MODEL_KEYS, OTHER_MODEL_KEYS

FILE = "model.ckpt"  # in the folder that is written where -o names no file
SUFFIXES = (".ckpt", ".pt", ".pth")  # of -o where it names a file
VERSION = "pytorch-lightning_version"
_UNFIT = (  # options that would change nothing
    *(MERGE, DEQUANTIZE, PART, SELECT, STRIP, RENAME),
    CONFIG,
    *(TOKENIZER, BASE, ADAPTER_CONFIG, UNTIE, CHECK, EXCLUDE_FROZEN),
)
_WHAT = "which writes one file with all weights under the LightningModule's own names"
_PREFIX = "_forward_module."  # Lightning's wrapper of the module, before 2.1
_ARGUMENTS = ("hyper_parameters", "datamodule_hyper_parameters")
_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers", "state_dict")
_DEEPSPEEDS = MODEL_KEYS | OTHER_MODEL_KEYS


@dataclass(frozen=True, slots=True)
class LightningEntries:
    """The entries of the file beside the weights, and notes on what it cannot hold."""

    values: Mapping[str, Any]
    notes: tuple[str, ...]


def names_file(output: Path | None) -> bool:
    """Whether ``-o`` names the file itself."""
    return output is not None and output.suffix in SUFFIXES


def product(source: Source, request: Request) -> Product:
    """The weights under the LightningModule's own names: no name is made a reader's.

    ``CheckpointError`` for what Lightning did not save, and for options that change the
    weights.
    """
    request.refuse(_UNFIT, f"{FORMAT('lightning')}, {_WHAT}")
    if not isinstance(source.entries.get(VERSION), str):
        raise CheckpointError(
            f"{source.place.folder} was not saved by Lightning: its state has no "
            f"{VERSION}; choose {FORMAT('safetensors')} or bin",
            "refused",
        )

    old = [*source.weights.tensors, *source.weights.aliases, *source.weights.absent]
    new = {name: name.removeprefix(_PREFIX) for name in old if name.startswith(_PREFIX)}
    rules = (f"without {_PREFIX} ({counted(len(new), 'name')})",) if new else ()
    packed_weights = packed.marked(source.weights, Surroundings(), request)

    return Product(
        "lightning",
        renamed(packed_weights.weights, new),
        Surroundings(),
        renamed={name: old for old, name in new.items()},
        rules=rules,
        proof=source.record if source.weights.copies else None,
        strict=source.of_one_save,
        notes=(*packed_weights.notes, *entries(source).notes),
    )


def require_every_name(source: Source, tied: Tied) -> None:
    """Raises where tied names would be left out: Lightning's reader wants them all."""
    if tied == "drop" and source.weights.aliases:
        raise CheckpointError(
            f"{TIED('drop')} does not go with {FORMAT('lightning')}: load_from_checkpoint "
            "wants every name; leave one of them out",
            "refused",
        )


def entries(source: Source) -> LightningEntries:
    """The entries of the checkpoint that a pickle without classes can hold."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in source.entries.items():
        if not isinstance(key, str) or key in _DEEPSPEEDS or key in _TRAINING:
            continue

        if key in _ARGUMENTS and isinstance(value, dict):
            value, objects = _plain_items(value)
            notes += [_argument(key, name, kind) for name, kind in objects.items()]

        if wrapped_state_dict.is_plain(value):
            values[key] = value
        elif key in _ARGUMENTS:
            notes.append(f"{key} is {_kind(value)}, not written: pass all arguments yourself")
        elif not key.endswith("hparams_type"):  # a class, which plain arguments need not
            notes.append(f"{key} is {_kind(value)}, not a plain value: left out")

    return LightningEntries(values, tuple(notes))


def verdict() -> LoadVerdict:
    """Of a file whose reader is the user's own class."""
    return LoadVerdict(
        "not checked: load_from_checkpoint compares the names with those of your LightningModule",
        reader="LightningModule",
    )


def _plain_items(arguments: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, str]]:
    """The arguments that are plain values, and what the others are."""
    plain_items = {
        name: value
        for name, value in arguments.items()
        if wrapped_state_dict.is_plain(name) and wrapped_state_dict.is_plain(value)
    }
    objects = {
        str(name): _kind(value) for name, value in arguments.items() if name not in plain_items
    }

    return plain_items, objects


def _kind(value: Any) -> str:
    if isinstance(value, TensorRef):
        return "a tensor"
    if isinstance(value, Global):
        return str(value)
    kind = state_files.kind(value)
    return (
        f"{with_article(kind)} with objects in it"
        if kind in ("dict", "list", "tuple", "set")
        else kind
    )


def _argument(key: str, name: str, kind: str) -> str:
    return (
        f"{key}: {name} is {kind}, not a plain value: left out; pass it, "
        f"load_from_checkpoint(..., {name}=...)"
    )
