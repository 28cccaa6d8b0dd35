"""From what a stage knows of the parameters to ``Weights`` in the model's own order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from converters.names.rules import Names
from converters.pickles.values import Call
from converters.tensors import TensorRef, Weights
from converters.torch_files import odd_tensors
from converters.torch_files.record_checksums import located
from converters.zero.files import state_files
from converters.zero.files.state_files import State


@dataclass(slots=True)
class Parameters:
    """The facts that a stage knows of a model's parameters by name,
    not yet in the module's order.

    ``masters`` are the trained ones, ``frozen`` the others, ``aliases`` map tied names
    to either. ``buffers`` are the names of buffers, ``copies`` the masters' values once
    more in 16 bits, ``newer`` are later ones. ``excluded`` are frozen names that the
    save left out, and whose values a tied name has. All names are those of the state
    dict; ``names`` says how the parameters themselves are called.
    """

    masters: dict[str, TensorRef] = field(default_factory=dict)
    frozen: dict[str, TensorRef] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    copies: dict[str, TensorRef] = field(default_factory=dict)
    newer: dict[str, TensorRef] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    names: Names = field(default_factory=Names)
    excluded: frozenset[str] = frozenset()


def assemble(model: State, parameters: Parameters, sources: Sequence[State]) -> Weights:
    """Every name of the module, in its order, as a tensor, an alias or absent."""
    module = model.module
    tensors, aliases, absent = _names_of_module(model, parameters)

    # what is in no module: other names of parameters, and those of shared_params
    for name, tensor in (parameters.masters | parameters.frozen).items():
        tensors.setdefault(name, tensor)
    for name, reason in parameters.absent.items():
        absent.setdefault(name, reason)
    for name, owner in parameters.aliases.items():
        if not name.isprintable():
            raise state_files.no_name(model, name)
        aliases.setdefault(name, owner)

    lost_ties = {name: owner for name, owner in aliases.items() if owner not in tensors}
    for name, owner in lost_ties.items():
        absent[name] = f"tied to {owner}, whose values are not stored"
        del aliases[name]

    for name in tensors:
        if name in aliases or name in absent:
            problem = "is tied to another" if name in aliases else "has no values"
            raise model.fail(f"{name} has values of its own, and {problem} at once")

    copies, newer = parameters.copies.values(), parameters.newer.values()
    names = (*tensors, *aliases, *absent)
    frozen = frozenset(parameters.frozen if parameters.masters else parameters.excluded)

    return Weights(
        tensors,
        aliases,
        parameters.buffers & tensors.keys(),
        absent,
        parameters.copies,
        located([*tensors.values(), *copies, *newer], [state.file for state in sources]),
        (*module, *(name for name in names if name not in module)),
        frozen & tensors.keys(),
        trained=frozenset(parameters.masters) & tensors.keys(),
        lost_ties=lost_ties,
        newer=parameters.newer,
    )


def _names_of_module(
    model: State, parameters: Parameters
) -> tuple[dict[str, TensorRef], dict[str, str], dict[str, str]]:
    """The names of the module in its order: tensors, those that are tied to others, and
    those without values, with the reason."""
    tensors: dict[str, TensorRef] = {}
    aliases: dict[str, str] = {}
    absent: dict[str, str] = {}
    values = parameters.masters | parameters.frozen

    for name, value in model.module.items():
        if name in values:
            tensors[name] = values[name]
        elif name in parameters.aliases:
            aliases[name] = parameters.aliases[name]
        elif name in parameters.absent:
            absent[name] = parameters.absent[name]
        elif isinstance(value, TensorRef):
            tensors[name] = value
        elif name.endswith("_extra_state") or not isinstance(value, Call):
            # what nn.Module.get_extra_state returned may be anything
            absent[name] = f"a value of type {state_files.kind(value)}, not a tensor"
        elif name in _trained(model, parameters):
            raise state_files.no_tensor(model, value, f"module[{name!r}]")
        else:  # a buffer or a frozen parameter, without which the rest is what it is
            absent[name] = odd_tensors.reason(value)

    return tensors, aliases, absent


def _trained(model: State, parameters: Parameters) -> set[str]:
    """The names that an optimizer has.

    Where the file does not tell, all but those of buffers.
    """
    module = model.module
    shapes = state_files.shapes(model, "param_shapes")
    if shapes is None:
        return module.keys() - parameters.buffers
    return {parameters.names.of(name, module) for group in shapes for name in group}


def with_bytes(weights: Weights, model: State) -> tuple[Weights, tuple[str, ...]]:
    """The weights with what no writer has a type for as bytes, and a note that says so.

    Such a tensor gets an axis more, for the bytes of an element.
    """
    module = model.module
    untyped = {
        name: value
        for name in weights.absent
        if isinstance(value := module.get(name), odd_tensors.Odd) and value.raw is not None
    }
    if not untyped:
        return weights, ()

    byte_tensors = {name: value.raw for name, value in untyped.items() if value.raw is not None}
    checksums = {}
    for checksum in (
        *weights.checksums,
        *located(byte_tensors.values(), [model.file]),
    ):
        checksums[checksum.extent.path, checksum.extent.offset] = checksum

    types = [f"{name} ({value.kind})" for name, value in list(untyped.items())[:4]]
    remainder = f" and {len(untyped) - 4} more" if len(untyped) > 4 else ""
    note = f"copied as bytes, with an axis for those of an element: {', '.join(types)}{remainder}"

    with_raw = replace(
        weights,
        tensors={**weights.tensors, **byte_tensors},
        absent={name: reason for name, reason in weights.absent.items() if name not in untyped},
        checksums=tuple(checksums[key] for key in sorted(checksums)),
        packed=weights.packed | untyped.keys(),
    )
    return with_raw, (note,)
