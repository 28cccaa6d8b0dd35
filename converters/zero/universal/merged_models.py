"""The model files of several model-parallel ranks, as those of a training without them.

``ds_to_universal.py`` merges the parameters that are trained, and copies the model files
as they are: each has the shards, and the shapes of the shards, of one tensor-parallel
rank of one stage.

    zero/NAME/fp32.pt             whole
    mp_rank_00_model_states.pt    tensor-parallel rank 0 of stage 0: module, param_shapes
    mp_rank_01_...                tensor-parallel rank 1

So what is trained is taken from ``zero``, under the shape that the shards make up, and
the rest (frozen parameters, buffers, tied names) from the model files, put together as
in ``parallel``. Where DeepSpeed has files of frozen parameters and tied names in
``zero``, they are those of rank 0 alone, and are not read. Of a pipeline ``module`` is
empty, and no layer file is copied. Source: DeepSpeed 0.19.8
``checkpoint/ds_to_universal.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters import words
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.model_ranks import one_save
from converters.zero.model_ranks.joined_source import with_module
from converters.zero.naming import storage_views
from converters.zero.naming.assemble import assemble
from converters.zero.parallel import merged_weights, patterns, rules
from converters.zero.parallel.cut_table import CutTable
from converters.zero.parallel.cuts import Cut

TIED = "pipeline_replicated_parameter_patterns"


@dataclass(frozen=True, slots=True)
class MergedModel:
    """One model file for all; the files that its tensors lie in;
    what a user should know.

    ``cuts`` are how its tensors were cut for ``tensor_ranks`` of them.
    """

    model: State
    files: tuple[State, ...]
    notes: tuple[str, ...]
    cuts: Mapping[str, Cut]
    tensor_ranks: int


def read(models: Sequence[State]) -> MergedModel:
    """The model files of all model-parallel ranks, of each the first, as one.

    ``CheckpointError`` where they do not go together.
    """
    one_save.require_same_step(models)
    degree = _tensor_degree(models)
    stages = [models[start : start + degree] for start in range(0, len(models), degree)]
    notes = [f"made from {len(models)} model-parallel ranks"]
    groups: list[dict[str, Shape]] = []
    module: dict[str, object] = {}
    cuts: dict[str, Cut] = {}
    for number, lanes in enumerate(stages):
        stage_groups, stage_module = _merged(lanes, notes, cuts)
        groups = groups or [{} for _ in stage_groups]
        if len(groups) != len(stage_groups):
            raise lanes[0].fail(
                f"param_shapes has {len(stage_groups)} groups, {len(groups)} in the first stage; "
                "the files are of two saves"
            )
        for group, stage_group in zip(groups, stage_groups, strict=True):
            _note_tied(lanes[0], number, group, stage_group, notes)
            group |= {name: shape for name, shape in stage_group.items() if name not in group}
        module |= stage_module

    if not module:
        notes.append(_unknown(models))
    model = with_module(models[0], module, param_shapes=groups, mp_world_size=1)
    return MergedModel(model, tuple(models), tuple(dict.fromkeys(notes)), cuts, degree)


def _unknown(models: Sequence[State]) -> str:
    """A line on what stages keep in layer files, which are not there."""
    buffers = sorted({name for model in models for name in storage_views.buffer_names(model)})
    listed = f" ({words.some(buffers)})" if buffers else ""
    return (
        f"a pipeline's buffers{listed} and frozen parameters, if it has any, lie in layer files, "
        "which ds_to_universal.py does not copy: they are not in it"
    )


def _tensor_degree(models: Sequence[State]) -> int:
    """The tensor-parallel ranks of a stage: by what the file says, else by the names.

    Only stages have an empty ``module``, and no two of them have the same parameters.
    """
    recorded = models[0].root.get("checkpoint_parallel_dimensions")
    degrees = recorded if isinstance(recorded, dict) else {}
    stages, degree = degrees.get("pp_degree"), degrees.get("tp_degree")
    if is_whole_number(stages, 1) and is_whole_number(degree, 1) and stages * degree == len(models):
        return degree
    if models[0].root.get("module") is not None:
        return len(models)

    first_names = _trained(models[0])
    count = sum(_trained(model) == first_names for model in models)
    if len(models) % count:
        raise models[0].fail(f"{len(models)} model files are no stages of {count} ranks each")
    return count


def _trained(model: State) -> set[str]:
    groups = state_files.shapes(model, "param_shapes") or ()
    return {name for group in groups for name in group}


def _merged(
    lanes: Sequence[State], notes: list[str], cuts: dict[str, Cut]
) -> tuple[list[dict[str, Shape]], dict[str, object]]:
    """The shapes of whole parameters by group, and ``module``, of one stage.

    Adds to ``cuts`` how its tensors are cut.
    """
    shapes_by_lane = [_shapes(lane) for lane in lanes]
    if len({len(groups) for groups in shapes_by_lane}) != 1:
        raise lanes[-1].fail(f"param_shapes has other groups than {lanes[0].path.name}")
    if len(lanes) == 1:
        return shapes_by_lane[0], dict(lanes[0].module) if _has_module(lanes[0]) else {}

    table = CutTable.of(lanes, rules.current())
    whole_groups: list[dict[str, Shape]] = []
    for groups in zip(*shapes_by_lane, strict=True):
        names = dict.fromkeys(name for group in groups for name in group)
        layouts = {
            name: table.cut_of(name, [group.get(name) for group in groups]) for name in names
        }
        whole_groups.append(
            {name: layout.shape for name, layout in layouts.items() if layout is not None}
        )
        cuts |= {name: layout for name, layout in layouts.items() if layout is not None}

    module = _module(lanes, table, cuts)
    table.require_known()
    _without_padding(table, whole_groups, module, notes)
    return whole_groups, module


def _shapes(lane: State) -> list[dict[str, Shape]]:
    shapes = state_files.shapes(lane, "param_shapes")
    if shapes is None:
        raise CheckpointError(
            f"{lane.path} records no param_shapes, without which the order of the parameters "
            "is not known; use the checkpoint that this was made from",
            "unsupported",
        )
    return shapes


def _has_module(lane: State) -> bool:
    return lane.root.get("module") is not None


def _module(lanes: Sequence[State], table: CutTable, cuts: dict[str, Cut]) -> dict[str, object]:
    """The whole model's state dict;
    of stage 3 what the first rank has, where that is all.

    Adds to ``cuts`` how its tensors are cut.
    """
    if not _has_module(lanes[0]):
        return {}
    if lanes[0].path.name.startswith("zero_pp_rank_"):
        if any(lane.root.get("frozen_param_shapes") for lane in lanes):
            raise CheckpointError(
                f"{lanes[0].path} has pieces of frozen parameters, which are cut for "
                f"{len(lanes)} tensor-parallel ranks as well; use the checkpoint that this was "
                "made from",
                "unsupported",
            )
        return dict(lanes[0].module)

    weights = []
    for lane in lanes:
        parameters = storage_views.complete(lane, {}, state_files.shapes(lane, "param_shapes"))
        weights.append(assemble(lane, parameters, [lane]))
    whole_weights, own_cuts = merged_weights.merged(weights, table)
    cuts |= own_cuts
    names = [name for name in whole_weights.order if name not in whole_weights.absent]
    return {name: whole_weights.tensors[whole_weights.aliases.get(name, name)] for name in names}


def _without_padding(
    table: CutTable,
    groups: Sequence[dict[str, Shape]],
    module: dict[str, object],
    notes: list[str],
) -> None:
    """Leaves out the rows that pad a vocabulary, as DeepSpeed does in ``zero``."""
    count = table.info.get("original_vocab_size")
    if not is_whole_number(count, 1):
        return

    for group in groups:
        for name, shape in group.items():
            is_padded = bool(shape) and shape[0] > count and table.entry_of(name) is None
            if not is_padded or not patterns.is_vocabulary(table.info, name):
                continue
            group[name] = (count, *shape[1:])
            notes.append(f"{name} is without the rows that pad the vocabulary of {count:,}")
            tensor = module.get(name)  # of stage 3 a placeholder
            if isinstance(tensor, TensorRef) and tensor.shape == shape:
                module[name] = tensor.box((0,) * len(shape), group[name])


def _note_tied(
    model: State,
    number: int,
    group: Mapping[str, Shape],
    stage_group: Mapping[str, Shape],
    notes: list[str],
) -> None:
    """A line on tied modules whose last copy DeepSpeed kept,
    which may not be the model's."""
    info = model.root.get("universal_checkpoint_info")
    listed = patterns.listed(info if isinstance(info, dict) else {}, TIED)
    repeated = [
        name
        for name in group.keys() & stage_group.keys()
        if not any(patterns.begins(pattern, name) for pattern in listed)
    ]
    if repeated:
        notes.append(
            f"{words.some(sorted(repeated))} of a tied module is that of stage {number}, whose "
            "copy ds_to_universal.py kept; the layer files of the checkpoint have the first one"
        )
