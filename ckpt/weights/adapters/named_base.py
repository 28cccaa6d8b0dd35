"""The base model of an adapter, as it lies on this disk, and what it tells.

It is where ``--base`` says, or where ``base_model_name_or_path`` of the configuration
does. Its headers are read, and samples of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckpt.weights.adapters import base_model
from ckpt.weights.adapters.base_model import BaseModel, Loaded
from ckpt.weights.reader import table
from ckpt.weights.request import Request
from converters.computing.computed import Computed
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import MERGE
from converters.peft import names
from converters.peft.config import AdapterConfig
from converters.peft.expected_layers import TrainedLayers
from converters.tensors import TensorRef, Weights

_MAX_COMPARED = 256  # tensors that are compared
_NUMBER = LazyPattern(r"\.\d+\.")
_OF_BASE = (names.BASE, names.BASE_LAYER, names.ORIGINAL)


@dataclass(frozen=True, slots=True)
class NamedBase:
    """A base model on this disk, and its weights by the trained model's names."""

    model: BaseModel
    loaded: Loaded

    @property
    def modules(self) -> list[str]:
        """The modules with a matrix or a kernel that a model of this base runs with."""
        name = self.loaded.architecture
        reader = table.reader_of(name) if name else None
        module_names = []
        for module in _matrices(self.loaded.weights.tensors):
            inner_name = f"{module}.weight".removeprefix(self.loaded.inner)
            if reader is None or reader.hub == reader.memory or reader.runs_with(inner_name):
                module_names.append(module)

        return module_names


class NamedBases:
    """The base models of a checkpoint's adapters; each is read once for all.

    ``trained`` are the trained layers of all the adapters.
    """

    def __init__(self, trained: Iterable[TrainedLayers], request: Request):
        modules = (module for layers in trained for module in layers.modules)
        self.adapted_names = [f"{module}.weight" for module in dict.fromkeys(modules)]
        self.request = request
        self.bases: dict[BaseModel, NamedBase | None] = {}

    def of(self, config: AdapterConfig, trained: TrainedLayers) -> NamedBase | None:
        """The base of an adapter; ``None`` if it is not on this disk or unreadable."""
        folder = self.request.base
        model = BaseModel(folder) if folder is not None else base_model.locate(config)
        if model is None or not model.holds_weights or not trained.modules:
            return None

        if model not in self.bases:
            self.bases[model] = self._read(model)
        return self.bases[model]

    def _read(self, model: BaseModel) -> NamedBase | None:
        try:
            return NamedBase(model, base_model.load(model, self.adapted_names, None))
        except (CheckpointError, OSError):
            return None


def modules(weights: Weights) -> list[str]:
    """The modules with a matrix or a kernel in a checkpoint that no adapter touches."""
    untouched = {
        f"{part.module}.{part.rest}": weights.tensors[part.name]
        for part in map(names.parsed, weights.tensors)
        if part.role == names.BASE
    }
    return list(_matrices(untouched))


def _matrices(tensors: Mapping[str, TensorRef]) -> Iterator[str]:
    for name, ref in tensors.items():
        if name.endswith(".weight") and len(ref.shape) > 1:
            yield name.removesuffix(".weight")


def disagreement(base: NamedBase, weights: Weights, config: AdapterConfig) -> str | None:
    """A note where the frozen weights of the checkpoint have other values than the base.

    Layers that were changed by their way of initialization are not compared, since PEFT
    changes them again.
    """
    from ckpt.weights.adapters import base_agreement  # these import numpy
    from converters.peft.merge import changes

    pairs = dict(_pairs(base, weights, changes.alters_base(config) is not None))
    sampled_names = _some_of_each_kind(pairs)
    mismatched = [name for name in sampled_names if not base_agreement.agrees(*pairs[name])]
    if not mismatched:
        return None

    return (
        f"the base model in the checkpoint has other values than {base.model.place}, in "
        f"{len(mismatched):,} of {len(sampled_names):,} tensors that were compared, such "
        f"as {mismatched[0]}: with that one the adapter gives another model than the "
        f"trained one; {MERGE} writes the trained one"
    )


def _some_of_each_kind(all_names: Iterable[str]) -> list[str]:
    """Of names that differ by numbers alone the first, the last and one between."""
    kinds: dict[str, list[str]] = {}
    for name in all_names:
        kinds.setdefault(_NUMBER.sub(".", name), []).append(name)
    samples = (
        name
        for similar_names in kinds.values()
        for name in (
            similar_names[0],
            similar_names[len(similar_names) // 2],
            similar_names[-1],
        )
    )

    return list(dict.fromkeys(samples))[:_MAX_COMPARED]


def _pairs(
    base: NamedBase, weights: Weights, changed: bool
) -> Iterator[tuple[str, tuple[TensorRef, TensorRef]]]:
    """Tensors of the base and the checkpoint's frozen copies, by the model's names."""
    base_tensors = base.loaded.weights.tensors
    for name, copy in weights.tensors.items():
        parameter = names.parsed(name)
        if parameter.role not in _OF_BASE or name in weights.packed or not _frozen(name, weights):
            continue

        source = base_tensors.get(parameter.original)
        if source is None or isinstance(source, Computed) or source.shape != copy.shape:
            continue

        of_adapter = parameter.role == names.BASE_LAYER
        if source.dtype.floating and copy.dtype.floating and not (changed and of_adapter):
            yield parameter.original, (source, copy)


def _frozen(name: str, weights: Weights) -> bool:
    """Whether a tensor is frozen; if the checkpoint does not tell, adapted ones are."""
    if weights.frozen:
        return name in weights.frozen
    parameter = names.parsed(name)
    return not weights.trained and parameter.role == names.BASE_LAYER and parameter.rest == "weight"
