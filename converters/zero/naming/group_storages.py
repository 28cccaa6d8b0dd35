"""The storage of ``module`` that a group lies in, found by size, layout and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from converters.tensors import Extent, TensorRef
from converters.zero.files.state_files import Shape, State
from converters.zero.naming import storage_views

# name to first element in the storage, and the view
Views = Mapping[str, tuple[int, TensorRef]]


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """A param group: its fp32 vector, and the places of the parameters in it.

    A place is the first element, and the shape.
    """

    flat: TensorRef
    places: Mapping[str, tuple[int, Shape]]

    @property
    def end(self) -> int:
        """The element behind the last parameter."""
        ends = [offset + numel_of(shape) for offset, shape in self.places.values()]
        return max(ends, default=0)

    def masters(self) -> dict[str, TensorRef]:
        """The master weights under the parameters' own names."""
        return {
            name: self.flat.narrow(offset, numel_of(shape)).view(*shape)
            for name, (offset, shape) in self.places.items()
        }

    def master(self, offset: int, view: TensorRef) -> TensorRef:
        """The master weights of the view that begins at element ``offset``."""
        return self.flat.narrow(offset, view.numel).view(*view.shape)


def homes(model: State, groups: Sequence[FlatGroup]) -> list[Views]:
    """For each group the views of its storage; none where none is surely its own."""
    storages = storage_views.views_by_storage(model)
    choices = [
        {storage for storage, views in storages.items() if _fits(group, storage, views)}
        for group in groups
    ]

    for narrower in (_same_layout, _same_values):
        for group, group_choices in zip(groups, choices, strict=True):
            if len(group_choices) > 1:
                narrowed = {
                    storage for storage in group_choices if narrower(group, storages[storage])
                }
                group_choices.intersection_update(narrowed or group_choices)

        _give_sole_choices(choices)

    return [
        storages[group_choices.pop()] if len(group_choices) == 1 else {}
        for group_choices in choices
    ]


def _fits(group: FlatGroup, storage: Extent, views: Views) -> bool:
    """Whether a storage is long enough, and has a view where a parameter is, or all."""
    itemsize = next(iter(views.values()))[1].dtype.itemsize
    if not group.end or storage.length // itemsize < group.end:
        return False

    places = set(group.places.values())
    if any((offset, view.shape) in places for offset, view in views.values()):
        return True
    return covers(views, 0, group.end)


def covers(views: Views, offset: int, numel: int) -> bool:
    """Whether views cover ``numel`` elements from ``offset`` on without a gap."""
    end = offset + numel
    view_runs = {(start, view.numel) for start, view in views.values() if len(view.extents) == 1}
    for start, length in sorted(view_runs):
        if start <= offset < start + length:
            offset = start + length

    return numel > 0 and offset >= end


def _same_layout(group: FlatGroup, views: Views) -> bool:
    places = {(offset, shape) for offset, shape in group.places.values() if numel_of(shape)}
    return places == {(offset, view.shape) for offset, view in views.values()}


def _same_values(group: FlatGroup, views: Views) -> bool:
    """Whether the fp32 vector rounds to the views, as far as that is looked at.

    Reads both.
    """
    inside = {
        name: (offset, view)
        for name, (offset, view) in views.items()
        if offset + view.numel <= group.flat.numel
    }
    return storage_views.same(group.flat, inside)


def _give_sole_choices(choices: list[set[Extent]]) -> None:
    """Takes a storage that only one group can have from the others."""
    while True:
        sole_choices = [next(iter(storages)) for storages in choices if len(storages) == 1]
        contested = [
            storages
            for storages in choices
            if len(storages) > 1 and not storages.isdisjoint(sole_choices)
        ]
        if not contested:
            break
        for storages in contested:
            storages.difference_update(sole_choices)

    for storages in choices:
        if len(storages) == 1 and sole_choices.count(next(iter(storages))) > 1:
            storages.clear()


def numel_of(shape: Shape) -> int:
    """The elements of a shape."""
    return prod(shape)
