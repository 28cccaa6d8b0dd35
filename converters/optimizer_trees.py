"""What an optimizer file holds of the param groups, for any stage and world size.

The keys and classes are those of ``state_dict`` in DeepSpeed 0.19.8
``runtime/zero/stage_1_and_2.py`` and ``stage3.py``; the cuts are in ``layout``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from converters import layout, muon, trees
from converters.errors import CheckpointError
from converters.groups import WEIGHTS, Group
from converters.records import Global, Record
from converters.tensors import TensorRef
from converters.zero import Checkpoint

Tree = dict[str, Any]
SUB_GROUP = 1_000_000_000  # the default of zero_optimization.sub_group_size
SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow", "zero_stage")
_ADDRESS = Global("deepspeed.utils.tensor_fragment", "fragment_address")
_SCALER = Global("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
_STAGE = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")


@dataclass(frozen=True, slots=True)
class Target:
    """What is made: a stage and a world size, and the settings that the layout depends on.

    ``dealt`` is round_robin_gradients and ``aligned`` parameter_alignment, both of stages 1 and 2;
    ``sub_group_size`` is of stage 3. ``itemsize`` is that of the weights that are computed with.
    ``bf16``: as BF16_Optimizer saves stage 1. ``muon``: whether the optimizer is one that keeps the
    momentum of Muon for whole parameters in stages 1 and 2. ``zero_init``, of stage 3: whether the
    engine's model is made under ``zero.Init``, where Muon does not sort; ``None``: it is not known.
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

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3) or self.world_size < 1 or self.sub_group_size < 1:
            raise ValueError(f"no topology: {self}")
        if self.bf16 and (self.stage != 1 or self.dealt or self.aligned):
            raise ValueError(f"not what BF16_Optimizer has: {self}")

    def order(self, group: Group) -> list[str]:
        """The names of a group's parameters in the order in which they are laid down."""
        names = list(group.shapes)
        return layout.dealt(names, self.world_size) if self.dealt and self.stage < 3 else names

    def paddings(self, group: Group) -> list[int]:
        """The elements left empty behind each parameter, in that order."""
        numels = [group.values[WEIGHTS][name].numel for name in self.order(group)]
        if not self.aligned or self.stage == 3:
            return [0] * len(numels)
        return layout.padding_for(numels, self.itemsize)

    def whole(self, group: Group) -> str | None:
        """The state that ranks keep for whole parameters, if there is one: see ``muon``."""
        whole = self.muon and self.stage < 3 and not self.bf16 and muon.uses(group.options)
        return muon.MOMENTUM if whole else None


def as_given(groups: Sequence[Group], checkpoint: Checkpoint, target: Target) -> list[Group]:
    """The groups with their parameters in the order in which the target's optimizer will have them.

    That is the one they have, but for Muon, which sorts its own where it sees their shapes.
    ``CheckpointError`` if it cannot be known.
    """
    return [_as_given(group, checkpoint, target) for group in groups]


def _as_given(group: Group, checkpoint: Checkpoint, target: Target) -> Group:
    if not muon.uses(group.options):
        return group
    if (checkpoint.stage == 3) == (target.stage == 3):
        return group
    names = muon.ordered(group.shapes)
    if target.stage < 3 and muon.deepspeeds(checkpoint.model):
        return replace(group, shapes={name: group.shapes[name] for name in names})
    inside = [name for name in checkpoint.weights.tensors if name in group.shapes]
    known = muon.deepspeeds(checkpoint.model)
    if known and target.zero_init is not None:
        names = inside if target.zero_init else names
        return replace(group, shapes={name: group.shapes[name] for name in names})
    if names != inside or names != list(group.shapes):
        say = "say which it will be with --zero-init or --no-zero-init"
        raise CheckpointError(
            f"{checkpoint.place.folder}: Muon sorts its parameters by shape, but under stage 3 "
            "only if the model is not made under zero.Init: their order in the other stage is not "
            "known, and DeepSpeed does not check it; "
            f"{say if known else 'keep to stage 3, or to stages 1 and 2'}",
            "unsupported",
        )
    return group


def scaled(held: Mapping[Any, Any]) -> dict[Any, Any]:
    """An ``optimizer_state_dict`` that says what BF16_Optimizer does not: no scale, and no stage.

    As the other optimizers say it of bf16 (``CreateLossScaler``, runtime/fp16/loss_scaler.py).
    """
    scaler = Record(_SCALER, (), {"cur_scale": 1.0, "dynamic": False}, new=True)
    said = dict(zip(SCALING, (scaler, False, False, Record(_STAGE, (1,))), strict=True))
    return dict(held) if "zero_stage" in held else {**said, **held}


def stage_as(held: Any, target: Target) -> Any:
    """The ``zero_stage`` of the target, as the number or the enum that ``held`` is."""
    return Record(held.of, (target.stage,)) if isinstance(held, Record) else target.stage


def trees_of(groups: Sequence[Group], target: Target) -> Iterator[Tree]:
    """For each rank, what an optimizer file has under the keys that the layout decides."""
    return _stage3(groups, target) if target.stage == 3 else _stage12(groups, target)


def _stage12(groups: Sequence[Group], target: Target) -> Iterator[Tree]:
    world = target.world_size
    paddings = [target.paddings(group) for group in groups]
    totals = [
        sum(ref.numel for ref in group.values[WEIGHTS].values()) + sum(inner)
        for group, inner in zip(groups, paddings, strict=True)
    ]
    leans = [layout.lean12(total, world) for total in totals]
    runs = [layout.partition12(total, world) for total in totals]
    cut = [
        {
            key: muon.cut({name: held[name] for name in target.order(group)}, world, run, inner)
            if key == target.whole(group)
            else layout.cut12([held[name] for name in target.order(group)], world, inner)
            for key, held in group.values.items()
        }
        for group, inner, run in zip(groups, paddings, runs, strict=True)
    ]
    for rank in range(world):
        lean = [counts[rank] for counts in leans]
        mine = [{key: vectors[rank] for key, vectors in held.items()} for held in cut]
        masters = runs if target.bf16 else lean
        padded = [run - count for run, count in zip(runs, lean, strict=True)]
        if target.bf16:  # the last rank has that of the group
            ends = zip(runs, totals, strict=True)
            padded = [(run * world - total) * (rank == world - 1) for run, total in ends]
        yield {
            "base_optimizer_state": _base_state(groups, target, mine, lean, runs),
            "single_partition_of_fp32_groups": [
                trees.tensor(trees.storage(vectors[WEIGHTS]), (count,), grad=True)
                for vectors, count in zip(mine, masters, strict=True)
            ],
            "group_paddings": padded,
            **({} if target.bf16 else {"param_alignment_paddings": paddings}),
            "partition_count": [world] * len(groups),
            "param_slice_mappings": [
                _fragments(group, target, inner, rank * run, run)
                for group, inner, run in zip(groups, paddings, runs, strict=True)
            ],
        }


def _base_state(
    groups: Sequence[Group],
    target: Target,
    mine: Sequence[Mapping[str, TensorRef]],
    lean: Sequence[int],
    runs: Sequence[int],
) -> Any:
    """A rank's state: with the padding and the param groups or, elastic, without either."""
    if any(group.options is None for group in groups):
        return [_state(*held) for held in zip(groups, mine, lean, strict=True)]
    wholes = [target.whole(group) for group in groups]
    held = zip(groups, mine, runs, wholes, strict=True)
    state = {index: _state(*of) for index, of in enumerate(held)}
    options = [{**(group.options or {}), "params": [i]} for i, group in enumerate(groups)]
    return {"state": {i: held for i, held in state.items() if held}, "param_groups": options}


def _state(
    group: Group, vectors: Mapping[str, TensorRef], length: int, whole: str | None = None
) -> Tree:
    """A group's state: new tensors of ``length`` elements, and the constants once more.

    That kept for ``whole`` parameters has a length of its own, and there is none for padding alone.
    """
    made: Tree = {}
    for key in group.keys:
        if key not in vectors:
            made[key] = trees.copied(group.constants[key])
        elif key != whole:
            made[key] = trees.tensor(trees.storage(vectors[key]), (length,))
        elif vectors[key].numel:
            made[key] = trees.tensor(trees.storage(vectors[key]), vectors[key].shape)
    return made


def _fragments(group: Group, target: Target, inner: Sequence[int], start: int, run: int) -> Record:
    """Which elements of each parameter lie where in a rank's run (``param_slice_mappings``).

    Unlike DeepSpeed's own they are right under round_robin_gradients, too.
    """
    places, at = {}, 0
    for name, padding in zip(target.order(group), inner, strict=True):
        numel = group.values[WEIGHTS][name].numel
        first, last = max(at, start), min(at + numel, start + run)
        if first < last:
            places[name] = {"numel": last - first, "start": first - start}
        at += numel + padding
    return trees.ordered(
        (name, Record(_ADDRESS, (), dict(places[name]), new=True))
        for name in group.shapes
        if name in places
    )


def _stage3(groups: Sequence[Group], target: Target) -> Iterator[Tree]:
    world, size = target.world_size, target.sub_group_size
    cut = [layout.sub_groups(group.shapes, world, size) for group in groups]
    for rank in range(world):
        state: dict[int, Tree] = {}
        flats: list[Record] = []
        options = []
        for group, named in zip(groups, cut, strict=True):
            indices = range(len(flats), len(flats) + len(named))
            options.append({**(group.options or {}), "params": list(indices)})
            for index, names in zip(indices, named, strict=True):
                vectors = {
                    key: TensorRef.concat(layout.cut3(held[name], rank, world) for name in names)
                    for key, held in group.values.items()
                }
                weights = vectors[WEIGHTS]
                if held := _state(group, vectors, weights.numel):
                    state[index] = held
                flats.append(trees.tensor(trees.storage(weights), weights.shape, grad=True))
        yield {
            "partition_count": world,
            "optimizer_state_dict": {"state": state, "param_groups": options},
            "fp32_flat_groups": flats,
        }
