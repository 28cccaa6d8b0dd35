"""Does an adapter folder load? Its names against those that PEFT will look for.

PEFT makes the adapter's layers by the configuration, and warns at most of a layer
without values. So each adapted layer has to have all its tensors, of shapes that fit
together, and what PEFT itself saved of the live model (the adapter's file in the
checkpoint) has to have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.weights import advice
from ckpt.weights.adapters import stored_adapter
from ckpt.weights.adapters.adapter_config import DEFAULT
from ckpt.weights.adapters.stored_adapter import Stored
from ckpt.weights.output.product import Product
from ckpt.weights.reader.verdict import LoadVerdict
from ckpt.weights.request import Request
from converters import words
from converters.errors import CheckpointError
from converters.formats import gathered_16bit
from converters.options import CHECK
from converters.peft import config as configs
from converters.peft import kinds, names
from converters.peft.config import NAME, AdapterConfig
from converters.storage import bounded_json
from converters.tensors import TensorRef, Weights
from converters.words import counted

_NEEDED = {  # by kind: the tensors that every adapted layer has
    "LORA": (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")),
    "ADALORA": (("lora_A", "lora_B", "lora_E"),),
    "LOHA": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "IA3": (("ia3_l",),),
    "VERA": (("vera_lambda_b", "vera_lambda_d"),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One adapter as PEFT sees it: the count of names it wants, and those not there."""

    config: AdapterConfig
    count: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...]


def check(product: Product, root: Path, request: Request) -> LoadVerdict:
    """The verdict on a product of the kind adapter.

    ``CheckpointError`` (incomplete) where a tensor that PEFT needs is missing or has no
    elements.
    """
    if request.check == "none":
        return LoadVerdict(f"not checked ({CHECK('none')})")

    inner_parts = [part for part in product.parts if part.kind == "adapter"]
    adapter_names = (request.naming.part or DEFAULT).split(",")
    main_name = DEFAULT if DEFAULT in adapter_names else adapter_names[0]
    parts = {"": product.weights} | {part.folder: part.weights for part in inner_parts}
    results = [
        _checked(product, folder, weights, root, folder or main_name)
        for folder, weights in parts.items()
    ]
    _require_names(root, [name for result in results for name in result.missing])

    unexpected = tuple(name for result in results for name in result.unexpected)
    notes = [note for result in results for note in result.notes]
    if request.check == "transformers":
        notes.append(
            f"{CHECK('transformers')} builds whole models; the adapter's names were checked"
        )

    absent = tuple(name for weights in parts.values() for name in weights.absent)
    total = sum(result.count for result in results)
    names = counted(total + len(absent), "name")
    names_of_all = [main_name, *(part.folder for part in inner_parts)]
    what = _title_of_all(results[0].config, product.weights, names_of_all)
    line = f"loads as {what}: {total:,} of {names}"

    return LoadVerdict(
        line,
        reader="PeftModel",
        loads=not absent,
        missing=absent,
        unexpected=unexpected,
        notes=tuple(notes),
    )


def _require_names(root: Path, missing: Sequence[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{root}: PEFT would not load the adapter: {words.some(missing, words.LONG_LIST)}: not "
            f"in the checkpoint; {advice.tensors_as_stored()}",
            "incomplete",
        )


def _title_of_all(config: AdapterConfig, weights: Weights, names_of_all: Sequence[str]) -> str:
    """The adapters and their base, for people; several are told by their names."""
    base = config.base_model_name_or_path or "its base model"
    if len(names_of_all) == 1:
        return f"{title(config, weights)} of {base}"
    return f"{len(names_of_all)} adapters ({' and '.join(names_of_all)}) of {base}"


def title(config: AdapterConfig, weights: Weights) -> str:
    """An adapter for people, such as ``LoRA adapter``."""
    if config.prompt:
        return f"{kinds.title(config.peft_type)} prompt"
    dora = any("lora_magnitude_vector" in name for name in weights.tensors)
    return f"{kinds.title(config.peft_type)}{' (DoRA)' if dora else ''} adapter"


def _checked(product: Product, folder: str, weights: Weights, root: Path, adapter: str) -> Checked:
    text = product.texts[f"{folder}/{NAME}" if folder else NAME]
    config = configs.parse(bounded_json.loads(text), root / folder / NAME)
    tensors = {
        **weights.tensors,
        **{alias: weights.tensors[owner] for alias, owner in weights.aliases.items()},
    }
    _require_elements(tensors, config)
    missing = list(_incomplete(tensors, config))

    stored = stored_adapter.read(root, adapter, alone=not folder)
    unexpected: list[str] = []
    notes = []
    if stored is not None and not stored.empty:
        absent, unexpected = _differences(tensors, stored)
        if gathered_16bit.belongs(root):
            missing += absent
        if absent or unexpected:
            notes.append(_other_names(stored.path.name, [*absent, *unexpected]))
    elif stored is not None:
        notes.append(
            f"{stored.path.name} in the checkpoint holds no values (its tensors have "
            "no elements); the adapter was made of the ZeRO states"
        )

    return Checked(
        config=config,
        count=len(tensors),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        notes=tuple(notes),
    )


def _differences(tensors: Mapping[str, TensorRef], stored: Stored) -> tuple[list[str], list[str]]:
    """The names that only the adapter's own file has, and those that it lacks."""
    absent = [
        name
        for name in stored.tensors
        if name not in tensors and names.parsed(name).role != names.ORIGINAL  # PEFT passes it over
    ]
    unexpected = [
        name
        for name in tensors
        if name not in stored.tensors and names.parsed(name).role != names.BASE_LAYER  # embeddings
    ]
    return absent, unexpected


def _other_names(file: str, differing: Sequence[str]) -> str:
    """A note on an adapter's own file that has more names, or fewer."""
    statement = (
        f"{file} in the checkpoint has other names ({words.some(differing, words.LONG_LIST)})"
    )
    if all(names.parsed(name).role in (names.BASE, names.BASE_LAYER) for name in differing):
        return (
            f"{statement}: PEFT saved it with or without the embeddings, depending on "
            "save_embedding_layers and on whether it could look up the base's "
            "vocabulary"
        )

    return f"{statement}: it is of another adapter, or of another version of PEFT"


def _require_elements(tensors: Mapping[str, TensorRef], config: AdapterConfig) -> None:
    empty = [name for name, ref in tensors.items() if not ref.numel]
    if empty and config.peft_type != "ADALORA":  # whose budget may leave a layer no rank at all
        raise CheckpointError(
            f"{words.some(empty, words.LONG_LIST)}: no elements, so there is no adapter to load",
            "incomplete",
        )


def _incomplete(tensors: Mapping[str, TensorRef], config: AdapterConfig) -> Iterator[str]:
    """Names that an adapted layer needs and lacks."""
    sets = _NEEDED.get(config.peft_type)
    if sets is None:
        return

    for module, present in _layers(tensors).items():
        needed = next((group for group in sets if set(group) & present.keys()), ())
        if config.use_dora and config.peft_type == "LORA":
            needed = (*needed, "lora_magnitude_vector")
        for role in needed:
            if role not in present:
                yield f"{module}.{role}"


def _layers(tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """By adapted layer: the names of its tensors by their role."""
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        parts = name.split(".")
        for index, part in enumerate(parts):
            if names.is_role(part) and part != names.TOKENS and index > 1:
                layers.setdefault(".".join(parts[:index]), {}).setdefault(part, name)
                break

    return layers
