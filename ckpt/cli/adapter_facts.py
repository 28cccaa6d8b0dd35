"""The facts on adapters in a checkpoint, as ``ckpt show`` prints them."""

from __future__ import annotations

from ckpt.cli.results.checkpoints import AdapterEntry, AdapterFacts
from ckpt.weights.adapters import adapter_folder
from ckpt.weights.adapters.adapter_folder import Adapter
from ckpt.weights.request import Request
from converters.peft import names
from converters.source import Place, Source
from converters.tensors import Weights
from converters.words import counted

_BASE_ROLES = (names.BASE, names.BASE_LAYER)


def facts(source: Source, weights: Weights) -> AdapterFacts | None:
    """The adapters in a checkpoint; ``None`` where there are none. Counts are elements."""
    unwrapped = adapter_folder.unwrapped(weights).weights
    adapter = adapter_folder.recognized(unwrapped, source.place.root, Request())
    if adapter is None:
        return None
    if adapter.chat:
        return _chat(unwrapped)

    entries = tuple(_entry(source.place, adapter, name, unwrapped) for name in adapter.names)
    other_names = _other_trained(unwrapped)

    return AdapterFacts(
        adapters=entries,
        parameters=sum(entry.parameters for entry in entries),
        base_parameters=_base_parameters(unwrapped),
        other_parameters=sum(unwrapped.tensors[name].numel for name in other_names),
        other_names=tuple(other_names[:3]),
    )


def _entry(place: Place, adapter: Adapter, adapter_name: str, weights: Weights) -> AdapterEntry:
    from ckpt.weights.adapters import adapter_config, stored_adapter

    appearance = adapter.evidence[adapter_name]
    parameters = adapter.parameters[adapter_name]
    is_only_adapter = len(adapter.names) == 1
    config = adapter_config.likely(place, Request(), adapter_name, appearance, is_only_adapter)
    present = [parameter.name for parameter in parameters if parameter.name in weights.tensors]
    tensors = [weights.tensors[name] for name in present]
    stored = stored_adapter.read(place.root, adapter_name, is_only_adapter)

    return AdapterEntry(
        name=adapter_name,
        title=appearance.title,
        peft_type=config.peft_type if config else appearance.peft_type,
        ranks=tuple(sorted(set(appearance.ranks.values()))),
        targets=tuple(sorted({module.rpartition(".")[2] for module in appearance.modules})),
        base_model=config.base_model_name_or_path if config else None,
        config=config.path if config else None,
        parameters=sum(tensor.numel for tensor in tensors),
        tensors=len(tensors),
        frozen=bool(present) and weights.frozen.issuperset(present),
        empty_file=stored.path if stored is not None and stored.empty else None,
    )


def _chat(weights: Weights) -> AdapterFacts:
    """DeepSpeed-Chat's LoRA, which is of no library and has no configuration."""
    factors = [name for name in weights.tensors if name.endswith(adapter_folder.CHAT)]
    ranks = {
        weights.tensors[name].shape[-1]
        for name in factors
        if name.endswith(adapter_folder.CHAT[0]) and weights.tensors[name].shape
    }

    parameter_count = sum(weights.tensors[name].numel for name in factors)
    entry = AdapterEntry(
        name=None,
        title="LoRA of DeepSpeed-Chat" + (f", r={min(ranks)}" if ranks else ""),
        peft_type=None,
        ranks=tuple(sorted(ranks)),
        targets=(),
        base_model=None,
        config=None,
        parameters=parameter_count,
        tensors=len(factors),
        frozen=bool(factors) and weights.frozen.issuperset(factors),
    )

    base_count = sum(
        tensor.numel for name, tensor in weights.tensors.items() if name not in factors
    )
    return AdapterFacts(adapters=(entry,), parameters=parameter_count, base_parameters=base_count)


def _base_parameters(weights: Weights) -> int:
    """Elements of the base model's own parameters; 0 if only tied names stayed.


    A tied name of a frozen parameter stays where frozen ones are excluded
    (``converters.zero.naming.storage_views``).
    """
    base_names = [name for name in _model_parameters(weights) if name not in weights.trained]
    if weights.frozen and weights.frozen.issuperset(base_names):
        tied = frozenset(weights.aliases.values())
        base_names = [] if tied.issuperset(base_names) else base_names
    return sum(weights.tensors[name].numel for name in base_names)


def _other_trained(weights: Weights) -> list[str]:
    """What is trained besides adapters, where the checkpoint tells: a head, a norm."""
    return [name for name in _model_parameters(weights) if name in weights.trained]


def _model_parameters(weights: Weights) -> list[str]:
    """The parameters that are not part of an adapter."""
    excluded_names = weights.buffers | weights.packed
    parameters = [names.parsed(name) for name in weights.tensors if name not in excluded_names]

    return [
        parameter.name
        for parameter in parameters
        if parameter.role in _BASE_ROLES
        and "." not in parameter.rest
        and not parameter.module.endswith(".weight")
        and weights.tensors[parameter.name].dtype.floating
    ]


def lines(facts: AdapterFacts) -> list[str]:
    """The facts as lines for a reader."""
    report_lines = []
    for adapter in facts.adapters:
        base_model = adapter.base_model or "a base model that no adapter_config.json names here"
        name = f" {adapter.name!r}" if len(facts.adapters) > 1 else ""
        training = "frozen" if adapter.frozen else "trained"
        parameters = counted(adapter.parameters, f"{training} parameter")

        report_lines.append(
            f"adapter{name} ".ljust(13) + f"{adapter.title}, of {base_model}: {parameters} in "
            f"{counted(adapter.tensors, 'tensor')}"
        )

        if adapter.targets:
            report_lines.append(f"targets      {', '.join(adapter.targets)}")
        if adapter.empty_file:
            report_lines.append(
                f"note         {adapter.empty_file} holds no values: its tensors "
                "have no elements; ckpt to-fp32 makes the adapter of the ZeRO states"
            )

    if facts.other_names:
        report_lines.append(
            f"also trained {counted(facts.other_parameters, 'parameter')} outside "
            f"of the adapter, such as {facts.other_names[0]}"
        )

    of_base = "not in this checkpoint"
    if facts.base_parameters:
        of_base = counted(facts.base_parameters, "parameter")
    return [*report_lines, f"base model   {of_base}"]
