"""A model with its adapters merged in: every tensor of it located, or computed.

    frozen tensor of the base, or trained one  --a change for each adapter, in order-->  tensor

The names are those of the user's model. What an adapter does to a layer is decided in
``changes``, where the values come from in ``origins``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from converters import options
from converters.computing.computed import Computed, copies
from converters.errors import CheckpointError
from converters.peft import names
from converters.peft.config import AdapterConfig
from converters.peft.merge import changes
from converters.peft.merge.cells import Rounded
from converters.peft.merge.lora_changes import CHAT
from converters.peft.merge.origins import Base, Origins
from converters.peft.merge.sites import Parts, Site, known_sides
from converters.peft.names import BASE, BASE_LAYER, ORIGINAL, SAVED, TOKENS, ParsedName
from converters.tensors import DType, TensorRef, Weights

WHOLE = "ln_tuning_layers"  # a trained copy of a whole layer, as modules_to_save are


@dataclass(frozen=True, slots=True)
class Merge:
    """The merged model.

    ``renamed`` maps each name to the one in the checkpoint, where it is another.
    ``untied`` maps each name that is tied in the checkpoint and has values of its own
    now to the name it was tied to. ``dropped`` are names of the base that the trained
    model has not, ``changed`` those of tensors that an adapter changes, ``outside``
    frozen ones that a base saved from within the model lacks, and that are taken from
    the checkpoint.
    """

    weights: Weights
    renamed: Mapping[str, str]
    untied: Mapping[str, str]
    dropped: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()

    @property
    def compared(self) -> bool:
        """Whether anything that is read has a copy that it is compared with."""
        tensors = self.weights.tensors.values()
        return bool(self.weights.copies) or any(copies(tensor) for tensor in tensors)


@dataclass(slots=True)
class Sorted:
    """The parameters of a PEFT model by what they are for;
    names are those of the user's model.

    ``plain`` maps each to its name in the checkpoint, ``saved`` those that a trained
    copy replaces. ``layers`` has the adapters' tensors by module and adapter, ``shared``
    those of no layer.
    """

    plain: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    layers: dict[str, dict[str, Parts]] = field(default_factory=dict)
    shared: dict[str, Parts] = field(default_factory=dict)


def merged(
    weights: Weights,
    adapters: Mapping[str, AdapterConfig],
    base: Base | None = None,
    dtype: DType | None = None,
    checkpoint_names: Iterable[str] = (),
    transposed: Callable[[str], bool | None] = lambda module: None,
) -> Merge:
    """The model with ``adapters`` merged in, in their order.

    Every floating-point weight is taken in ``dtype`` before it is changed (``None``: its
    own), as PEFT does with a base model loaded in it. ``checkpoint_names`` are names of
    the checkpoint whose values are taken whatever the base has. ``transposed`` says
    whether a module's weight is (in, out), by its class, ``None`` where nobody knows.
    ``CheckpointError`` for what cannot be merged, and for a base that does not fit.
    """
    parameters = sorted_names(weights, adapters)
    adapted = frozenset(f"{module}.weight" for module in parameters.layers)
    has_own_base = not adapted.isdisjoint(parameters.plain)
    for config in adapters.values():
        changes.require_mergeable(config)
        if base is not None:
            changes.require_fitting_base(config, base.place, has_own_base)

    origins = Origins(
        weights,
        parameters.plain,
        parameters.saved,
        base,
        adapted,
        any(config.bias != "none" for config in adapters.values()),
        frozenset(weights.aliases.get(name, name) for name in checkpoint_names),
    )

    tensors = origins.tensors()
    place = None if base is None else base.place
    results = _Results(dict(tensors), tensors, dtype, place)

    sides = known_sides(parameters.layers, tensors)
    for module, parts in parameters.layers.items():
        for adapter, config in adapters.items():
            if adapter in parts:
                flipped = transposed(module)
                if flipped is None:
                    flipped = sides.get(module.rpartition(".")[2], config.fan_in_fan_out)

                shared = parameters.shared.get(adapter, {})
                results.change(module, parts[adapter], shared, config, flipped)

    if dtype is None:
        results.keep_types(origins)

    return _merge(origins, results)


def sorted_names(weights: Weights, adapters: Iterable[str]) -> Sorted:
    """Every name of the checkpoint by what it is for,
    as far as these adapters use it."""
    result, chosen = Sorted(), list(adapters)
    every = dict.fromkeys((*weights.order, *weights.tensors, *weights.aliases))
    for name in every:
        owner = weights.aliases.get(name, name)
        part = names.parsed(name)
        if owner not in weights.tensors or (part.adapter or chosen[0]) not in chosen:
            continue

        if part.role in (SAVED, WHOLE):
            module = f"{part.module}.{part.rest}" if part.rest else part.module
            result.saved.setdefault(module, name)
        elif part.role == BASE and part.rest in CHAT:
            layer = result.layers.setdefault(part.module, {}).setdefault(chosen[0], {})
            layer[part.rest, ""] = weights.tensors[owner]
        elif part.role in (BASE, BASE_LAYER, ORIGINAL):
            result.plain.setdefault(part.original, name)
        elif part.adapter is not None:
            _place(result, part, weights.tensors[owner])

    return result


def _place(parameters: Sorted, part: ParsedName, tensor: TensorRef) -> None:
    """Puts an adapter's tensor to its layer, or to what all layers share."""
    adapter = part.adapter or ""
    layers = parameters.shared
    if part.module:
        layers = parameters.layers.setdefault(part.module, {})

    layers.setdefault(adapter, {})[part.role, part.rest] = tensor


@dataclass(slots=True)
class _Results:
    """The tensors as they become: ``tensors`` now, ``before`` any adapter.

    ``place`` is where the base is that is not the checkpoint's, in words.
    """

    tensors: dict[str, TensorRef]
    before: Mapping[str, TensorRef]
    dtype: DType | None
    place: str | None
    changed: dict[str, None] = field(default_factory=dict)
    computed_by_inputs: dict[tuple[object, ...], Computed] = field(default_factory=dict)

    def change(
        self,
        module: str,
        parts: Parts,
        shared: Parts,
        config: AdapterConfig,
        flipped: bool,
    ) -> None:
        """Changes the tensors of a layer by an adapter's parts in it."""
        layer = {
            last: self.tensors[f"{module}.{last}"]
            for last in ("weight", "bias")
            if f"{module}.{last}" in self.tensors
        }
        if "weight" not in layer:
            raise self._no_weight(f"{module}.weight")

        for last, tensor in layer.items():
            if not tensor.dtype.floating:
                raise CheckpointError(
                    f"{module}.{last} is of {tensor.dtype.value}: codes of a quantized "
                    "model, which nothing can be added to; name the full-precision base "
                    f"model with {options.BASE}",
                    "refused",
                )

        if len({role == TOKENS for role, _ in parts}) > 1:
            raise CheckpointError(
                f"{module} has trained rows and another adapter as well, which is not merged here",
                "unsupported",
            )

        site = Site(module, layer, self.before[f"{module}.weight"], self.dtype, flipped)
        for last, change in changes.of_layer(site, parts, shared, config).items():
            name = f"{module}.{last}"
            computed = change.computed()
            key = (computed.recipe, *map(id, computed.inputs))

            # tied layers get the same tensor again
            self.tensors[name] = self.computed_by_inputs.setdefault(key, computed)
            self.changed[name] = None

    def _no_weight(self, name: str) -> CheckpointError:
        if self.place is None:
            where = f"which is not in the checkpoint; name the base model with {options.BASE}"
        else:
            where = (
                f"which is neither in the checkpoint nor in {self.place}: it is another "
                f"model; name the base that was trained on with {options.BASE}"
            )
        return CheckpointError(f"the adapter changes {name}, {where}", "incomplete")

    def keep_types(self, origins: Origins) -> None:
        """Rounds trained fp32 tensors to the model's own 16 bits."""
        model_dtype = origins.main_dtype(self.before)
        if model_dtype.itemsize != 2:
            return

        rounded: dict[int, Computed] = {}
        for name, tensor in self.tensors.items():
            if tensor.dtype is DType.F32 and origins.is_trained(name):
                computed = Rounded(tensor, model_dtype).computed()
                self.tensors[name] = rounded.setdefault(id(tensor), computed)


def _merge(origins: Origins, results: _Results) -> Merge:
    """The merged weights: proofs, tied names,
    roles and order under the model's names."""
    weights = origins.weights
    tensors, aliases, untied = _ties(origins, results.tensors)
    proven = {name: _with_proofs(tensor, origins) for name, tensor in tensors.items()}
    sources = origins.sources
    buffers, frozen = (
        frozenset(name for name in tensors if sources.get(name) in members)
        for members in (weights.buffers, weights.frozen)
    )
    packed = (name for name in tensors if sources.get(name) in weights.packed)
    codes = frozenset(name for name in packed if not origins.is_of_base(name))
    located = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, Computed)}

    merged_weights = Weights(
        proven,
        aliases,
        absent=_absent(weights, tensors.keys() | aliases.keys()),
        copies={
            name: copy
            for name, tensor in located.items()
            if (copy := origins.copy_of(tensor)) is not None
        },
        checksums=(*weights.checksums, *origins.base_checksums(results.before)),
        order=tuple(results.tensors),
        packed=codes,
        buffers=buffers,
        frozen=frozen,
    )

    return Merge(
        merged_weights,
        {
            name: source
            for name, source in sources.items()
            if source != name and name in results.tensors
        },
        untied,
        dropped=origins.dropped(),
        changed=tuple(results.changed),
        outside=origins.outside(),
    )


def _absent(weights: Weights, known_names: Container[str]) -> dict[str, str]:
    """The model's names that have no values, but ``known_names``, with the reasons."""
    absent = {
        names.parsed(name).original: reason
        for name, reason in weights.absent.items()
        if names.parsed(name).role in (BASE, BASE_LAYER)
    }
    return {name: reason for name, reason in absent.items() if name not in known_names}


def _ties(
    origins: Origins, results: Mapping[str, TensorRef]
) -> tuple[dict[str, TensorRef], dict[str, str], dict[str, str]]:
    """The tensors to write, the names that are tied to them,
    and those that no longer are."""
    tied = {name: owner for name in results if (owner := origins.tied_to(name)) is not None}
    tensors = {name: tensor for name, tensor in results.items() if name not in tied}
    owners = {id(tensor): name for name, tensor in tensors.items()}
    aliases: dict[str, str] = {}
    untied: dict[str, str] = {}

    for name, owner in tied.items():
        tensor = results[name]
        if id(tensor) in owners:
            aliases[name] = owners[id(tensor)]
            continue
        if owner in results:
            untied[name] = owner
        owners[id(tensor)] = name
        tensors[name] = tensor

    return tensors, aliases, untied


def _with_proofs(tensor: TensorRef, origins: Origins) -> TensorRef:
    """A computed tensor with the copies of all that it is computed of."""
    if not isinstance(tensor, Computed):
        return tensor

    proofs = tuple(
        (source, copy)
        for source in _leaves(tensor)
        if (copy := origins.copy_of(source)) is not None
    )

    return replace(tensor, proofs=proofs)


def _leaves(tensor: TensorRef) -> Iterable[TensorRef]:
    """The tensors in files that a tensor is made of, each once."""
    if not isinstance(tensor, Computed):
        return [tensor]
    leaves = [leaf for source in tensor.inputs for leaf in _leaves(source)]
    return {id(leaf): leaf for leaf in leaves}.values()
