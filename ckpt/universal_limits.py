"""What DeepSpeed's load_universal does not restore, or wrongly, whoever wrote the folder.

Seen with DeepSpeed 0.19.8: ``load_hp_checkpoint_state_from_checkpoint_dir`` in
runtime/base_optimizer.py and ``..._stage3`` in runtime/zero/stage3.py; docs/universal.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from converters import muon, zero
from converters.groups import Group
from converters.optimizer_trees import SUB_GROUP
from converters.records import Record

_ADAM = ("exp_avg", "exp_avg_sq")  # all that stage 3 reads


def notes(source: zero.Checkpoint, found: Sequence[Group]) -> Iterator[str]:
    """Those limits that concern a checkpoint; ``found`` are its param groups."""
    weights = source.weights
    if lost := len(weights.frozen | weights.buffers):
        yield (
            f"load_universal restores no frozen parameters and no buffers (here {lost}): the "
            "engine keeps what its model was made with"
        )
    others = sorted({str(key) for group in found for key in group.values} - {"", *_ADAM})
    if others or any(not group.values.keys() >= {*_ADAM} for group in found):
        kept = f"not {', '.join(others)}" if others else "and there is none"
        yield f"load_universal of stage 3 reads exp_avg and exp_avg_sq only, {kept}"
    if any(muon.uses(group.options) for group in found) and muon.whole(source.model):
        yield (
            "load_universal of stages 1 and 2 loads Muon's momentum for the elements of a rank; "
            "where a matrix is split between ranks the first step stops (exceeds dimension size)"
        )
    once = sorted({str(key) for group in found for key in group.constants} - {"step"})
    if once:
        yield f"load_universal restores no {', '.join(once)}"
    options = [group.options or {} for group in found]
    keys = {str(key) for held in options for key in held}
    if unlike := sorted(
        k for k in keys if any(held.get(k) != options[0].get(k) for held in options)
    ):
        yield (
            "load_universal of stage 3 gives every param group the options of the first; "
            f"{', '.join(unlike)}, not the same in all, is left out there: the engine keeps that "
            "of its configuration"
        )
    several = len(found) > 1 or sum(ref.numel for ref in weights.tensors.values()) > SUB_GROUP
    if several and any(isinstance(group.constants.get("step"), Record) for group in found):
        yield (
            "load_universal of stage 3 has all sub-groups count steps in one tensor, which grows "
            "several times a step; ckpt from-universal or ckpt reshard make files that load right"
        )
    if source.model.setting("zero_optimization", "round_robin_gradients"):
        yield (
            "the run had round_robin_gradients: an engine with that loads any universal "
            "checkpoint wrongly; turn it off there"
        )
