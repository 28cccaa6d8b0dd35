"""The param groups of a universal folder: whose parameters they are, and in what order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from converters import words
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.options import LIKE
from converters.torch_files import object_graph
from converters.zero import param_groups, partitioning
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section
from converters.zero.universal import parameter_folders
from converters.zero.universal.parameter_folders import STEP

# shapes by name; the options, and what is kept once, as trees
_INNER = "optimizer_state_dict"
GroupLayout = tuple[dict[str, Shape], Any, Any]


def group_layouts(
    models: Sequence[State], rank: State, tree: Any, like: Checkpoint | None
) -> Iterator[GroupLayout]:
    """Each param group: shapes in the optimizer's order, options, what is kept once."""
    root = Section(rank.path, "", tree)
    options = root.dicts("param_groups")
    inner = Section(rank.path, "optimizer_state_dict", root.optional(_INNER, dict) or {})
    states = inner.optional("state", dict) or {}
    states_by_id = Section(rank.path, "optimizer_state_dict['state']", states)
    shapes = state_files.shapes(models[0], "param_shapes")
    first_ids = list(range(len(options)))

    if like is not None:
        native_tree = object_graph.read_root(like.ranks[0].path)
        native_groups = param_groups.read(like, native_tree)
        layouts = [dict(group.shapes) for group in native_groups]
    elif shapes is None or not isinstance(models[0].root["param_shapes"], list):
        raise CheckpointError(
            f"{models[0].path} records no param_shapes by group, so the order of the "
            "parameters is not known; name a native checkpoint of the same model with "
            f"{LIKE}",
            "incomplete",
        )
    elif stage_of(models, rank) == 3:
        members = _sub_groups(rank, options, states_by_id, len(shapes))
        layouts = [
            {name: shape for index in indices for name, shape in shapes[index].items()}
            for indices in members
        ]
        first_ids = [indices[0] if indices else -1 for indices in members]
    else:
        layouts = _optimizer_order(models[0], shapes)

    if len(layouts) != len(options):
        raise rank.fail(
            f"it has {len(options)} param groups, param_shapes {len(layouts)}; name a "
            f"native checkpoint of the same model with {LIKE}"
        )

    by_group = zip(layouts, options, first_ids, strict=True)
    for group_shapes, group_options, first_id in by_group:
        without_params = {key: value for key, value in group_options.items() if key != "params"}
        if group_shapes:
            yield group_shapes, without_params, states_by_id.state(first_id)


def _sub_groups(
    rank: State, options: Sequence[dict[Any, Any]], states: Section, count: int
) -> list[list[int]]:
    """The sub-groups of each param group of stage 3, which must be at one step."""
    members = [Section(rank.path, "param_groups", group).numbers("params") for group in options]
    if [index for indices in members for index in indices] != list(range(count)):
        text = "; ".join(map(words.numbers, members))
        raise rank.fail(
            f"its param groups hold the sub-groups {text}, expected all {count} in order"
        )

    for indices in members:
        nodes = [states.state(index).get(STEP) for index in indices]
        steps = {parameter_folders.number(node) for node in nodes}
        if len(steps) > 1:
            numbers = ", ".join(sorted(map(str, steps)))
            raise rank.fail(f"the sub-groups {words.numbers(indices)} have unlike steps, {numbers}")

    return members


def _optimizer_order(model: State, shapes: Sequence[dict[str, Shape]]) -> list[dict[str, Shape]]:
    """The groups of stages 1 and 2 as the optimizer was given them.

    ``param_shapes`` has them as they were dealt out under round_robin_gradients.
    """
    if model.setting("zero_optimization", "round_robin_gradients") is not True:
        return list(shapes)

    world_size = world_size_of(model)
    return [
        {
            name: group_shapes[name]
            for name in partitioning.undo_round_robin(list(group_shapes), world_size)
        }
        for group_shapes in shapes
    ]


def stage_of(models: Sequence[State], rank: State) -> int:
    """The stage that the model file is of: 3 for placeholders, else 1 or 2."""
    if models[0].path.name.startswith("zero_pp_rank_"):
        return 3

    # BF16_Optimizer states none, and works as stage 1
    stage = rank.optimizer.get("zero_stage", 1)
    return 1 if stage == 1 else 2


def world_size_of(model: State, key: str = "dp_world_size") -> int:
    """The ranks of the run that saved: those that ZeRO shares the states among."""
    world_size = model.root.get(key)
    if type(world_size) is not int or world_size < 1:
        raise model.fail(f"{key} is {world_size!r}, expected a number of ranks")
    return world_size


def saving_ranks(model: State) -> int:
    """The ranks that had files of their own: under MiCS those of the first shard group."""
    group_size = model.setting("zero_optimization", "mics_shard_size")
    world_size = world_size_of(model)
    return group_size if is_whole_number(group_size, 1) and group_size < world_size else world_size
