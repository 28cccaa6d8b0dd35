"""How a training cuts up its state: what its engine says, or its configuration before.

Sources of what is more than ZeRO: DeepSpeed 0.19.8 ``runtime/engine.py``
(``mp_world_size``), ``runtime/pipe/topology.py``, ``moe/experts.py`` and
``module_inject/auto_ep_layer.py``, which give the parameters of experts a
``group_name``; ``runtime/tensor_parallel/config.py``,
``module_inject/auto_ep_config.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ckpt.engine.view import EngineView, internals
from ckpt.rewrite import reshard_command
from ckpt.runs.ancestry import Partitioning
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.words import counted
from converters.zero.merging.saved_degrees import NONE, Degrees
from converters.zero.native.stages.stage_layers import StageLayers
from converters.zero.native.target import SUB_GROUP, TargetTopology

_CUTS = "universal_checkpoint_info"  # of the model (checkpoint/constants.py)
_EXPERT_GROUP = "ep_size_"  # then the number of ranks that the experts are dealt out to


@dataclass(frozen=True, slots=True)
class Topology:
    """The ZeRO stage of a training,
    and how many ranks it has; ``degrees``: of which kinds."""

    stage: int
    world_size: int
    degrees: Degrees = NONE

    def __str__(self) -> str:
        """As words, such as "4 ranks (2 tensor-parallel) with ZeRO stage 2"."""
        return f"{counted(self.world_size, 'rank')}{self.degrees} with ZeRO stage {self.stage}"

    def fits(self, partitioning: Partitioning) -> bool:
        """Whether DeepSpeed can load a checkpoint,
        as far as its manifest or record tells."""
        saved_topology = Topology(partitioning.stage or 0, partitioning.world_size or 0)
        return saved_topology.loads_as(Topology(self.stage, self.world_size))

    def loads_as(self, target: Topology) -> bool:
        """Whether what was saved here loads there: without ZeRO, on any number of ranks."""
        is_same_zero = (self.stage, self.world_size) == (target.stage, target.world_size)
        without_zero = self.stage == target.stage == 0
        return (is_same_zero or without_zero) and self.degrees.go_with(target.degrees)

    @property
    def loads_parts(self) -> bool:
        """Whether an engine goes on from the files of its own node alone.

        DeepSpeed 0.19.8 wants the model files of all model-parallel ranks in one folder
        (``runtime/state_dict_factory.py``, ``check_ckpt_list``), and below stage 3 the
        first rank alone writes that of experts (``runtime/engine.py``,
        ``_save_moe_checkpoint``).
        """
        is_cut = self.degrees.tensor_ranks * self.degrees.stages > 1
        return not is_cut and (self.stage == 3 or not self.degrees.expert_ranks)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a training cuts up its state.

    ``settings`` are what the layout of stage 3 depends on, by the options of
    ``reshard.prepare``: sub_group_size (elements) and, for Muon, zero_init. Muon sorts
    parameters by shape where it sees their shapes, not under ``zero.Init``. ``cuts`` is
    what an engine of AutoTP says of how it cuts parameters; ``None`` where there is no
    engine yet. ``pipeline`` are the layers of each stage of an engine of a pipeline, as
    ``reshard.plan`` takes them.
    """

    topology: Topology
    settings: Mapping[str, Any]
    cuts: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    pipeline: str | None = None

    @property
    def target(self) -> TargetTopology | None:
        """What native files of FSDP are made for; ``None`` for an engine without ZeRO, or
        with more than data parallelism, for which none are made."""
        if not self.topology.stage or self.topology.degrees != NONE:
            return None
        sub_group_size = self.settings.get("sub_group_size", SUB_GROUP)
        return TargetTopology(
            self.topology.stage, self.topology.world_size, sub_group_size=sub_group_size
        )

    @classmethod
    def of_engine(cls, engine: EngineView, world: int) -> Layout:
        """The layout of a DeepSpeed engine on ``world`` ranks."""
        stage = int(engine.zero_optimization_stage())
        topology = Topology(stage, world, degrees_of(engine))
        cuts = getattr(engine.module, _CUTS, None)
        settings = _stage3(engine) if topology.stage == 3 else {}
        own_cuts = cuts if isinstance(cuts, dict) else None
        return cls(topology, settings, own_cuts, _stage_layers(engine.module))

    @classmethod
    def of_config(
        cls, config: Mapping[str, Any], world: int, zero_init: bool = True
    ) -> Layout | None:
        """The layout of the engine that DeepSpeed will make of a configuration.

        ``zero_init``: whether the model is made under ``zero.Init``. ``None`` if the
        stage is not said yet ("auto").
        """
        zero = config.get("zero_optimization") or {}
        stage = zero.get("stage", 0)
        if not isinstance(stage, int):
            return None

        topology = Topology(stage, world, _configured_degrees(config))
        if topology.stage != 3:
            return cls(topology, {})

        sub_group_size = zero.get("sub_group_size", SUB_GROUP)
        if not isinstance(sub_group_size, (int, float)):  # "auto"
            sub_group_size = SUB_GROUP
        settings: dict[str, Any] = {"sub_group_size": int(sub_group_size)}
        if str((config.get("optimizer") or {}).get("type", "")).lower() == "muon":
            settings["zero_init"] = zero_init
        return cls(topology, settings)

    def options(self, source_topology: Topology, *, is_pipeline: bool) -> dict[str, Any]:
        """The settings that matter to what is resharded from ``source_topology``.

        ``is_pipeline``: whether that is of a pipeline, of one stage or of several.
        """
        settings = {
            name: value
            for name, value in self.settings.items()
            if name != "zero_init" or source_topology.stage != 3
        }
        current = self.topology.degrees
        if current.tensor_ranks > 1:
            settings["tp"] = current.tensor_ranks
        if source_topology.degrees.expert_ranks and len(current.expert_ranks or ()) == 1:
            (settings["ep"],) = current.expert_ranks or ()
        if is_pipeline and self.pipeline:
            settings["pp"] = self.pipeline
        return settings


def degrees_of(engine: EngineView) -> Degrees:
    """The degrees of DeepSpeed's engine, beside ZeRO."""
    grid = getattr(engine, "grid", None)
    stages = int(grid.get_pipe_parallel_world_size()) if grid is not None else 1
    names = {
        str(getattr(parameter, "group_name", ""))
        for parameter in engine.module.parameters()
        if getattr(parameter, "allreduce", True) is False
    }
    sizes = {
        int(name.removeprefix(_EXPERT_GROUP)) for name in names if name.startswith(_EXPERT_GROUP)
    }

    # of a pipeline those of all stages
    model_ranks = int(getattr(engine, "mp_world_size", 1))
    return Degrees(max(model_ranks // stages, 1), stages, tuple(sorted(sizes)))


def _stage_layers(module: Any) -> str | None:
    """The layers of each stage of a ``PipelineModule``, and the tied modules in it."""
    if not hasattr(module, "_layer_specs"):
        return None

    specs, bounds = module._layer_specs, [int(bound) for bound in module.partitions()]
    stages = []
    for first, end in pairwise(bounds):
        keys = dict.fromkeys(spec.key for spec in specs[first:end] if hasattr(spec, "key"))
        stages.append(str(StageLayers(first, end, tuple(keys))))
    return ",".join(stages)


def _configured_degrees(config: Mapping[str, Any]) -> Degrees:
    """The degrees of the engine that DeepSpeed will make of a configuration.

    Only of AutoTP and AutoEP: those of pipelines and of DeepSpeed-MoE are the model's.
    """
    tensor_ranks = _size(config.get("tensor_parallel"), "autotp_size")
    experts = config.get("expert_parallel")
    if not isinstance(experts, Mapping) or not experts.get("enabled"):
        return Degrees(tensor_ranks, expert_ranks=None)
    return Degrees(tensor_ranks, expert_ranks=(_size(experts, "autoep_size"),))


def _size(section: Any, key: str) -> int:
    """A number of ranks in a section, 1 where there is none."""
    value = section.get(key) if isinstance(section, Mapping) else None
    return value if is_whole_number(value, 1) else 1


def _stage3(engine: EngineView) -> dict[str, Any]:
    """What the layout of a stage 3 engine depends on."""
    optimizer = engine.optimizer
    settings = {"sub_group_size": int(internals(engine).zero_sub_group_size())}
    if not getattr(optimizer, "use_muon", False):
        return settings

    # Muon sorts by shape where it sees shapes, so the order tells whether it did.
    in_model = enumerate(engine.module.parameters())
    positions = {id(parameter): position for position, parameter in in_model}
    groups: dict[int, list[int]] = {}
    for index, parameters in enumerate(optimizer.fp16_groups):
        order = groups.setdefault(optimizer.sub_group_to_group_id[index], [])
        order += [positions[id(parameter)] for parameter in parameters]

    return {
        **settings,
        "zero_init": all(order == sorted(order) for order in groups.values()),
    }


def require_cut(
    engine: EngineView,
    saved: Any,
    current: Any,
    path: str | os.PathLike[str],
) -> None:
    """``CheckpointError`` if stage 3 has cut the same parameters into other sub-groups.

    ``saved`` and ``current`` are the shapes by name of each; ``path`` is a file of the
    checkpoint.
    """
    cuts = [_parameters_by_sub_group(saved), _parameters_by_sub_group(current)]
    if cuts[0] == cuts[1]:
        return

    folder, size = Path(path).parent.parent, int(internals(engine).zero_sub_group_size())
    world_size = dist.get_world_size()
    output = folder.with_name(f"{folder.name}-w{world_size}")
    settings = {"sub_group_size": size}
    command = reshard_command.command(folder, world_size, 3, output, settings)
    raise CheckpointError(
        f"{path}: its {sum(cuts[0])} parameters are in {len(cuts[0])} sub-groups, "
        f"those of this training in {len(cuts[1])} (zero_optimization.sub_group_size "
        f"{size}); set that to what it was, or run: {command}",
        "unsupported",
    )


def _parameters_by_sub_group(sub_groups: Any) -> list[int]:
    """How many parameters with elements each sub-group has; those without any left out."""
    counts = (sum(0 not in shape for shape in shapes.values()) for shapes in sub_groups)
    return [count for count in counts if count]
