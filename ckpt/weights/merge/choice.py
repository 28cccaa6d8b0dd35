"""Which adapters are merged, and which weights the merged model has."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.weights import advice, parts
from ckpt.weights.adapters import (
    adapter_config,
    config_doubts,
    saved_tensors,
    stored_adapter,
)
from ckpt.weights.adapters.adapter_folder import Adapter, chosen_names
from ckpt.weights.request import Request
from converters import words
from converters.errors import CheckpointError
from converters.names import selection
from converters.options import ADAPTER_CONFIG, PART
from converters.peft import config as configs
from converters.peft import kinds, names
from converters.peft.config import AdapterConfig
from converters.source import Place
from converters.storage import stores
from converters.tensors import Weights


def inside(weights: Weights, adapter: Adapter) -> tuple[Weights, tuple[str, ...]]:
    """The weights inside the PEFT model, and a note on those around it.

    A merged model is the model inside. Of the tensors around it only trl's value head
    is read from the same folder.
    """
    parameters = [parameter for group in adapter.parameters.values() for parameter in group]
    if not parameters or not all(parameter.prefix for parameter in parameters):
        return weights, ()

    all_names = parts.every_name(weights)
    outer_names = frozenset(
        name
        for name in all_names
        if not names.parsed(name).prefix and not name.startswith(parts.VALUE_HEAD)
    )
    if not outer_names:
        return weights, ()

    note = (
        f"{words.some((name for name in all_names if name in outer_names), words.LONG_LIST)}: "
        "outside of the PEFT model, so not part of the merged one; "
        f"{advice.every_tensor()}"
    )

    return selection.selected(weights, frozenset(all_names) - outer_names), (note,)


def adapters(
    place: Place, weights: Weights, adapter: Adapter, request: Request
) -> tuple[dict[str, AdapterConfig], tuple[str, ...]]:
    """The adapters to merge, in order, with their configurations; and notes."""
    if adapter.chat:
        return {adapter_config.DEFAULT: _chat_config(place, request)}, ()

    adapter_names, notes = _chosen(weights, adapter, request)
    configurations = {
        name: adapter_config.configuration(place, request, name, adapter.evidence[name])
        for name in adapter_names
    }
    doubts = [
        note
        for name, config in configurations.items()
        for note in _doubts(place, weights, adapter, name, config, request)
    ]

    return configurations, (*notes, *doubts)


def _doubts(
    place: Place,
    weights: Weights,
    adapter: Adapter,
    name: str,
    config: AdapterConfig,
    request: Request,
) -> tuple[str, ...]:
    """Doubts about the configuration of one adapter."""
    if config.prompt:  # which is not merged
        return ()

    stored = stored_adapter.read(place.root, name, alone=len(adapter.names) == 1)
    sources = saved_tensors.selected(weights, config, name, request).sources
    trained = adapter.evidence[name].trained

    return config_doubts.of_merge(weights, sources, config, trained, stored)


def _chosen(
    weights: Weights, adapter: Adapter, request: Request
) -> tuple[Sequence[str], tuple[str, ...]]:
    """The adapters that ``--part`` names, in this order, else the trained ones."""
    chosen = chosen_names(adapter, request)
    if chosen is not None:
        return chosen, ()

    adapter_names = adapter.names
    if len(adapter_names) > 1 and not _tells_trained(weights):
        raise CheckpointError(
            f"the checkpoint has the adapters {', '.join(adapter_names)}, but without "
            f"ZeRO it does not say which of them were trained; {PART(adapter_names[0])} "
            f"merges one, {PART(','.join(adapter_names))} all of them in this order",
            "refused",
        )

    trained = [
        name
        for name in adapter_names
        if any(part.name not in weights.frozen for part in adapter.parameters[name])
    ]
    chosen = tuple(trained or adapter_names)
    if len(adapter_names) == 1:
        return chosen, ()

    others = [name for name in adapter_names if name not in chosen]
    untrained_text = f", not {', '.join(others)}, which was not trained" if others else ""
    order_text = " in this order" if len(chosen) > 1 else ""
    note = (
        f"merged in: {', '.join(chosen)}{order_text}{untrained_text}; {PART('NAME')} "
        f"merges one, {PART('A,B')} several"
    )

    return chosen, (note,)


def _tells_trained(weights: Weights) -> bool:
    """Whether the checkpoint tells trained tensors from frozen, or has only trained."""
    if weights.trained or weights.frozen:
        return True
    return not any(names.parsed(name).role == names.BASE_LAYER for name in weights.tensors)


def _chat_config(place: Place, request: Request) -> AdapterConfig:
    """The configuration for DeepSpeed-Chat's LoRA, which saves none."""
    path = request.adapter_config
    if path is None:
        own_path = place.root / configs.NAME
        if not stores.is_file(own_path):
            raise CheckpointError(
                f"{place.folder} holds a LoRA of DeepSpeed-Chat, and no file says how it "
                f"is scaled; name one with {ADAPTER_CONFIG('FILE')}, such as "
                '{"peft_type": "LORA", "lora_alpha": 1}, where lora_alpha is the '
                "lora_scaling of the training (1 by default)",
                "incomplete",
            )

        path = own_path

    config = configs.read(path)
    if config.peft_type != "LORA":
        raise CheckpointError(
            f"{config.path} is of {kinds.title(config.peft_type)}, but the tensors are "
            "those of DeepSpeed-Chat's LoRA",
            "refused",
        )

    return config
