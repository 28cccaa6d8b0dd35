"""To DeepSpeed's universal format and back: what is written and where. ``job`` does it.

out/checkpoint-500_universal/      for any world size and stage, with "load_universal": true
  latest_universal                   the tag
  global_step500_universal/          zero/NAME/*.pt, and both kinds of model file
  everything else                    copied
out/checkpoint-500-z2-w3/          native files again
  latest, global_step500/...
"""

from __future__ import annotations

import os
from pathlib import Path

from ckpt.deprecation import renamed
from ckpt.rewrite import heads, job, reshard, targets, universal_limits
from ckpt.rewrite.job import ARGUMENTS, Rewriting
from ckpt.rewrite.job import execute as execute
from ckpt.rewrite.targets import Settings
from ckpt.runs.foreign import step_records
from ckpt.weights.arguments import naming_arguments
from converters.errors import CheckpointError
from converters.options import WORLD_SIZE
from converters.storage import open_files
from converters.storage.store import default_output, output_path
from converters.storage.stores import source_path
from converters.storage.url_path import absolute
from converters.words import counted
from converters.zero import checkpoint as zero
from converters.zero.files import several_models
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import reader as merging
from converters.zero.native import reshard as native
from converters.zero.native.target import require_arguments
from converters.zero.parallel import rules
from converters.zero.universal import native_source, reader
from converters.zero.universal import plan as planning
from converters.zero.universal.reader import SUFFIX, Universal


@naming_arguments(*ARGUMENTS)
@open_files.once()
def plan_to(
    checkpoint: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    tag: str | None = None,
    tp_rules: str | os.PathLike[str] | None = None,
) -> Rewriting:
    """Plans the universal folder of a checkpoint of ZeRO 1, 2 or 3.

    Reads pickles, no tensors. ``tp_rules`` as ``reshard.plan`` has it. Raises
    ``CheckpointError`` for what is damaged, or has no partitions.
    """
    path = source_path(checkpoint)
    several_models.find(path, tag)  # refuses a choice between models
    with rules.using(tp_rules):
        source = merging.read(path, tag)
    file_plan = planning.to_universal(source)
    groups = planning.groups_of(source)
    world_size = merged.original(source).world_size
    home = job.home_of(source)

    return Rewriting(
        source=source,
        path=path,
        target=None,
        plan=file_plan,
        output=absolute(output_path(output or default_output(home, home.name + SUFFIX))),
        tag=planning.universal_tag(source),
        companions=tuple(job.companions_for(home, world_size, world_size)),
        notes=(
            *source.notes,
            *step_records.contradictions(source),
            *universal_limits.notes(source, groups),
        ),
    )


@naming_arguments(*ARGUMENTS)
@open_files.once()
def plan_from(
    folder: str | os.PathLike[str],
    world_size: int | None = None,
    *,
    stage: int | None = None,
    output: str | os.PathLike[str] | None = None,
    tag: str | None = None,
    like: str | os.PathLike[str] | None = None,
    sub_group_size: int | None = None,
    zero_init: bool | None = None,
    tp: int | None = None,
    ep: int | None = None,
    tp_rules: str | os.PathLike[str] | None = None,
) -> Rewriting:
    """Plans native files of a universal folder for ``world_size`` ranks and a stage.

    The stage defaults to that of the run that saved. ``like`` is a native checkpoint of
    the same model, for a folder that does not tell the order of the parameters. Reads
    pickles, and the first 65,536 elements of each parameter. ``zero_init``, ``tp``,
    ``ep`` and ``tp_rules`` as ``reshard.plan`` has them. Raises ``CheckpointError``,
    without ``world_size`` one that says how many ranks saved.
    """
    require_arguments(tp or 1 if world_size is None else world_size, stage, sub_group_size, tp, ep)
    path = source_path(folder)
    with rules.using(tp_rules):
        universal = reader.read(path, tag, zero.read(like) if like else None, parallel=True)
        if world_size is None:
            raise _without_world_size(path, universal)
        source = native_source.checkpoint_of(universal)
        own_stage = universal.stage if stage is None else stage
        settings = Settings(own_stage, sub_group_size, zero_init, tp, ep)
        target, tensor_ranks = targets.target_of(source, world_size, settings)
    heads.require_shared(source, target.tensor_ranks, tensor_ranks)

    home = job.home_of(source)
    degrees = targets.degrees_in_name(source, target)
    stage_part = f"-z{target.stage}" if target.stage != universal.stage else ""
    name = f"{home.name.removesuffix(SUFFIX)}{stage_part}{degrees}-w{world_size}"
    saved_world_size = merged.original(source).world_size

    return Rewriting(
        source=source,
        path=path,
        target=target,
        plan=targets.file_plan(source, target, tensor_ranks),
        output=absolute(output_path(output or default_output(home, name))),
        tag=native.tag_folder(source),
        companions=tuple(job.companions_for(home, saved_world_size, world_size)),
        notes=(*source.notes, *reshard.notes_on(source, target, tensor_ranks)),
        tensor_ranks=tensor_ranks,
    )


def _without_world_size(path: Path, source: Universal) -> CheckpointError:
    """That nobody said for how many ranks files are to be made, and how many there were."""
    ranks = source.checkpoint.world_size * source.model_ranks
    return CheckpointError(
        f"{path} fits any number of ranks, and native files fit one number: say with "
        f"{WORLD_SIZE('RANKS')} how many ranks (GPUs) will resume; "
        f"{counted(ranks, 'rank')} saved it, with ZeRO stage {source.stage}",
        "refused",
    )


prepare_to = renamed(plan_to, "ckpt.universal.prepare_to", "ckpt.universal.plan_to")
prepare_from = renamed(plan_from, "ckpt.universal.prepare_from", "ckpt.universal.plan_from")
run = renamed(job.run, "ckpt.universal.run", "ckpt.universal.execute")
