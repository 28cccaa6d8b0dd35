"""The adapters in a PEFT checkpoint, and the folder that PEFT loads them from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckpt.weights import advice
from ckpt.weights.request import Request
from converters import words
from converters.detect.filenames import ADAPTER_CONFIG as NAME
from converters.errors import CheckpointError
from converters.options import ADAPTER_CONFIG, MERGE, PART, RENAME, SELECT, STRIP
from converters.peft import names
from converters.peft.names import DEFAULT, ParsedName
from converters.source import Place, Source
from converters.storage import stores
from converters.tensors import Weights

if TYPE_CHECKING:  # models need none of it, and their memory is counted
    from ckpt.weights.adapters.written_adapter import Origin, WrittenAdapter
    from ckpt.weights.companions.surroundings import Surroundings
    from ckpt.weights.naming.naming import NamedWeights
    from ckpt.weights.output.product import Product
    from converters.peft.config_fit import Shown

MAX_ADAPTERS = 256  # adapters of a model
CHAT = ("lora_right_weight", "lora_left_weight")  # DeepSpeed-Chat's factors
_NOT_BESIDE = ("generation_config.json",)
_CARD = "README.md"


class Adapter(NamedTuple):
    """The adapters in a checkpoint.

    ``names`` are their names, ``default`` first if it is there. ``parameters`` are
    those of each adapter, under the names of the unwrapped weights; ``evidence`` is
    what the tensors of each tell of its configuration. ``chat`` is true for
    DeepSpeed-Chat's LoRA, which is not PEFT's and has no names of adapters.
    """

    names: tuple[str, ...]
    parameters: Mapping[str, tuple[ParsedName, ...]]
    evidence: Mapping[str, Shown]
    chat: bool = False

    def origin(self, name: str) -> Origin:
        """One of the adapters, as the checkpoint has it."""
        from ckpt.weights.adapters.written_adapter import Origin

        return Origin(name=name, alone=len(self.names) == 1, evidence=self.evidence[name])


def unwrapped(weights: Weights) -> NamedWeights:
    """The weights of a PEFT model without what wrappers put into names."""
    from ckpt.weights.naming import naming

    return naming.unwrapped(weights)


def recognized(weights: Weights, root: Path, request: Request) -> Adapter | None:
    """The adapter in these weights, or ``None`` where there is none."""
    all_names = [*weights.tensors, *weights.aliases, *weights.absent]
    if any(name.endswith(CHAT) for name in all_names):
        return Adapter((), {}, {}, chat=True)

    groups = names.adapters(all_names)
    if not groups:
        _refuse_unknown(all_names, root)
        return None

    from converters.peft import config_fit

    _require_folders(groups, root)
    ordered_names = sorted(groups, key=lambda name: name != DEFAULT)
    untouched = config_fit.untouched(weights.tensors)
    evidence = {
        name: config_fit.shown(groups[name], weights.tensors, untouched) for name in ordered_names
    }
    parameters = {name: tuple(groups[name]) for name in ordered_names}

    return Adapter(tuple(ordered_names), parameters, evidence)


def _require_folders(groups: Collection[str], root: Path) -> None:
    """Raises unless each adapter's name can be the name of a folder, as PEFT needs."""
    if len(groups) > MAX_ADAPTERS:
        raise CheckpointError(f"{root} has {len(groups)} adapters, expected at most {MAX_ADAPTERS}")

    for name in groups:
        if not name or not name.isprintable() or any(part in name for part in "/\\\0"):
            raise CheckpointError(
                f"{root} has an adapter with the name {name!r}, which no folder can "
                f"have; {advice.tensors_as_stored()}",
                "refused",
            )


def _refuse_unknown(all_names: Iterable[str], root: Path) -> None:
    """Raises for the names of a PEFT model whose kind of adapter is not known."""
    path = root / NAME
    if not stores.is_file(path) or not any(name.startswith(names.WRAPPER) for name in all_names):
        return

    from converters.peft import config as configs

    try:
        config = configs.read(path)
    except CheckpointError:
        return  # it may be of another model

    from converters.peft import kinds

    if not config.prompt and config.peft_type not in kinds.KINDS:
        from converters.peft import export

        export.require_supported(config)


def require_own_names(request: Request) -> None:
    """Raises where names are asked for: an adapter's and a merged model's are given."""
    wishes = request.naming
    options = {
        STRIP: wishes.strip,
        RENAME: wishes.rename,
        SELECT: wishes.select,
    }
    for option, values in options.items():
        if values:
            raise CheckpointError(
                f"{option} does not go with a PEFT checkpoint: an adapter is written "
                "under the names that PEFT loads, a merged model under those of its "
                "base; leave the option out",
                "refused",
            )


def product(
    source: Source,
    unwrapped: NamedWeights,
    adapter: Adapter,
    surroundings: Surroundings,
    request: Request,
) -> Product:
    """The adapter folder. Reads headers and small files.

    ``CheckpointError`` for a LoRA that PEFT has no format for, a configuration that is
    missing or does not fit the tensors, and ``--part`` of an adapter that is not there.
    """
    if adapter.chat:
        raise _without_format(source.place)

    from ckpt.weights.adapters import written_adapter
    from ckpt.weights.adapters.named_base import NamedBases
    from ckpt.weights.output.part import Part
    from ckpt.weights.output.product import Product

    adapter_names = chosen_names(adapter, request) or adapter.names
    adapter_names = tuple(sorted(adapter_names, key=lambda name: name != DEFAULT))
    bases = NamedBases([adapter.evidence[name].trained for name in adapter_names], request)
    parts = [
        written_adapter.write_plan(source, unwrapped, adapter.origin(name), bases, request)
        for name in adapter_names
    ]
    main, *others = parts

    return Product(
        "adapter",
        main.weights,
        _beside(source.place, surroundings),
        renamed={new: old for part in parts for new, old in part.renamed.items()},
        rules=unwrapped.rules,
        texts={NAME: main.text} | {f"{part.name}/{NAME}": part.text for part in others},
        proof=main.proof,
        strict=main.strict,
        notes=_notes(unwrapped.weights, parts, adapter),
        parts=tuple(Part(part.name, part.weights, kind="adapter") for part in others),
    )


def _without_format(place: Place) -> CheckpointError:
    return CheckpointError(
        f"{place.folder} holds a LoRA of DeepSpeed-Chat (lora_right_weight, "
        f"lora_left_weight), for which PEFT has no format. {MERGE} with "
        f"{ADAPTER_CONFIG('FILE')} writes the merged model; FILE is JSON with the "
        f"training's lora_alpha and r. {advice.tensors_as_stored()}",
        "unsupported",
    )


def chosen_names(adapter: Adapter, request: Request) -> tuple[str, ...] | None:
    """The adapters that ``--part`` names (``A,B``: both), in order; else ``None``.

    ``CheckpointError`` (refused) for a name that no adapter has.
    """
    part = request.naming.part
    if part is None:
        return None

    chosen = tuple(dict.fromkeys(part.split(",")))
    for name in chosen:
        if name not in adapter.names:
            raise CheckpointError(
                f"{PART(name)}: no such adapter; the adapters are {', '.join(adapter.names)}",
                "refused",
            )
    return chosen


def _beside(place: Place, surroundings: Surroundings) -> Surroundings:
    """Tokenizer, processor and card, without what would mark a model's folder."""
    companions = {
        name: path
        for name, path in surroundings.companions.items()
        if name not in _NOT_BESIDE and not name.endswith(".py")
    }
    card = place.root / _CARD
    if stores.is_file(card):
        companions.setdefault(_CARD, card)
    notes = tuple(note for note in surroundings.notes if "config.json" not in note)

    return replace(surroundings, config=None, config_path=None, companions=companions, notes=notes)


def _notes(weights: Weights, parts: Iterable[WrittenAdapter], adapter: Adapter) -> tuple[str, ...]:
    """Where the configuration comes from, and what is trained and not in the folder."""
    notes: list[str] = []
    written_names: set[str] = set()
    for part in parts:
        notes += part.notes
        written_names |= part.sources

    adapter_names = {parameter.name for group in adapter.parameters.values() for parameter in group}
    other_trained = [
        name for name in _trained(weights) if name not in written_names | adapter_names
    ]
    if other_trained:
        notes.append(
            f"{words.some(other_trained, words.LONG_LIST)}: trained, but not part of the adapter, "
            f"so not in this folder; {advice.every_tensor()}"
        )

    return tuple(notes)


def _trained(weights: Weights) -> Iterable[str]:
    """The trained parameters, where the checkpoint tells them from frozen ones."""
    untrained = weights.frozen | weights.buffers | weights.packed
    trained = [name for name in weights.tensors if name not in untrained]
    if any(
        names.parsed(name).role == names.BASE_LAYER
        for name in trained
        if _is_parameter(weights, name)
    ):
        return ()

    return (name for name in trained if _is_parameter(weights, name))


def _is_parameter(weights: Weights, name: str) -> bool:
    """Whether a tensor is a parameter, and not a constant of another's quantization."""
    return weights.tensors[name].dtype.floating and not any(
        head in weights.tensors
        for head in accumulate(name.split("."), "{}.{}".format)
        if head != name
    )
