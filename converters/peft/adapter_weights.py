"""The tensors of an adapter under the names that PEFT gives them, as ``Weights``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters import words
from converters.errors import CheckpointError
from converters.names import selection
from converters.peft import names
from converters.peft.export import PROMPT_EMBEDDINGS, Selection
from converters.tensors import Listed, TensorRef, Weights


def built(
    weights: Weights, chosen: Selection, stored: Mapping[str, TensorRef]
) -> tuple[Weights, tuple[str, ...]]:
    """The adapter's weights, and notes on embeddings that are not in the checkpoint.

    ``stored`` are the tensors of the adapter's own file in the checkpoint, by PEFT's
    names: frozen embeddings are taken from there where the states do not hold them.
    ``CheckpointError`` for a tensor without values.
    """
    tensors: dict[str, TensorRef] = {}
    copies: dict[str, TensorRef] = {}
    owners: dict[str, str] = {}
    aliases: dict[str, str] = {}
    missing: list[str] = []

    for saved_name, source_name in chosen.sources.items():
        owner = weights.aliases.get(source_name, source_name)
        if owner not in weights.tensors:
            _require_embedding(weights, chosen, saved_name, source_name)
            missing.append(saved_name)
            continue

        first = owners.setdefault(owner, saved_name)
        if first != saved_name:
            aliases[saved_name] = first
            continue

        tensors[saved_name] = _chosen_ranks(weights.tensors[owner], saved_name, chosen)
        if owner in weights.copies and saved_name not in chosen.masks:
            copies[saved_name] = weights.copies[owner]

    if chosen.prompt:
        tensors[PROMPT_EMBEDDINGS] = _prompt(weights, chosen)
        copies.pop(PROMPT_EMBEDDINGS, None)

    frozen = _frozen_embeddings(chosen, missing, stored)
    tensors |= frozen
    notes = _notes([name for name in missing if name not in frozen], list(frozen))
    buffers, frozen_names = (
        frozenset(saved_name for owner, saved_name in owners.items() if owner in members)
        for members in (weights.buffers, weights.frozen)
    )
    adapter = _adapter(weights, tensors, aliases, copies)

    return replace(adapter, buffers=buffers, frozen=frozen_names | frozenset(frozen)), notes


def _adapter(
    weights: Weights,
    tensors: Mapping[str, TensorRef],
    aliases: Mapping[str, str],
    copies: Mapping[str, TensorRef],
) -> Weights:
    """An adapter's tensors as ``Weights``, with the checksums that prove them."""
    read = [*_located(tensors), *copies.values()]
    return Weights(
        tensors,
        aliases,
        copies=copies,
        checksums=selection.proving(read, weights.checksums),
        order=(*tensors, *aliases),
    )


def _require_embedding(
    weights: Weights, chosen: Selection, saved_name: str, source_name: str
) -> None:
    """Raises for a tensor without values, unless it is of the base's embeddings."""
    if saved_name in chosen.embeddings or names.parsed(source_name).adapter is None:
        return

    reason = weights.absent.get(source_name, "it is not in the checkpoint")
    raise CheckpointError(f"{source_name}, a tensor of the adapter, has no values: {reason}")


def _located(tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
    """The tensors that lie in files; the inputs of those that are computed."""
    return [
        part
        for tensor in tensors.values()
        for part in (getattr(tensor, "inputs", None) or (tensor,))
    ]


def _prompt(weights: Weights, chosen: Selection) -> TensorRef:
    """The prompt that the encoder's network makes."""
    from converters.peft import prompts  # which imports numpy

    owners = {ending: weights.aliases.get(name, name) for ending, name in chosen.prompt.items()}
    tensors = {ending: weights.tensors[name] for ending, name in owners.items()}
    with_copies = {ending: name for ending, name in owners.items() if name in weights.copies}
    copies = {ending: weights.copies[name] for ending, name in with_copies.items()}

    return prompts.prompt(tensors, copies)


def _chosen_ranks(tensor: TensorRef, name: str, chosen: Selection) -> TensorRef:
    """The ranks of a tensor that AdaLoRA keeps."""
    mask = chosen.masks.get(name)
    if mask is None or all(mask):
        return tensor

    columns = name.endswith(".lora_B")
    if len(tensor.shape) != 2 or len(mask) != tensor.shape[1 if columns else 0]:
        raise CheckpointError(
            f"{name} has the shape {words.shape(tensor.shape)}, and rank_pattern has "
            f"{len(mask)} ranks for it"
        )

    ranked = tuple(rank for rank, keeps in enumerate(mask) if keeps)
    rows, width = tensor.shape
    if not ranked:
        return TensorRef(tensor.dtype, (rows, 0) if columns else (0, width), Listed())
    if columns:
        from converters.peft import columns as matrices  # which imports numpy

        return matrices.columns(tensor, ranked)

    pieces = [tensor.narrow(row * width, width) for row in ranked]
    return TensorRef.concat(pieces).view(len(ranked), width)


def _frozen_embeddings(
    chosen: Selection,
    missing: list[str],
    stored: Mapping[str, TensorRef],
) -> dict[str, TensorRef]:
    """Embeddings that the adapter's own file holds,
    and the states do not: they are frozen.

    So are the originals of embeddings that are trained whole, which PEFT saves beside
    them where the vocabulary was resized.
    """

    def is_frozen(name: str) -> bool:
        return name in missing or (name not in chosen.sources and _is_base_tensor(name))

    return {name: tensor for name, tensor in stored.items() if tensor.numel and is_frozen(name)}


def _is_base_tensor(name: str) -> bool:
    """Whether a name in an adapter's file is that of a tensor of the base model."""
    if names.parsed(name).role not in (names.BASE, names.BASE_LAYER, names.ORIGINAL):
        return False
    parts = name.split(".")
    return not any(names.is_role(part) or part == names.TOKEN_ADAPTER for part in parts)


def _notes(missing: list[str], from_adapter_file: list[str]) -> tuple[str, ...]:
    notes = []
    if from_adapter_file:
        notes.append(
            f"{words.some(from_adapter_file, words.LONG_LIST)}: not trained and not in the states; "
            "taken from the adapter's own file in the checkpoint"
        )

    if missing:
        notes.append(
            f"{words.some(missing, words.LONG_LIST)}: not trained and not in the checkpoint, so "
            "the base model's own values are used; if its vocabulary was resized, "
            "resize the base model likewise"
        )

    return tuple(notes)
