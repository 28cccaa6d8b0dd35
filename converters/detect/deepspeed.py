"""Checkpoints of DeepSpeed: of any ZeRO stage, of more parallelism than that, universal."""

from __future__ import annotations

from converters.detect import filenames, state_folders
from converters.detect.kind import Kind
from converters.detect.look import Look
from converters.lazy_pattern import LazyPattern
from converters.storage import stores

UNIVERSAL = "deepspeed-universal"
TENSOR_PARALLEL = "deepspeed-model-parallel"
PIPELINE = "deepspeed-pipeline"
EXPERTS = "deepspeed-experts"
# of more than ZeRO: no engine of ZeRO alone loads them as they are
PARALLEL = (TENSOR_PARALLEL, PIPELINE, EXPERTS)
NATIVE = ("deepspeed", *PARALLEL)  # the files that engines save and load
LOAD_THERE = (
    "load it with DeepSpeed in the training that wrote it, on as many ranks, and save "
    "the weights there"
)
READ_HERE = (
    "ckpt show, to-fp32, ckpt.open and reshard read it; to go on from it as it is, load it with "
    "DeepSpeed in the training that wrote it, on as many ranks"
)
REWRITE_HERE = (
    "ckpt show, to-fp32, ckpt.open, reshard and to-universal read it; to go on from it as it is, "
    "load it with DeepSpeed in the training that wrote it, on as many ranks"
)
_CONTRAST = "not one that ZeRO alone splits up"


def no_tag(look: Look) -> str | None:
    """A folder without the tag that the user named."""
    if look.tag is None or not look.is_folder or look.state_folder is not None:
        return None
    return f"{look.tag}; {state_folders.offer(look.path, has_option=True)}"


def universal(look: Look) -> str | None:
    """The folder of a universal checkpoint, in the tag or in the path itself."""
    folder = look.state_folder
    if folder is not None and stores.is_folder(folder / filenames.UNIVERSAL):
        return f"{filenames.UNIVERSAL}/"
    if not look.is_folder or filenames.LATEST in look.names:
        return None
    if stores.is_file(look.path / filenames.UNIVERSAL / "optimizer_state.pt"):
        return f"{filenames.UNIVERSAL}/"
    return look.has([filenames.LATEST_UNIVERSAL])


def experts(look: Look) -> str | None:
    """State files of experts."""
    return _first(look.state_names, filenames.EXPERTS)


def pipeline(look: Look) -> str | None:
    """State files of layers."""
    return _first(look.state_names, filenames.STAGES)


def tensor_parallel(look: Look) -> str | None:
    """State files of a second model-parallel rank."""
    for name in look.state_names:
        for pattern in filenames.STATES:
            match = pattern.fullmatch(name)
            if match and int(match["mp"]) > 0:
                return name
    return None


def deepspeed(look: Look) -> str | None:
    """State files,
    or a file ``latest`` or a tag that the user named, wherever that leads."""
    if not look.is_folder:
        return None
    if look.tag is not None and look.state_folder is not None:
        return look.tag
    if any(state_folders.is_state_file(name) for name in look.state_names):
        return str(look.state_folder)
    has_latest = filenames.LATEST in look.names
    is_pointer = has_latest and not stores.is_folder(look.path / filenames.LATEST)
    return filenames.LATEST if is_pointer else None


def stage(look: Look) -> str:
    """The ZeRO stage, as far as names tell it."""
    names = look.state_names
    if _first(names, filenames.PARTITIONED):
        return "ZeRO stage 3"
    if _first(names, filenames.OPTIMIZER):
        return "ZeRO stage 1 or 2"
    return "no ZeRO (stage 0)" if _first(names, filenames.MODULE) else "of no known stage"


def several(look: Look) -> str | None:
    """Checkpoints or tags of DeepSpeed,
    of which none is the newest by a file ``latest``."""
    if not look.is_folder:
        return None
    offer = state_folders.offer(look.path)
    return None if offer == state_folders.NOTHING else offer


def state_file(look: Look) -> str | None:
    """A single state file of DeepSpeed; the folder of its checkpoint.

    That is the tag itself, unless the file ``latest`` beside it leads to that tag.
    """
    if not (look.is_file and state_folders.is_state_file(look.path.name)):
        return None
    tag_folder = look.path.parent
    latest = tag_folder.parent / filenames.LATEST
    leads_here = stores.is_file(latest) and state_folders.tag_in(latest) == tag_folder.name
    return str(tag_folder.parent if leads_here else tag_folder)


def _first(names: tuple[str, ...], pattern: LazyPattern[str]) -> str | None:
    return next((name for name in names if pattern.fullmatch(name)), None)


KINDS = (
    Kind(
        name="no-tag",
        title="folder without the tag that was asked for",
        recognized_by="the tag that was asked for names no folder in it",
        sign=no_tag,
        statement="has no tag {evidence}",
        refusal="{statement}",
    ),
    Kind(
        name=UNIVERSAL,
        title="universal checkpoint of DeepSpeed",
        recognized_by="`zero/` in the tag folder, or `latest_universal`",
        sign=universal,
        statement="is a universal checkpoint",
        remedy="ckpt show, to-fp32, push and ckpt.open read it, and ckpt from-universal makes the "
        "native files of it that a training goes on from",
        reader="converters.zero.universal.source:read",
        contrast="not one of native files",
        trouble="unsupported",
        of_tag=True,
    ),
    Kind(
        name=EXPERTS,
        title="DeepSpeed checkpoint of experts (DeepSpeed-MoE or AutoEP)",
        recognized_by="`layer_L_expert_E_*` or `expp_rank_E_*` in the tag folder",
        sign=experts,
        statement="is a DeepSpeed checkpoint with expert files (DeepSpeed-MoE or AutoEP)",
        remedy=READ_HERE,
        reader="converters.zero.experts.reader:read",
        contrast=_CONTRAST,
        trouble="unsupported",
        of_tag=True,
    ),
    Kind(
        name=PIPELINE,
        title="pipeline-parallel DeepSpeed checkpoint",
        recognized_by="`layer_NN-model_MM-model_states.pt` in the tag folder",
        sign=pipeline,
        statement="is a pipeline-parallel DeepSpeed checkpoint (layer_NN files)",
        remedy=REWRITE_HERE,
        reader="converters.zero.pipeline.reader:read",
        contrast=_CONTRAST,
        trouble="unsupported",
        of_tag=True,
    ),
    Kind(
        name=TENSOR_PARALLEL,
        title="DeepSpeed checkpoint of tensor parallelism",
        recognized_by="state files of `mp_rank_01` and up in the tag folder",
        sign=tensor_parallel,
        statement="is a DeepSpeed checkpoint of tensor parallelism (mp_rank_01 and up)",
        remedy=REWRITE_HERE,
        reader="converters.zero.experts.reader:read_lanes",
        contrast=_CONTRAST,
        trouble="unsupported",
        of_tag=True,
    ),
    Kind(
        name="deepspeed",
        title="DeepSpeed checkpoint",
        recognized_by="`latest`, or `*_optim_states.pt` and `*_model_states.pt` of any ZeRO "
        "stage or none",
        sign=deepspeed,
        statement="is a DeepSpeed checkpoint",
        remedy="ckpt show, to-fp32, reshard and to-universal read it",
        reader="converters.zero.experts.reader:read_any",
    ),
    Kind(
        name="deepspeed-several",
        title="DeepSpeed checkpoints without a file latest",
        recognized_by="folders with `latest`, or tag folders, and no `latest` beside them",
        sign=several,
        statement="has no file latest, which says what checkpoint is meant; {evidence}",
        refusal="{statement}",
    ),
    Kind(
        name="deepspeed-file",
        title="single state file of DeepSpeed",
        recognized_by="the name: `*_optim_states.pt` or `*_model_states.pt`",
        sign=state_file,
        statement="is one state file of a DeepSpeed checkpoint (one rank's part)",
        remedy="the checkpoint is its folder: {evidence}",
        refusal="{statement}; {remedy}",
        reader="converters.formats.weight_files:read",
        of_states=True,
    ),
)
