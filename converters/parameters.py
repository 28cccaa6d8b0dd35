"""From what a stage knows of the parameters to ``Weights`` in the model's own order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converters import states
from converters.records import Record
from converters.states import State
from converters.tensors import Checksum, Extent, Runs, TensorRef, Weights
from converters.torchzip import TorchFile


@dataclass(slots=True)
class Parameters:
    """What a stage knows of a model's parameters by name, before the module's own order is laid on.

    ``masters`` are the trained ones, ``frozen`` the others, ``aliases`` map tied names to either.
    ``buffers`` are the names of buffers, ``copies`` the masters' values once more in 16 bits.
    """

    masters: dict[str, TensorRef] = field(default_factory=dict)
    frozen: dict[str, TensorRef] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    copies: dict[str, TensorRef] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)


def assemble(model: State, parameters: Parameters, sources: Sequence[State]) -> Weights:
    """Every name of the module, in its order, as a tensor, an alias or absent."""
    buffers = parameters.buffers
    tensors: dict[str, TensorRef] = {}
    aliases: dict[str, str] = {}
    absent: dict[str, str] = {}
    values = parameters.masters | parameters.frozen
    module = model.module
    for name, value in module.items():
        if name in values:
            tensors[name] = values[name]
        elif name in parameters.aliases:
            aliases[name] = parameters.aliases[name]
        elif name in parameters.absent:
            absent[name] = parameters.absent[name]
        elif name in buffers or isinstance(value, TensorRef):
            tensors[name] = states.tensor(model, value, f"module[{name!r}]")
        elif isinstance(value, Record) and not name.endswith("_extra_state"):
            raise states.no_tensor(model, value, f"module[{name!r}]")
        else:  # what nn.Module.get_extra_state returned may be anything
            absent[name] = f"no tensor but {states.kind(value)}"
    for name, ref in values.items():
        tensors.setdefault(name, ref)
    for name, why in parameters.absent.items():
        absent.setdefault(name, why)
    for name, owner in parameters.aliases.items():  # those of shared_params are in no module
        if not name.isprintable():
            raise states.no_name(model, name)
        aliases.setdefault(name, owner)
    unknown = [name for name in aliases if aliases[name] not in tensors]
    for name in unknown:
        absent[name] = f"tied to {aliases.pop(name)}, whose values are not stored"
    buffers = frozenset(name for name in buffers if name in tensors)
    refs = [*tensors.values(), *parameters.copies.values()]
    checksums = located(refs, [state.file for state in sources])
    order = (*module, *(n for n in (*tensors, *aliases, *absent) if n not in module))
    frozen = frozenset(parameters.frozen if parameters.masters else ())
    return Weights(
        tensors,
        aliases,
        buffers,
        absent,
        parameters.copies,
        checksums,
        order,
        frozen & tensors.keys(),
    )


def located(refs: Iterable[TensorRef], found: Iterable[TorchFile]) -> tuple[Checksum, ...]:
    """The records of the files that the tensors lie in, sorted; runs of raw files have no CRC32."""
    known = {file.path: file.checksums for file in found}
    used: dict[tuple[Path, int], Checksum] = {}
    for extent in (extent for ref in refs for extent in _places(ref) if extent.length):
        records = known.get(extent.path)
        if records:
            at = bisect_right(records, extent.offset, key=lambda c: c.extent.offset) - 1
            used[extent.path, records[at].extent.offset] = records[at]
        else:
            used[extent.path, extent.offset] = Checksum(extent, None)
    return tuple(used[key] for key in sorted(used))


def _places(ref: TensorRef) -> Sequence[Extent]:
    """An extent in each record that the tensor lies in; the runs of a view lie in one."""
    return (ref.extents[0],) if isinstance(ref.extents, Runs) else ref.extents
