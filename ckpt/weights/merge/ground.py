"""The weights that adapters are merged into: the checkpoint's, or another base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt.weights.adapters import base_model, stored_vocabulary
from ckpt.weights.adapters.base_model import BaseModel
from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.merge import base_companions, replication, trained_class
from ckpt.weights.naming import packed
from ckpt.weights.request import DTYPES, Request
from converters import quantized
from converters.errors import CheckpointError
from converters.options import BASE
from converters.peft.config import AdapterConfig
from converters.peft.merge import base_ties
from converters.peft.merge import model as merge
from converters.peft.merge.origins import Base, holds_base
from converters.source import Place, Source
from converters.tensors import DType, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The weights to merge into: the checkpoint's, with those of another base."""

    weights: Weights
    surroundings: Surroundings
    base: Base | None
    notes: tuple[str, ...]
    files: Mapping[Path, str | None] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()  # of the vocabulary that was trained with
    architecture: str | None = None  # of the trained model
    surplus: tuple[str, ...] = ()  # of the base, and unknown to this class


def ground_of(
    source: Source,
    weights: Weights,
    adapters: Mapping[str, AdapterConfig],
    surroundings: Surroundings,
    request: Request,
) -> Ground:
    """The base: of ``--base``, the checkpoint's own, or the one an adapter names."""
    groups = quantized.groups(weights, surroundings.config)
    constants = [name for group in groups for name in group.constants.values()]
    numbers = quantized.without(quantized.marked(weights, surroundings.config), constants)
    sorted_names = merge.sorted_names(numbers, adapters)
    adapted_names = [f"{module}.weight" for module in sorted_names.layers]

    first_config = next(iter(adapters.values()))
    option_model = base_model.chosen(request)
    model = option_model or base_model.locate(first_config)
    surroundings = base_companions.beside(surroundings, model)
    names = frozenset((*sorted_names.plain, *sorted_names.saved))
    architecture = trained_class.architecture(surroundings.config, adapters.values(), names)

    if option_model is None and holds_base(numbers, sorted_names.plain, adapted_names):
        return replace(_own_ground(weights, surroundings, bool(groups)), architecture=architecture)
    if model is None or not model.holds_weights:
        raise CheckpointError(_missing(source.place, first_config), "incomplete")

    notes = _notes_on_base(model, option_model is not None, bool(groups))
    if groups:
        weights, surroundings = numbers, _unquantized(surroundings)
    trained = _TrainedModel(
        weights=weights,
        adapters=adapters,
        names=names,
        adapted_names=adapted_names or [*sorted_names.plain],
        architecture=architecture,
    )
    ground = _ground_elsewhere(
        model, trained, source.place.root, surroundings, DTYPES[request.dtype]
    )
    return replace(ground, notes=(*notes, *ground.notes))


def _notes_on_base(model: BaseModel, by_option: bool, quantized_training: bool) -> list[str]:
    """Which base from elsewhere is merged into, and why."""
    notes = [f"merged into {model.place}"]
    if not by_option:
        notes[0] += ", since the checkpoint has only what was trained"
    if quantized_training:
        notes.append(
            "the training ran on a quantized base, so its outputs differ a little "
            "from those of this model"
        )
    return notes


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrainedModel:
    """The trained model as far as the checkpoint has it.

    ``names`` are those in the checkpoint, as the model itself has them;
    ``adapted_names`` are those that the adapters change. ``architecture`` is the
    model's class, where it is known.
    """

    weights: Weights
    adapters: Mapping[str, AdapterConfig]
    names: frozenset[str]
    adapted_names: Sequence[str]
    architecture: str | None


def _ground_elsewhere(
    model: BaseModel,
    trained: _TrainedModel,
    root: Path,
    surroundings: Surroundings,
    dtype: DType | None,
) -> Ground:
    """The weights of a base from elsewhere, as the trained model has them."""
    adapters = trained.adapters
    alone = len(adapters) == 1
    originals = stored_vocabulary.originals(root, adapters, alone)
    loaded = base_model.load(model, trained.adapted_names, dtype, (*trained.names, *originals))
    fitted = trained_class.fitted(loaded, trained.architecture, trained.names)
    layer_numbers = replication.layers(adapters.values())
    tensors = replication.repeated(fitted.weights, layer_numbers, model.place)
    tensors = base_ties.applied(tensors, base_ties.of_model(trained.weights))
    full = stored_vocabulary.added(trained.weights, root, adapters, tensors, alone)

    return Ground(
        weights=full.weights,
        surroundings=surroundings,
        base=Base(tensors, model.place, loaded.inner, fitted.of_other_class),
        notes=full.notes,
        files={**loaded.files, **dict.fromkeys(full.files)},
        embeddings=full.embeddings,
        architecture=trained.architecture,
        surplus=fitted.surplus,
    )


def _own_ground(weights: Weights, surroundings: Surroundings, codes: bool) -> Ground:
    """The frozen weights of the checkpoint, made numbers where they are codes."""
    if codes:
        weights = quantized.dequantized(weights, surroundings.config, None)
        note = (
            "merged into the quantized base of the checkpoint, dequantized as in the "
            f"training; {BASE('DIR')} takes the full-precision base"
        )
        return Ground(
            weights=weights, surroundings=_unquantized(surroundings), base=None, notes=(note,)
        )

    types = sorted(
        {weights.tensors[name].dtype.value for name in weights.frozen & {*weights.tensors}}
    )
    kinds_of = f" ({', '.join(types)})" if types else ""
    note = f"merged into the checkpoint's own copy of the base{kinds_of}"
    if any(kind in ("BF16", "F16") for kind in types):
        note += f"; {BASE('DIR')} takes the base in its original precision"
    return Ground(weights=weights, surroundings=surroundings, base=None, notes=(note,))


def _unquantized(surroundings: Surroundings) -> Surroundings:
    if surroundings.config is None:
        return surroundings
    return replace(surroundings, config=packed.unquantized(surroundings.config))


def _missing(place: Place, config: AdapterConfig) -> str:
    return (
        f"{place.folder} has only what was trained, and {base_model.absence(config)}; "
        f"name its folder with {BASE('DIR')}"
    )
