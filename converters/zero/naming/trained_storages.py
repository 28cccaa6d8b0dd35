"""Trained parameters by the storage that they lie in, where ``module`` has other
names for them.

Under stages 1 and 2 the trained tensors of ``module`` are views into one 16-bit storage
a group, at the elements where the fp32 partitions have them. So what lies there is
trained, whatever the state dict calls it (``names.rules``), and its master weights are
the same elements of the partitions:

    parameters   |--- a ---|------ b ------|- c -|pad|    names and places by param_shapes
    storage      |--- x ---|-- y --|-- z --|- c -|pad|    names and places by the views of module

Here ``x`` is ``a`` under another name, and ``b`` was cut in two.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from converters.names import rules
from converters.names.rules import Names
from converters.tensors import Extent, TensorRef
from converters.words import some
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.naming import cloned_parameters, group_storages, storage_views
from converters.zero.naming.group_storages import FlatGroup, numel_of

STRIDED = "its elements are trained, but lie in another order than those of its parameter"


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """Master weights by the names of the state dict, and what became of other names.

    ``copies`` are 16-bit copies of those that the state dict does not have as they are.
    """

    masters: Mapping[str, TensorRef]
    absent: Mapping[str, str]
    names: Names
    notes: tuple[str, ...] = ()
    copies: Mapping[str, TensorRef] = field(default_factory=dict)


def trained(model: State, groups: Sequence[FlatGroup]) -> TrainedWeights:
    """The master weights under the names that ``module`` has for them.

    Parameters that it has no name for keep their own.
    """
    views_by_group = group_storages.homes(model, groups)
    masters: dict[str, TensorRef] = {}
    absent: dict[str, str] = {}
    state_names: dict[str, str] = {}
    pieces: list[str] = []
    unplaced: dict[str, tuple[FlatGroup, int, Shape]] = {}

    for group, views in zip(groups, views_by_group, strict=True):
        inside = {
            name: (offset, view)
            for name, (offset, view) in views.items()
            if offset + view.numel <= group.end
        }
        names_by_place, strided = _by_place(inside)
        absent |= dict.fromkeys(strided, STRIDED)

        for name, (offset, shape) in group.places.items():
            tied_names = names_by_place.pop((offset, shape), [])
            if name in tied_names:
                masters[name] = group.master(offset, inside[name][1])
            elif tied_names:
                nearest = _nearest(name, tied_names)
                state_names[name] = nearest
                masters[nearest] = group.master(offset, inside[nearest][1])
            elif group_storages.covers(inside, offset, numel_of(shape)):
                pieces.append(name)
            else:
                unplaced[name] = (group, offset, shape)

        # what is left are pieces of parameters, or several joined
        for (offset, _), tied_names in names_by_place.items():
            first_name = tied_names[0]
            masters[first_name] = group.master(offset, inside[first_name][1])

    naming = _with_rule(model, state_names, tuple(pieces), unplaced, masters)
    naming, notes, copies = _match_copies(model, naming, unplaced, masters, absent)
    _add_unplaced(model, naming, unplaced, masters, absent)

    return TrainedWeights(masters, absent, naming, notes, copies)


def _by_place(
    views: Mapping[str, tuple[int, TensorRef]],
) -> tuple[dict[tuple[int, Shape], list[str]], list[str]]:
    """The names of views by element and shape, and the names of strided ones."""
    names_by_place: dict[tuple[int, Shape], list[str]] = {}
    strided: list[str] = []
    for name, (offset, view) in views.items():
        if len(view.extents) == 1:
            names_by_place.setdefault((offset, view.shape), []).append(name)
        else:
            strided.append(name)

    return names_by_place, strided


def _add_unplaced(
    model: State,
    naming: Names,
    unplaced: Mapping[str, tuple[FlatGroup, int, Shape]],
    masters: dict[str, TensorRef],
    absent: Mapping[str, str],
) -> None:
    """Adds the master weights of parameters that ``module`` has no view of.

    ``CheckpointError`` if their names belong to other values already.
    """
    for name, (group, offset, shape) in unplaced.items():
        final_name = naming.of(name, model.module)
        if final_name in masters or final_name in absent:
            raise model.fail(
                f"{name} is not at element {offset} of its group in module, as "
                "param_shapes says; the optimizer files are of another save"
            )

        masters[final_name] = group.flat.narrow(offset, numel_of(shape)).view(*shape)


def _match_copies(
    model: State,
    naming: Names,
    unplaced: dict[str, tuple[FlatGroup, int, Shape]],
    masters: dict[str, TensorRef],
    absent: Mapping[str, str],
) -> tuple[Names, tuple[str, ...], dict[str, TensorRef]]:
    """Takes out of ``unplaced`` what the state dict has as copies under other names.

    Gives the names with those of the copies, notes on what was joined and on what stays
    unknown, and the copies of parameters that were joined.
    """
    module = model.module
    final_names = {name: naming.of(name, module) for name in unplaced}
    missing_names = [name for name in unplaced if final_names[name] not in module]
    if not missing_names:
        return naming, (), {}

    known_names = (*masters, *absent, *final_names.values())
    unclaimed_tensors = cloned_parameters.unexplained(model, known_names)
    if not unclaimed_tensors:
        return naming, (), {}

    vectors = {}
    for name in missing_names:
        group, offset, shape = unplaced[name]
        vectors[name] = group.flat.narrow(offset, numel_of(shape))

    copies_by_parameter = cloned_parameters.copies_by_parameter(vectors, unclaimed_tensors)
    naming = _with_copies(naming, copies_by_parameter)
    for name, copies in copies_by_parameter.items():
        masters.update(copies)
        del unplaced[name]
        unclaimed_tensors = _without(unclaimed_tensors, copies)

    missing_names = [name for name in missing_names if name in unplaced]
    parts_by_name = cloned_parameters.joined(
        {name: vectors[name] for name in missing_names}, unclaimed_tensors
    )
    copies = _add_joined(parts_by_name, vectors, unclaimed_tensors, unplaced, masters)
    unclaimed_tensors = _without(unclaimed_tensors, parts_by_name)

    notes = (_note_on_joined(parts_by_name),) if parts_by_name else ()
    missing_names = [name for name in missing_names if name not in copies]
    if not missing_names or not unclaimed_tensors:
        return naming, notes, copies

    return naming, (*notes, _note_on_unmatched(missing_names, unclaimed_tensors)), copies


def _with_copies(
    naming: Names, copies_by_parameter: Mapping[str, Mapping[str, TensorRef]]
) -> Names:
    """The names with those of copies: one name a parameter, or several pieces of it."""
    for name, copies in copies_by_parameter.items():
        if len(copies) == 1:
            naming = replace(naming, state={**naming.state, name: next(iter(copies))})
        else:
            naming = replace(naming, pieces=(*naming.pieces, name))

    return naming


def _without(tensors: Mapping[str, TensorRef], names: Container[str]) -> dict[str, TensorRef]:
    """The tensors but those of these names."""
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _add_joined(
    parts_by_name: Mapping[str, Sequence[str]],
    vectors: Mapping[str, TensorRef],
    unclaimed_tensors: Mapping[str, TensorRef],
    unplaced: Mapping[str, tuple[FlatGroup, int, Shape]],
    masters: dict[str, TensorRef],
) -> dict[str, TensorRef]:
    """Adds the master weights of joined tensors; gives the copies of their parts."""
    copies: dict[str, TensorRef] = {}
    for name, parts in parts_by_name.items():
        joined_tensor = unclaimed_tensors[name]
        masters[name] = TensorRef.concat(vectors[part] for part in parts).view(*joined_tensor.shape)

        offset = 0
        for part in parts:
            numel, shape = vectors[part].numel, unplaced[part][2]
            copies[part] = joined_tensor.narrow(offset, numel).view(*shape)
            offset += numel

    return copies


def _note_on_unmatched(missing_names: Iterable[str], unclaimed_tensors: Iterable[str]) -> str:
    return (
        f"the state dict lacks {some(missing_names)}, written here in fp32, and has "
        f"{some(unclaimed_tensors)}, which no parameter's values are: a hook of the state dict "
        "may have made the latter of the former; the latter are exact to 16 bits only"
    )


def _note_on_joined(parts_by_name: Mapping[str, Sequence[str]]) -> str:
    name, parts = next(iter(parts_by_name.items()))
    remainder = ""
    if len(parts_by_name) > 1:
        remainder = f" (and made {len(parts_by_name) - 1:,} more so)"
    return (
        f"a hook of the state dict joined {some(parts)} into {name}{remainder}; the "
        "fp32 weights of all these names are known"
    )


def holding(model: State, names: Iterable[str]) -> set[Extent]:
    """The storages that tensors of ``module`` lie in."""
    tensors = [model.module.get(name) for name in names]
    positions = [
        storage_views.place(model, tensor) for tensor in tensors if isinstance(tensor, TensorRef)
    ]
    return {position[0] for position in positions if position}


def _nearest(name: str, candidates: Iterable[str]) -> str:
    """The candidate whose name ends most like another."""
    return max(candidates, key=lambda candidate: _shared_ending(name, candidate))


def _shared_ending(name: str, other_name: str) -> int:
    """The number of last pieces that two names have in common."""
    pieces, other_pieces = name.split("."), other_name.split(".")
    pairs = zip(reversed(pieces), reversed(other_pieces), strict=False)
    for count, (piece, other_piece) in enumerate(pairs):
        if piece != other_piece:
            return count

    return len(name)


def _with_rule(
    model: State,
    state_names: Mapping[str, str],
    pieces: tuple[str, ...],
    unplaced: Mapping[str, tuple[FlatGroup, int, Shape]],
    masters: Mapping[str, TensorRef],
) -> Names:
    """The names with a rule: that of those with places, else one for the others."""
    module = model.module
    rule = rules.rule(
        list(state_names),
        set(state_names.values()),
        lambda name, state_name: state_names[name] == state_name,
    )

    if rule is None and unplaced:
        unclaimed_tensors = module.keys() - masters.keys() - unplaced.keys()

        def fits(name: str, candidate: str) -> bool:
            group, offset, shape = unplaced[name]
            tensor = module[candidate]
            if not isinstance(tensor, TensorRef) or tensor.shape != shape:
                return False
            master = group.flat.narrow(offset, tensor.numel)
            return storage_views.same(master, {candidate: (0, tensor)})

        missing_names = [name for name in unplaced if name not in module]
        rule = rules.rule(missing_names, unclaimed_tensors, fits)

    other_names = [*unplaced, *storage_views.buffer_names(model)]
    for shapes in state_files.shapes(model, "frozen_param_shapes") or ():
        other_names += shapes
    other_names = [name for name in other_names if name not in module]

    return Names(state_names, rule, pieces).extended(other_names, module)
