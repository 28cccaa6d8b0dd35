"""The limits of DeepSpeed's load_universal: what it does not restore, or wrongly,
whoever wrote the folder.

Seen with DeepSpeed 0.19.8: ``load_hp_checkpoint_state_from_checkpoint_dir`` in
runtime/base_optimizer.py and ``..._stage3`` in runtime/zero/stage3.py;
docs/universal.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from converters.pickles.values import Call
from converters.zero import checkpoint, muon
from converters.zero.native.target import SUB_GROUP
from converters.zero.param_groups import ParamGroup

_OF_EXPERTS = {"moe", "name"}  # which engines know of their own groups
_ADAM = ("exp_avg", "exp_avg_sq")  # all that stage 3 reads


def notes(source: checkpoint.Checkpoint, groups: Sequence[ParamGroup]) -> Iterator[str]:
    """The limits that concern a checkpoint; ``groups`` are its param groups."""
    if untrained_count := len(source.weights.frozen | source.weights.buffers):
        yield (
            "load_universal restores neither frozen parameters nor buffers (here "
            f"{untrained_count}): the engine keeps what its model was created with"
        )

    yield from _notes_on_states(source, groups)
    yield from _notes_on_options(groups)

    if _counts_steps_together(source, groups):
        yield (
            "load_universal of stage 3 shares one step counter between all sub-groups, "
            "which advances several times a step; ckpt from-universal or ckpt reshard "
            "make files that load right"
        )
    if source.model.setting("zero_optimization", "round_robin_gradients"):
        yield (
            "the run had round_robin_gradients: an engine with that loads any universal "
            "checkpoint wrongly; turn it off there"
        )


def _notes_on_states(source: checkpoint.Checkpoint, groups: Sequence[ParamGroup]) -> Iterator[str]:
    """Which states of the optimizer are not read."""
    states = {str(key) for group in groups for key in group.values} - {""}
    other_states = sorted(states - {*_ADAM})
    if other_states or any(not group.values.keys() >= {*_ADAM} for group in groups):
        exception = "and there is none"
        if other_states:
            exception = f"not {', '.join(other_states)}"
        yield f"load_universal of stage 3 reads exp_avg and exp_avg_sq only, {exception}"

    if any(muon.is_muon_group(group.options) for group in groups) and muon.keeps_whole_momentum(
        source.model
    ):
        yield (
            "load_universal of stages 1 and 2 loads Muon's momentum for the elements "
            "of a rank; where a matrix is split between ranks the first step stops "
            "(exceeds dimension size)"
        )

    constants = {str(key) for group in groups for key in group.constants} - {"step"}
    if constants:
        yield f"load_universal does not restore {', '.join(sorted(constants))}"


def _notes_on_options(groups: Sequence[ParamGroup]) -> Iterator[str]:
    """Which options of the param groups are lost, since all get those of the first."""
    options = [group.options or {} for group in groups]
    keys = {str(key) for group_options in options for key in group_options} - _OF_EXPERTS
    differing = sorted(
        key
        for key in keys
        if any(group_options.get(key) != options[0].get(key) for group_options in options)
    )
    if differing:
        yield (
            "load_universal of stage 3 gives every param group the options of the "
            f"first; {', '.join(differing)}, not the same in all, is left out there: "
            "the engine keeps that of its configuration"
        )


def _counts_steps_together(source: checkpoint.Checkpoint, groups: Sequence[ParamGroup]) -> bool:
    """Whether several sub-groups of stage 3 would count their steps in one tensor."""
    numel = sum(tensor.numel for tensor in source.weights.tensors.values())
    steps = [group.constants.get("step") for group in groups]
    several_sub_groups = len(groups) > 1 or numel > SUB_GROUP
    return several_sub_groups and any(isinstance(step, Call) for step in steps)
