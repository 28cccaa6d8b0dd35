"""Whether a configuration that was found is the adapter's: doubts, not proofs.

No tensor holds ``lora_alpha``, so a configuration of another training may fit. The file
that PEFT saved beside it has values then that are not the checkpoint's; or it lists
targets that were not trained; or the base that it names is not the one in the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckpt.weights.adapters import named_base, stored_adapter
from ckpt.weights.adapters.named_base import NamedBase, NamedBases
from ckpt.weights.adapters.stored_adapter import Stored
from converters import words
from converters.options import ADAPTER_CONFIG
from converters.peft import names, targets
from converters.peft.config import NAME, AdapterConfig
from converters.peft.expected_layers import TrainedLayers
from converters.tensors import TensorRef, Weights

_LISTED = f"{NAME} targets its module, which has no adapter in the checkpoint"


@dataclass(frozen=True, slots=True)
class Doubts:
    """Notes for the user; ``absent`` maps names that PEFT looks for to reasons."""

    notes: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


def of_adapter(
    weights: Weights,
    adapter_weights: Weights,
    sources: Mapping[str, str],
    config: AdapterConfig,
    trained: TrainedLayers,
    stored: Stored | None,
    bases: NamedBases,
) -> Doubts:
    """Doubts about the configuration of an adapter written as ``adapter_weights``.

    ``weights`` are the checkpoint's, ``sources`` maps names of ``adapter_weights`` to
    those in it.
    """
    base = bases.of(config, trained)
    lacking = _lacking(weights, config, trained, base)
    notes = [
        *_of_file(adapter_weights.tensors, config, stored),
        *_of_targets(config, trained, lacking, base is not None or _holds_base(weights)),
    ]
    if base is not None and (note := named_base.disagreement(base, weights, config)) is not None:
        notes.append(note)
    return Doubts(tuple(notes), _names(lacking, sources, trained))


def of_merge(
    weights: Weights,
    sources: Mapping[str, str],
    config: AdapterConfig,
    trained: TrainedLayers,
    stored: Stored | None,
) -> tuple[str, ...]:
    """Doubts about the configuration of an adapter that is merged.

    ``sources`` maps the names that PEFT saves to those in ``weights``.
    """
    owners = {new: weights.aliases.get(old, old) for new, old in sources.items()}
    tensors = {new: weights.tensors[o] for new, o in owners.items() if o in weights.tensors}
    lacking = _lacking(weights, config, trained, None)

    return (
        *_of_file(tensors, config, stored),
        *_of_targets(config, trained, lacking, True),
    )


def _of_file(
    tensors: Mapping[str, TensorRef], config: AdapterConfig, stored: Stored | None
) -> list[str]:
    """A note where the file beside the configuration is not of these tensors."""
    if stored is None or config.path is None or config.path.parent != stored.path.parent:
        return []

    mismatched, compared = stored_adapter.count_mismatches(tensors, stored)
    if 2 * mismatched <= compared:
        return []

    alpha = config.lora_alpha
    scale = "" if alpha is None else f", and no tensor tells whether lora_alpha is {alpha:g} here"

    return [
        f"{stored.path.name}, which lies beside {NAME}, has other values than the "
        f"checkpoint, in {mismatched:,} of {compared:,} tensors that were compared: the "
        f"two files may be of another training or step{scale}; {ADAPTER_CONFIG} names "
        f"another {NAME}"
    ]


def _lacking(
    weights: Weights, config: AdapterConfig, trained: TrainedLayers, base: NamedBase | None
) -> list[str]:
    """The modules that PEFT would adapt, and of which the checkpoint has no adapter."""
    modules = dict.fromkeys((*named_base.modules(weights), *(base.modules if base else ())))
    return targets.unadapted(config, trained, modules)


def _holds_base(weights: Weights) -> bool:
    return any(names.parsed(name).role == names.BASE_LAYER for name in weights.tensors)


def _of_targets(
    config: AdapterConfig, trained: TrainedLayers, lacking: Sequence[str], base_known: bool
) -> list[str]:
    if lacking:
        names = words.some(lacking, words.LONG_LIST)
        statement = f"{names}: targets in {NAME} without an adapter in the checkpoint"
    else:
        unmatched = [] if base_known else targets.unmatched(config, trained)
        if not unmatched:
            return []

        modules = {module.rpartition(".")[2] for module in trained.modules}
        statement = (
            f"{NAME} lists the targets {words.some(unmatched, words.LONG_LIST)}, and the tensors "
            f"adapt only {words.some(sorted(modules), words.LONG_LIST)}"
        )

    return [
        f"{statement}: the file is of another training, or these layers were frozen and "
        "not saved. PEFT initializes them where the model has them, usually without "
        f"effect; {ADAPTER_CONFIG} names another {NAME}"
    ]


def _names(
    lacking: Sequence[str], sources: Mapping[str, str], trained: TrainedLayers
) -> dict[str, str]:
    """The names that PEFT looks for, modelled on those of a module that is there."""
    of_module: dict[str, list[str]] = {}
    for new, old in sources.items():
        parameter = names.parsed(old)
        if (
            names.is_role(parameter.role)
            and not parameter.of_tokens
            and "embedding" not in parameter.role
        ):
            of_module.setdefault(parameter.module, []).append(new)

    first_module = next((module for module in trained.modules if module in of_module), "")
    endings = [new.partition(f".{first_module}.") for new in of_module.get(first_module, ())]

    return {
        f"{head}.{module}.{ending}": _LISTED for module in lacking for head, _, ending in endings
    }
