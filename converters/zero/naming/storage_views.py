"""Names by storage:
the trained tensors of ``module`` are views into flat 16-bit storages.

    storage of a group   |--- a ---|------ b ------|- c -|pad|      16 bits an element
    fp32 partitions      |--- a ---|------ b ------|- c -|          the same element offsets

True for ZeRO-1 and 2, BF16_Optimizer and the fused FP16_Optimizer of every version
seen, 0.3.16 to 0.19.8. It finds names where ``param_shapes`` does not (before 0.5.4),
and tied names everywhere: they are the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

from converters import words
from converters.names.rules import Names
from converters.tensors import DType, Extent, TensorRef
from converters.zero.files.state_files import Shape, State, no_name
from converters.zero.naming.assemble import Parameters

# elements looked at to tell tensors apart; all are compared on the way
PROBE = 1 << 16


def place(model: State, tensor: TensorRef) -> tuple[Extent, int] | None:
    """The storage of a tensor and the element it begins at; ``None`` if it is empty."""
    storage = model.file.storage(tensor)
    if storage is None:
        return None
    byte_offset = tensor.extents[0].offset - storage.extent.offset
    return storage.extent, byte_offset // tensor.dtype.itemsize


def by_view(model: State, vectors: Sequence[TensorRef]) -> dict[str, TensorRef]:
    """Name to master weight, where each of ``vectors`` is the fp32 vector of a group.

    Storages and groups are matched by size, and by values where sizes leave a choice
    (``name_matching``). ``CheckpointError`` if there is no match, or a choice between
    different values.
    """
    view_groups = [
        (_numel_of(storage, views), views, end)
        for storage, views in views_by_storage(model).items()
        if (end := _covered(views)) is not None
    ]

    vectors = [vector for vector in vectors if vector.numel]
    masters: dict[str, TensorRef] = {}
    for group, index in _match_storages(model, vectors, view_groups).items():
        for name, (offset, tensor) in view_groups[index][1].items():
            master = vectors[group].narrow(offset, tensor.numel)
            masters[name] = master.view(*tensor.shape)

    return masters


def _match_storages(
    model: State,
    vectors: Sequence[TensorRef],
    view_groups: Sequence[tuple[int, Mapping[str, tuple[int, TensorRef]], int]],
) -> Mapping[int, int]:
    """The number of the storage that fits each vector, by size and values.

    ``view_groups`` has, for each storage, its elements, its views, and where they end.
    """
    candidates = [
        {
            index
            for index, (storage_numel, views, end) in enumerate(view_groups)
            if end <= vector.numel <= storage_numel and same(vector, views)
        }
        for vector in vectors
    ]

    def exact_group(group: int) -> bool:
        _, views, _ = view_groups[min(candidates[group])]
        return all(
            exact(vectors[group].narrow(offset, tensor.numel), tensor)
            for offset, tensor in views.values()
        )

    from converters.zero.naming import name_matching

    groups_of_one = [[index] for index in range(len(vectors))]
    try:
        return name_matching.assign(candidates, groups_of_one, exact_group)
    except (name_matching.NoPlaceError, name_matching.AmbiguousError) as error:
        group = error.args[0]
        fitting = (
            "no storage" if isinstance(error, name_matching.NoPlaceError) else "several storages"
        )
        raise model.fail(
            f"group {group} of the fp32 weights ({vectors[group].numel} elements) fits "
            f"{fitting} of module by size and values, so its parameters have no names"
        ) from error


def views_by_storage(model: State) -> dict[Extent, dict[str, tuple[int, TensorRef]]]:
    """The floating-point tensors of ``module``, by their storages.

    Each with the element that it begins at.
    """
    storages: dict[Extent, dict[str, tuple[int, TensorRef]]] = {}
    for name, tensor in model.module.items():
        if not isinstance(tensor, TensorRef) or not tensor.dtype.floating:
            continue
        if position := place(model, tensor):
            storage, offset = position
            storages.setdefault(storage, {})[name] = (offset, tensor)

    return storages


def _numel_of(storage: Extent, views: Mapping[str, tuple[int, TensorRef]]) -> int:
    """The elements that a storage has, of the type that its views have."""
    _, tensor = next(iter(views.values()))
    return storage.length // tensor.dtype.itemsize


def _covered(views: Mapping[str, tuple[int, TensorRef]]) -> int | None:
    """The element where the views end that cover a storage from its beginning.

    ``None`` if they leave a gap or overlap.
    """
    end = 0
    runs = {(offset, tensor.numel) for offset, tensor in views.values()}
    for offset, length in sorted(runs):
        if offset != end:
            return None
        end += length

    return end


def same(vector: TensorRef, views: Mapping[str, tuple[int, TensorRef]]) -> bool:
    """Whether the fp32 vector, rounded, begins each view with the view's values."""
    from converters import cast

    for offset, tensor in views.values():
        count = min(tensor.numel, PROBE)
        if not cast.rounds_to(vector.narrow(offset, count), tensor.narrow(0, count)):
            return False

    return True


def begins(tensor: TensorRef, dtype: DType) -> bytes:
    """A digest of what the tensor begins with, rounded to ``dtype``. Reads it now."""
    from converters import cast

    head = cast.load(tensor.narrow(0, min(tensor.numel, PROBE)))
    return sha256(cast.rounded(head, dtype).tobytes()).digest()


def exact(master: TensorRef, reference: TensorRef) -> bool:
    """Whether the master weights hold nothing beyond their 16-bit copy.

    Reads both now.
    """
    from converters import cast

    for start in range(0, master.numel, PROBE):
        count = min(PROBE, master.numel - start)
        values = cast.load(reference.narrow(start, count))
        widened = cast.rounded(values, master.dtype)
        if widened.tobytes() != cast.load(master.narrow(start, count)).tobytes():
            return False

    return True


def complete(
    model: State,
    masters: dict[str, TensorRef],
    shapes: list[dict[str, Shape]] | None,
    names: Names | None = None,
) -> Parameters:
    """Adds the frozen parameters and the tied names, which only ``module`` tells.

    ``masters`` are by the names of ``module``, and ``names`` says how the parameters
    are called where that is something else; ``shapes`` have the parameters' names.

    A name without a master is tied if its bytes are those of a trained or an earlier
    tensor of the same shape; otherwise it is frozen (buffers are told apart later, by
    their names).
    """
    names = names or Names()
    result = Parameters(masters, buffers=_buffers(model, shapes, names), names=names)
    shared_owners = shared_names(model, names)
    owners: dict[object, str] = {}
    trained: dict[object, str] = {}
    module = {
        name: tensor for name, tensor in model.module.items() if isinstance(tensor, TensorRef)
    }
    # without elements parameters lie anywhere, but a buffer in a storage of its own
    empty_buffers = {_place_key(module[name]): name for name in module if name in result.buffers}

    for name in sorted(module, key=lambda name: name not in masters):
        tensor = module[name]
        owner = _owner(name, tensor, masters, owners, empty_buffers, shared_owners)
        if name in result.buffers:
            continue
        if owner != name:
            masters.pop(name, None)
            result.aliases[name] = owner
        elif name in masters:
            if tensor.shape != masters[name].shape:
                raise model.fail(
                    f"module has {name} as {words.shape(tensor.shape)}, the fp32 weights "
                    f"are {words.shape(masters[name].shape)}"
                )
            result.copies[name] = tensor
            trained.setdefault((tensor.extents, tensor.dtype), name)
        elif tensor.numel and (tensor.extents, tensor.dtype) in trained:
            # the same bytes under another shape
            master = masters[trained[tensor.extents, tensor.dtype]]
            masters[name] = master.view(*tensor.shape)
            result.copies[name] = tensor
        else:
            result.frozen[name] = tensor

    _add_excluded(model, result, shared_owners)
    return result


def _owner(
    name: str,
    tensor: TensorRef,
    masters: Mapping[str, TensorRef],
    owners: dict[object, str],
    empty_buffers: Mapping[object, str],
    shared_owners: Mapping[str, str],
) -> str:
    """The name whose values a tensor has: an earlier one of the same bytes, or its own.

    ``owners`` has the first name of each run of bytes and shape, and gets this one.
    """
    owner = name
    if tensor.numel:
        owner = owners.setdefault((tensor.extents, tensor.shape), name)
    elif name not in masters:
        owner = empty_buffers.get(_place_key(tensor), name)

    if owner == name and tensor.numel and name not in masters:
        # shared_params is the only witness where module was cloned
        shared_master = masters.get(shared_owners.get(name, name))
        if shared_master is not None and shared_master.shape == tensor.shape:
            owner = shared_owners[name]

    return owner


def _add_excluded(model: State, parameters: Parameters, shared_owners: Mapping[str, str]) -> None:
    """Gives frozen values the name that the save left out, if only a tied one is there.

    ``exclude_frozen_parameters`` leaves out the names of ``named_parameters``, which
    has each parameter once: ``lm_head.weight``, tied to an embedding that is left out,
    stays (DeepSpeed 0.19.8 ``_get_non_moe_state_dict``, ``save_checkpoint`` of
    runtime/engine.py).
    """
    owners = {
        name: owner
        for name in parameters.frozen
        if (owner := shared_owners.get(name, name)) not in model.module
        and owner not in parameters.masters
    }

    for name, owner in owners.items():
        if not owner.isprintable():
            raise no_name(model, owner)
        tensor = parameters.frozen[name]
        if parameters.frozen.setdefault(owner, tensor).shape == tensor.shape:
            del parameters.frozen[name]
            parameters.aliases[name] = owner

    for alias, owner in parameters.aliases.items():
        parameters.aliases[alias] = parameters.aliases.get(owner, owner)

    parameters.excluded = frozenset(owners.values())


def _place_key(tensor: TensorRef) -> object:
    return tensor.extents, tensor.shape, tensor.dtype


def shared_names(model: State, names: Names) -> dict[str, str]:
    """The name that each tied name shares the values of, as the state dict has both."""
    shared_params = model.root.get("shared_params")
    pairs = shared_params.items() if isinstance(shared_params, dict) else ()
    module = model.module

    return {
        names.of(name, module): names.of(owner, module)
        for name, owner in pairs
        if isinstance(name, str) and isinstance(owner, str)
    }


def buffer_names(model: State) -> list[str]:
    """The names of buffers that the file records, as the modules have them."""
    recorded_names = model.root.get("buffer_names")
    if not isinstance(recorded_names, list):
        return []
    return [name for name in recorded_names if isinstance(name, str)]


def _buffers(model: State, shapes: list[dict[str, Shape]] | None, names: Names) -> frozenset[str]:
    """The names of buffers.

    Before 0.4.2 only param_shapes, which named frozen ones too, tells.
    """
    if isinstance(model.root.get("buffer_names"), list):
        return frozenset(names.of(name, model.module) for name in buffer_names(model))

    parameter_names = {names.of(name, model.module) for group in shapes or () for name in group}
    if not parameter_names:
        return frozenset()

    module = {
        name: tensor for name, tensor in model.module.items() if isinstance(tensor, TensorRef)
    }
    parameter_extents = {module[name].extents for name in parameter_names if name in module}
    return frozenset(
        name
        for name, tensor in module.items()
        if name not in parameter_names and tensor.extents not in parameter_extents
    )
