"""The placeholders of stage 3, and what they tell: names, ties, and what is in no file.

``module`` of stage 3 has an empty tensor for each parameter. Those of tied names are
views of one storage, though an empty one; which parameter a placeholder stands for only
its name says.
"""

from __future__ import annotations

from collections.abc import Sequence

from converters.names import rules
from converters.names.rules import Names
from converters.tensors import TensorRef
from converters.zero.files.state_files import State
from converters.zero.naming import storage_views
from converters.zero.naming.assemble import Parameters

FROZEN = "frozen, and not saved under stage 3 before DeepSpeed 0.9.1"
OTHERWISE = "its values, if they are saved, are under the name of a parameter"
UNTRAINED = "without elements, in no param group, or left out by exclude_frozen_parameters"


def names_of(model: State, known_names: Sequence[str]) -> Names:
    """The names in the state dict of the parameters whose names ``module`` has not.

    Its placeholders have neither values nor shapes, so only one rule for all of
    them can tell.
    """
    module = model.module
    missing_names = [name for name in known_names if name not in module]
    buffer_names = storage_views.buffer_names(model)
    missing_buffers = [name for name in buffer_names if name not in module]
    if not missing_names and not missing_buffers:
        return Names()

    other_names = module.keys() - {*known_names, *buffer_names}
    placeholders = {
        name
        for name in other_names
        if isinstance(value := module[name], TensorRef) and value.shape in ((0,), (1,))
    }

    # the rule of the parameters, if they have other names, holds for buffers too
    if missing_names:
        rule = rules.rule(missing_names, placeholders)
        return Names({}, rule).extended([*missing_names, *missing_buffers], module)

    rule = rules.rule(missing_buffers, other_names - placeholders)
    return Names({}, rule).extended(missing_buffers, module)


def notes_on_layout(names: Names) -> list[str]:
    """A line where a hook gave parameters other names, and may have done more."""
    renamed = {
        name: state_name
        for name, state_name in names.state.items()
        if _without_wrappers(name) != _without_wrappers(state_name)
    }
    if not renamed:
        return []

    name, state_name = next(iter(renamed.items()))
    return [
        f"the state dict has other names for {len(renamed)} of the model's "
        f"({state_name} for {name}), as a hook makes them; ZeRO-3 does not record "
        "whether the hook changed their layout too (a transposed weight), so they have "
        "the layout of the parameters"
    ]


def _without_wrappers(name: str) -> list[str]:
    return [piece for piece in name.split(".") if piece not in rules.WRAPPERS]


def add_tied(model: State, parameters: Parameters) -> None:
    """The tied names: those whose placeholders are views of one storage.

    That tells in every version and on every rank; ``shared_params`` (rank 0,
    0.9.2 and later) only where placeholders are told apart. Names with values of
    their own are not tied.
    """
    own_names = (
        parameters.masters.keys()
        | parameters.frozen.keys()
        | parameters.absent.keys()
        | parameters.buffers
    )

    names_by_placeholder: dict[object, list[str]] = {}
    for name, value in model.module.items():
        if isinstance(value, TensorRef):
            names_by_placeholder.setdefault((value.extents, value.shape), []).append(name)

    for names in names_by_placeholder.values():
        owners = [name for name in names if name in own_names]
        if len(owners) == 1:
            parameters.aliases |= {name: owners[0] for name in names if name != owners[0]}

    for name, owner in storage_views.shared_names(model, parameters.names).items():
        if name not in own_names:
            parameters.aliases[name] = owner


def add_absent(model: State, parameters: Parameters) -> None:
    """The names of ``module`` whose placeholder is all there is."""
    version = model.version
    before_0_6 = version is None or version.startswith(("0.3.", "0.4.", "0.5."))
    placeholder_shapes = ((0,), (1,)) if before_0_6 else ((0,),)
    known_names = (
        parameters.masters.keys()
        | parameters.frozen.keys()
        | parameters.aliases.keys()
        | parameters.absent.keys()
        | parameters.buffers
    )
    unsaved_names = [
        name
        for name, value in model.module.items()
        if name not in known_names
        and isinstance(value, TensorRef)
        and value.shape in placeholder_shapes
    ]

    renamed = [name for name in parameters.masters if name not in model.module]
    if unsaved_names and renamed:
        parameters.absent |= dict.fromkeys(unsaved_names, OTHERWISE)
        parameters.notes.append(
            "the state dict has names that are not a parameter's "
            f"({_shortened(unsaved_names)}; {len(unsaved_names)} in all), and lacks "
            f"those of others ({_shortened(renamed)}; {len(renamed)}); no one rule "
            "turns these into those, so the weights are under the parameters' own names"
        )
        return

    before_0_9_1 = "frozen_param_fragments" not in model.root  # which 0.9.1 brought
    reason = FROZEN if before_0_9_1 else UNTRAINED
    parameters.absent |= dict.fromkeys(unsaved_names, reason)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
