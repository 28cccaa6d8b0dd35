"""The topology that state files are made for, and how it lays parameters down."""

from __future__ import annotations

from dataclasses import dataclass, field

from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.zero import muon, partitioning
from converters.zero.native.stages.stage_layers import StageLayers
from converters.zero.param_groups import WEIGHTS, ParamGroup

SUB_GROUP = 1_000_000_000  # the default of zero_optimization.sub_group_size


def require_arguments(
    world_size: object,
    stage: object = None,
    sub_group_size: object = None,
    tp: object = None,
    ep: object = None,
) -> None:
    """``CheckpointError`` for numbers of a caller that no topology of ZeRO has."""
    if not is_whole_number(world_size, 1):
        raise CheckpointError(
            f"world_size is {world_size!r}; expected a number of ranks, 1 or more", "refused"
        )
    if tp is not None and (not is_whole_number(tp, 1) or world_size % tp):
        raise CheckpointError(
            f"tp is {tp!r}; expected a number of tensor-parallel ranks that divides the "
            f"{world_size} ranks in all",
            "refused",
        )
    if ep is not None and not is_whole_number(ep, 1):
        raise CheckpointError(
            f"ep is {ep!r}; expected a number of expert-parallel ranks, 1 or more", "refused"
        )
    if stage is not None and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        raise CheckpointError(
            f"stage is {stage!r}; expected a ZeRO stage, 1, 2 or 3, or 0 for none", "refused"
        )
    if sub_group_size is not None and not is_whole_number(sub_group_size, 1):
        raise CheckpointError(
            f"sub_group_size is {sub_group_size!r}; expected a number of elements, 1 or more",
            "refused",
        )


@dataclass(frozen=True, slots=True)
class TargetTopology:
    """The topology to make: stage (0: without ZeRO), world size,
    and the settings that the layout depends on.

    ``dealt`` is round_robin_gradients and ``aligned`` parameter_alignment, both of
    stages 1 and 2; ``sub_group_size`` is of stage 3. ``itemsize`` is that of the
    weights that are computed with. ``bf16``: as BF16_Optimizer saves stage 1. ``muon``:
    whether the optimizer is one that keeps the momentum of Muon for whole parameters in
    stages 1 and 2. ``zero_init``, of stage 3: whether the engine's model is made under
    ``zero.Init``, where Muon does not sort; ``None``: it is not known.

    ``world_size`` are the ranks that share a partition: with ``tensor_ranks`` of them,
    each has so many. ``expert_ranks`` of them share out the experts, if there are any.
    ``stages`` are those of a pipeline, each on as many ranks; none without one.
    """

    stage: int
    world_size: int
    dealt: bool = False
    aligned: bool = False
    sub_group_size: int = SUB_GROUP
    itemsize: int = 2
    bf16: bool = False
    muon: bool = False
    zero_init: bool | None = None
    tensor_ranks: int = field(default=1, repr=False)  # which would be another identity of others
    expert_ranks: int = field(default=1, repr=False)
    stages: tuple[StageLayers, ...] = field(default=(), repr=False)

    @property
    def rank_count(self) -> int:
        """All ranks of the training."""
        return self.world_size * self.tensor_ranks * max(len(self.stages), 1)

    def __post_init__(self) -> None:
        positive = self.world_size >= 1 and self.sub_group_size >= 1
        if self.stage not in (0, 1, 2, 3) or not positive:
            raise ValueError(
                f"stage {self.stage} of {self.world_size} ranks with sub-groups of "
                f"{self.sub_group_size} elements is not a topology of ZeRO"
            )
        if self.bf16 and (self.stage != 1 or self.dealt or self.aligned):
            raise ValueError(
                "BF16_Optimizer has stage 1 only, and neither round_robin_gradients nor "
                "parameter_alignment"
            )

    def order(self, group: ParamGroup) -> list[str]:
        """The names of a group's parameters in the order in which they are laid down."""
        names = list(group.shapes)
        if self.dealt and self.stage < 3:
            return partitioning.round_robin_order(names, self.world_size)
        return names

    def paddings(self, group: ParamGroup) -> list[int]:
        """The elements left empty behind each parameter, in that order."""
        numels = [group.values[WEIGHTS][name].numel for name in self.order(group)]
        if not self.aligned or self.stage == 3:
            return [0] * len(numels)
        return partitioning.padding_for(numels, self.itemsize)

    def whole(self, group: ParamGroup) -> str | None:
        """The state that ranks keep for whole parameters, if there is one (``muon``)."""
        keeps_whole = self.muon and self.stage < 3 and not self.bf16
        return muon.MOMENTUM if keeps_whole and muon.is_muon_group(group.options) else None
