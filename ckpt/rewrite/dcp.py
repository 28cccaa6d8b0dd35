"""To a distributed checkpoint of torch (DCP) and back: what is written and where.
``crossing`` does it.

out/checkpoint-500-dcp/      for any number of ranks of FSDP, with torch's own dcp.load
  .metadata, __R_0.distcp      or pytorch_model_fsdp_0/ and optimizer_0/, as Accelerate has them
  everything else              copied
out/checkpoint-500-z2-w4/    DeepSpeed's native files, of such a checkpoint
  latest, global_step500/...
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ckpt.rewrite import job
from ckpt.rewrite.crossing import ARGUMENTS, Crossing
from ckpt.rewrite.crossing import execute as execute
from ckpt.rewrite.crossing_proofs import DcpProof, NativeProof
from ckpt.runs.ancestry import record_in
from ckpt.runs.foreign import step_records
from ckpt.weights.arguments import naming_arguments, require_choice
from ckpt.weights.companions import model_folder
from converters.accessors import is_whole_number
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.dcp.native import files as native_files
from converters.dcp.native import training
from converters.dcp.writing import crossing_state, folder, layouts
from converters.dcp.writing.crossing_state import CrossingState
from converters.detect import detect, filenames
from converters.detect import detection as detections
from converters.detect.deepspeed import EXPERTS, PIPELINE, TENSOR_PARALLEL, UNIVERSAL
from converters.errors import CheckpointError, consistent
from converters.plan import Plan, Shard
from converters.source import Source
from converters.storage import open_files, stores
from converters.storage.store import default_output, output_path
from converters.storage.stores import source_path
from converters.storage.url_path import absolute
from converters.tensors import DType
from converters.torch_files import file_plan
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import several_models
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import reader as merging
from converters.zero.native.target import SUB_GROUP, TargetTopology, require_arguments
from converters.zero.parallel import rules
from converters.zero.universal import reader

SUFFIX = "-dcp"
MAX_FILES = 4096
_DEFAULT_FILES = 8  # at most: more make items small
_COMPUTED_IN = {"bf16": DType.BF16, "fp32": DType.F32}  # fp16 needs a loss scale, which FSDP lacks
_NATIVE = "ckpt reshard takes one of DeepSpeed for other ranks or stages"
_OF_ZERO = ("deepspeed", EXPERTS, TENSOR_PARALLEL, PIPELINE)
# weights that are written as DCP, and what reads DeepSpeed's files
_NOT_COPIED = (
    *("model*.safetensors", "adapter_model*", "pytorch_model*.bin", "*.index.json"),
    *("zero_to_fp32.py", "zero_to_torch.py"),
)
# by which a folder is the Trainer's or Accelerate's, which look for a model of their own
_OF_TRAINERS = ("trainer_state.json", "training_args.bin", "rng_state*.pth", "random_states_*.pkl")


@naming_arguments(*ARGUMENTS)
@open_files.once()
def plan_to(
    checkpoint: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    layout: layouts.LayoutName = "plain",
    files: int | None = None,
    tag: str | None = None,
    tp_rules: str | os.PathLike[str] | None = None,
) -> Crossing:
    """Plans a checkpoint of ZeRO or of FSDP,
    or weights, as a distributed checkpoint of torch.

    ``layout`` says who loads it: "plain" a script that calls ``dcp.load``, "accelerate"
    the Trainer and Accelerate with FSDP, "torchtitan" that. ``files`` is how many hold
    its bytes; by default as many as the ranks that saved, at most 8. Reads pickles, no
    tensors but step counts. ``tp_rules`` as ``reshard.plan`` has it. Raises
    ``CheckpointError`` for what is damaged, or has states that have no names.
    """
    require_choice("layout", layout, layouts.LAYOUTS)
    if files is not None and (not is_whole_number(files, 1) or files > MAX_FILES):
        raise CheckpointError(
            f"files is {files!r}; expected a number of files, 1 to {MAX_FILES}", "refused"
        )

    path = source_path(checkpoint)
    with rules.using(tp_rules):
        source, state = _read(path, tag)
    home = job.home_of(source) if isinstance(source, Checkpoint) else absolute(source.place.root)
    left_out = () if layout == "accelerate" else _OF_TRAINERS
    companions = _companions(source, home, merged.original(source).world_size, left_out)

    folders = layouts.folders(state, layout)
    file_count = files or min(merged.original(source).world_size, _DEFAULT_FILES)
    shards = [
        shard
        for name, entries in folders.items()
        for shard in folder.shards(name, entries, file_count)
    ]
    if layout == "accelerate":
        shards = [*_scheduler(source, [name for _, name in companions]), *shards]

    plan = _plan(source, shards)
    trained_count = sum(len(group.names) for group in state.groups)
    return Crossing(
        source=source,
        path=path,
        home=home,
        plan=plan,
        proof=DcpProof(folders, plan, trained_count),
        output=absolute(output_path(output or default_output(home, home.name + SUFFIX))),
        companions=companions,
        buffers=_buffers(source),
        notes=(*source.notes, *state.omissions, *_notes(source, state)),
    )


@naming_arguments(*ARGUMENTS)
@open_files.once()
def plan_from(
    folder: str | os.PathLike[str],
    world_size: int,
    *,
    stage: int,
    output: str | os.PathLike[str] | None = None,
    dtype: str = "bf16",
    buffer: Collection[str] = (),
    sub_group_size: int | None = None,
) -> Crossing:
    """Plans DeepSpeed's native files of a checkpoint of FSDP or DCP,
    for ranks and a stage.

    ``dtype`` is what the engine will compute in, "bf16" or "fp32". ``buffer`` names
    tensors that are buffers of the model and no parameters, which DCP does not say.
    ``sub_group_size`` as ``reshard.plan`` has it. Reads headers and step counts. Raises
    ``CheckpointError``, too for states that ZeRO does not keep: other steps within a
    group.
    """
    require_arguments(world_size, stage, sub_group_size)
    require_choice("dtype", dtype, _COMPUTED_IN)
    path = source_path(folder)
    source = detections.read(path, complete=True)
    if not isinstance(source, ShardedCheckpoint):
        raise detect(path).unlike("a checkpoint of FSDP or DCP", _NATIVE)

    with consistent(source.place.folder, "a file is damaged or of another save"):
        record = record_in(absolute(source.place.root))
        known_buffers = record.buffers if record is not None else None
        fsdp_training = training.of(source, buffer, known_buffers)
        element_type = _COMPUTED_IN[dtype]
        target = TargetTopology(
            stage,
            world_size,
            sub_group_size=sub_group_size or SUB_GROUP,
            itemsize=element_type.itemsize,
        )
        plan = native_files.plan(fsdp_training, target, element_type)

    home = absolute(source.place.root)
    name = f"{home.name.removesuffix(SUFFIX)}-z{stage}-w{world_size}"
    return Crossing(
        source=fsdp_training.source,
        path=path,
        home=home,
        plan=plan,
        proof=NativeProof(fsdp_training, target, plan),
        output=absolute(output_path(output or default_output(home, name))),
        companions=_companions(source, home, world_size),
        target=target,
        tag=native_files.tag_of(fsdp_training),
        notes=(*source.notes, *fsdp_training.notes),
    )


def _buffers(source: Source) -> frozenset[str] | None:
    """The model's buffers, by their names in DCP, where the source tells them."""
    if not isinstance(source, Checkpoint):
        return None
    return frozenset(map(crossing_state.canonical, source.weights.buffers))


def _read(path: Path, tag: str | None) -> tuple[Source, CrossingState]:
    """The source at a path, located, and what of it crosses."""
    detected = detect(path, tag)
    if detected.kind.name == UNIVERSAL:
        universal = reader.read(path, tag)
        return universal.checkpoint, crossing_state.of_zero(universal)

    if detected.kind.name in _OF_ZERO:
        several_models.find(path, tag)  # refuses a choice between models
        checkpoint = merging.read(path, tag)
        return checkpoint, crossing_state.of_zero(checkpoint)

    is_opened = detected.kind.is_opened
    source = detected.read() if is_opened else detections.read(path, tag, complete=True)
    if isinstance(source, ShardedCheckpoint):
        return source, crossing_state.of_dcp(source)
    return source, crossing_state.of_weights(source)


def _companions(
    source: Source, home: Path, new_world_size: int, left_out: Sequence[str] = ()
) -> tuple[tuple[Path, str], ...]:
    """The files to copy and their names; of weights alone those of the model.

    Those that one of the patterns in ``left_out`` fits are not copied.
    """
    world_size = merged.original(source).world_size
    if source.topology is None:
        paths = [*model_folder.companions(home), home / "config.json"]
        companions = [
            (path, path.relative_to(home).as_posix()) for path in paths if stores.is_file(path)
        ]
    else:
        companions = [*job.companions_for(home, world_size, new_world_size)]

    return tuple(
        (path, name)
        for path, name in companions
        if not any(fnmatch(path.name, pattern) for pattern in (*_NOT_COPIED, *left_out))
    )


def _plan(source: Source, shards: list[Shard]) -> Plan:
    """The plan of the files, with the checksums of what they take bytes from."""
    if isinstance(source, Checkpoint):
        return file_plan.plan(shards)
    checksums = source.weights.checksums
    if isinstance(source, ShardedCheckpoint) and source.groups is not None:
        checksums = training.checksums_of(source, source.groups())
    total = sum(placement.nbytes for shard in shards for placement in shard.placements)
    return Plan(tuple(shards), None, total, {}, checksums)


def _scheduler(source: Source, companion_names: list[str]) -> Iterator[Shard]:
    """The scheduler's state as a file of its own,
    where only DeepSpeed's model file has it.

    The Trainer looks for scheduler.pt, Accelerate for scheduler.bin.
    """
    if not isinstance(source, Checkpoint):
        return
    if any(fnmatch(name, "scheduler*") for name in companion_names):
        return

    tree = merged.model_root(source, source.model.path).get("lr_scheduler")
    if isinstance(tree, Mapping) and "last_epoch" in tree and _is_inert(tree):
        is_trainers = "trainer_state.json" in companion_names
        yield file_plan.shard("scheduler.pt" if is_trainers else "scheduler.bin", tree)


def _is_inert(tree: Any) -> bool:
    """Whether a tree is plain data, which any process can load."""
    if isinstance(tree, Mapping):
        return all(_is_inert(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return all(map(_is_inert, tree))
    return isinstance(tree, (bool, int, float, str, bytes, type(None)))


def _notes(source: Source, state: CrossingState) -> Iterator[str]:
    """Notes for whoever loads the output."""
    yield from step_records.contradictions(source)
    if state.groups:
        return

    files = [source.place.root / name for name in filenames.OPTIMIZERS]
    name = next((path.name for path in files if stores.is_file(path)), None)
    if name is not None:
        reason = f"{name} is left out, because its states have numbers instead of names"
    elif source.topology is not None:
        reason = (
            "the optimizer's states are not written, because the files do not tell whose they "
            "are, or have none"
        )
    else:
        reason = "there are no states of an optimizer"
    yield f"weights alone are written, from which no training goes on: {reason}"
