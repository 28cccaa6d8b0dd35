"""The weights of a sentence-transformers model, each module's for its folder.

0.model.encoder...    of the module whose folder is the model's own: model.safetensors, without
                      "0.model." ("0.auto_model." before sentence-transformers 5)
2.linear.weight       of "2_Dense": 2_Dense/model.safetensors, without "2."

A SentenceTransformer inside another module has that one's prefix before all of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckpt.weights import parts
from ckpt.weights.companions.model_code import MODULES
from ckpt.weights.companions.module_folders import Module, modules
from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.naming import naming
from ckpt.weights.naming.naming import NamedWeights
from ckpt.weights.output.part import Part
from ckpt.weights.request import Naming
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.names.selection import renamed, selected
from converters.options import CONFIG
from converters.words import counted

# the attribute of a Transformer module that holds the model
_INNER = (
    "auto_model.",
    "model.",
)
_FIRST = LazyPattern(r"0\.(auto_model|model)\.")
_WEIGHTY = (  # kinds whose folder has to have a file of weights (6.2, load_torch_weights)
    *("Transformer", "CLIPModel", "Dense", "StaticEmbedding", "WordEmbeddings"),
    *("LSTM", "CNN"),
    *("LayerNorm", "WeightedLayerPooling", "WordWeights", "SparseAutoEncoder"),
)


class Split(NamedTuple):
    """The weights of the model's own folder, and those of the other modules.

    ``wishes`` are the wishes for names that are not fulfilled yet. ``lacking`` are
    modules without the weights that SentenceTransformer needs.
    """

    main: NamedWeights
    wishes: Naming
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


def split(unwrapped: NamedWeights, surroundings: Surroundings, wishes: Naming) -> Split:
    """The weights by the folders that modules.json, among the surroundings, names.

    Unchanged where there is no modules.json, or where no name is one of its modules'.
    If the names only fit after the changes that the user wishes, these are made first.
    """
    names = list(unwrapped.weights.order or unwrapped.weights.tensors)
    path = surroundings.companions.get(MODULES)
    if path is None:
        return Split(unwrapped, wishes, notes=_note_on_modules(names))

    try:
        folders = modules(path.parent)
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{path.parent}/")
        return Split(unwrapped, wishes, notes=(f"{problem}; {CONFIG('DIR')} takes another",))

    model, remaining_wishes = _inside(unwrapped, folders, wishes)
    owners = _owners(model, folders)
    lacking = _lacking(folders, owners)
    notes = _notes_on_missing(lacking)
    if not any(owners.values()):
        return Split(unwrapped, wishes, notes=notes, lacking=lacking)

    main, others = _divided(model, folders, owners)

    return Split(main, remaining_wishes, _one_per_folder(others), notes, lacking)


def _inside(
    unwrapped: NamedWeights, folders: Sequence[Module], wishes: Naming
) -> tuple[NamedWeights, Naming]:
    """The weights by a SentenceTransformer's names, and the wishes not yet fulfilled.

    The names may have the prefix of a module around the model: one that all names have,
    or that the user drops.
    """
    if any(_owners(unwrapped, folders).values()):
        return unwrapped, wishes

    has_part = any(name.startswith(f"{wishes.part}.") for name in unwrapped.weights.tensors)
    if wishes.strip or wishes.rename or has_part:
        model = naming.as_wished(unwrapped, replace(wishes, part=wishes.part if has_part else None))
        remaining_wishes = replace(
            wishes, strip=(), rename=(), part=None if has_part else wishes.part
        )
        return model, remaining_wishes

    all_names = parts.every_name(unwrapped.weights)
    for rule, changes in naming.shared_prefixes(all_names):
        model = unwrapped.with_names(changes, rule)
        owners = _owners(model, folders)
        if all(owners.values()) and not _lacking(folders, owners):
            return model, wishes

    return unwrapped, wishes


def _divided(
    unwrapped: NamedWeights,
    folders: Sequence[Module],
    owners: Mapping[str, Module | None],
) -> tuple[NamedWeights, list[Part]]:
    """The weights of the model's own folder (and of no module), and of the others."""
    own_names: dict[str, str] = {}
    others: list[Part] = []
    for module in folders:
        new_names = _own_names([name for name, owner in owners.items() if owner is module], module)
        if not module.folder:
            own_names |= new_names
        elif new_names:
            others.append(_part(unwrapped, module, new_names))

    unowned = {name: name for name, owner in owners.items() if owner is None}
    main = renamed(selected(unwrapped.weights, [*own_names, *unowned]), own_names)
    origin = {new_names: unwrapped.renamed.get(old, old) for old, new_names in own_names.items()}
    count = sum(owner is not None for owner in owners.values())
    rules = (
        *unwrapped.rules,
        f"each module's own, by {MODULES} ({counted(count, 'name')})",
    )
    rest_renamed = {name: old for name, old in unwrapped.renamed.items() if name in unowned}

    return replace(unwrapped, weights=main, renamed=rest_renamed | origin, rules=rules), others


def _part(unwrapped: NamedWeights, module: Module, new: Mapping[str, str]) -> Part:
    weights = renamed(selected(unwrapped.weights, new), new)
    old_names = {name: unwrapped.renamed.get(old, old) for old, name in new.items()}
    return Part(module.folder, weights, old_names)


def _owners(unwrapped: NamedWeights, folders: Sequence[Module]) -> dict[str, Module | None]:
    """The module that each name is of, by the names; ``None`` for what is of none."""
    names = unwrapped.weights.order or unwrapped.weights.tensors
    return {name: _owner(name, folders) for name in names}


def _owner(name: str, folders: Sequence[Module]) -> Module | None:
    return next((module for module in folders if name.startswith(module.prefix)), None)


def _own_names(members: Sequence[str], module: Module) -> dict[str, str]:
    """The members' names as the module itself, or the model in it, calls them."""
    short_names = {name: name.removeprefix(module.prefix) for name in members}
    for inner in _INNER:
        if all(name.startswith(inner) for name in short_names.values()):
            return {old: name.removeprefix(inner) for old, name in short_names.items()}

    return short_names


def _one_per_folder(parts: Sequence[Part]) -> tuple[Part, ...]:
    """One part a folder: a module of several routes has its names once for each."""
    by_folder: dict[str, Part] = {}
    for part in parts:
        if part.weights.tensors:
            by_folder.setdefault(part.folder, part)

    return tuple(by_folder.values())


def _lacking(folders: Sequence[Module], owners: Mapping[str, Module | None]) -> tuple[str, ...]:
    """The modules with a folder that need weights and have none here.

    The weights of the model's own folder may be there under names of its own.
    """
    folders_with_weights = {owner.folder for owner in owners.values() if owner is not None}
    return tuple(
        f"{module.folder or 'the first module'} ({module.kind})"
        for module in folders
        if module.folder not in folders_with_weights
        and module.kind.endswith(_WEIGHTY)
        and (module.folder or any(owners.values()))
    )


def _notes_on_missing(lacking: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        f"{module} has no weights in the checkpoint: SentenceTransformer does not load "
        "the output without them"
        for module in lacking
    )


def _note_on_modules(names: Sequence[str]) -> tuple[str, ...]:
    if not any(_FIRST.match(name) for name in names):
        return ()

    return (
        f"the names begin with numbers (0.model...), and no {MODULES} says which modules "
        "these are, so the weights are not divided; if the model is a "
        f"SentenceTransformer, {CONFIG('DIR')} takes {MODULES}, and the folders it names, "
        "from a folder that its save_pretrained wrote",
    )
