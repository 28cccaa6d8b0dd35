"""Checkpoints cut over ranks by others than DeepSpeed: FSDP, torch's DCP, Megatron."""

from __future__ import annotations

from converters.detect import filenames
from converters.detect.kind import Kind
from converters.detect.look import Look
from converters.lazy_pattern import LazyPattern
from converters.storage import stores

_FSDP_PART = LazyPattern(r"__.*_.*\.distcp")

_DCP = "converters.dcp.reader:read"
_FSDP = "converters.dcp.fsdp_folder:read"
_READS = "ckpt show, to-fp32 and ckpt.open read it"
_CROSSES = (
    _READS + ", and ckpt from-dcp makes DeepSpeed's files of it if the optimizer's states are there"
)


def megatron_dist(look: Look) -> str | None:
    """Megatron-Core's distributed checkpoint, right in the folder."""
    has_common = look.has([filenames.MEGATRON_COMMON]) and look.has(["metadata.json"])
    return filenames.MEGATRON_COMMON if has_common else None


def megatron(look: Look) -> str | None:
    """A run of Megatron-LM, or one iteration of it."""
    if pointer := look.has([filenames.MEGATRON_LATEST]):
        return pointer
    for name in look.names:
        if filenames.MEGATRON_RANK.fullmatch(name):
            for state in filenames.MEGATRON_STATE:
                if stores.is_file(look.path / name / state):
                    return f"{name}/{state}"
    return None


def lightning_folder(look: Look) -> str | None:
    """FSDP's sharded checkpoint as Lightning saves it."""
    is_one = look.has([filenames.DCP]) and look.has([filenames.LIGHTNING_META])
    return filenames.LIGHTNING_META if is_one else None


def fsdp_folder(look: Look) -> str | None:
    """The folder that Accelerate and the Trainer save FSDP's shards in."""
    if name := look.match(filenames.FSDP_FOLDER):
        inner = Look(look.path / name)
        return name if inner.has([filenames.DCP]) or inner.match(_FSDP_PART) else None
    return look.path.name if _of_fsdp_folder(look) else None


def _of_fsdp_folder(look: Look) -> bool:
    """Whether the path is itself the folder of the model that Accelerate saves."""
    return bool(filenames.FSDP_FOLDER.fullmatch(look.path.name) and look.has([filenames.DCP]))


def dcp_of_ranks(look: Look) -> str | None:
    """A distributed checkpoint whose ranks wrote their own metadata (no collectives)."""
    return None if look.has([filenames.DCP]) else look.match(filenames.DCP_OF_RANK)


def dcp(look: Look) -> str | None:
    """Any other distributed checkpoint of torch."""
    return look.has([filenames.DCP]) or look.match(filenames.DCP_PART)


def dcp_parts(look: Look) -> str | None:
    """Model and optimizer as distributed checkpoints of torch, in a folder each."""
    parts = (filenames.DCP_MODEL, *filenames.DCP_OPTIMIZERS)
    folders = [name for name in parts if Look(look.path / name).has([filenames.DCP])]
    is_pair = len(folders) > 1 and folders[0] == filenames.DCP_MODEL
    return " and ".join(folders) if is_pair else None


def dcp_safetensors(look: Look) -> str | None:
    """A distributed checkpoint of torch as safetensors,
    each file with pieces of tensors."""
    return look.match(filenames.DCP_SAFETENSORS)


def fsdp_of_ranks(look: Look) -> str | None:
    """FSDP's local state, a file a rank."""
    return look.match(filenames.FSDP_OF_RANK)


def fsdp_full(look: Look) -> str | None:
    """FSDP's full state dict in one file."""
    return look.match(filenames.FSDP_FULL)


def dcp_part(look: Look) -> str | None:
    """A single file of a distributed checkpoint."""
    name = look.path.name
    is_one = name == filenames.DCP or filenames.DCP_PART.fullmatch(name)
    return str(look.path.parent) if look.is_file and is_one else None


KINDS = (
    Kind(
        name="megatron-dist",
        title="distributed checkpoint of Megatron-Core",
        recognized_by="`common.pt` and `metadata.json`",
        sign=megatron_dist,
        statement="is a distributed checkpoint of Megatron-Core ({evidence})",
        reader="converters.dcp.megatron:read",
        remedy=_READS + ", and Megatron Bridge exports it to a model of transformers",
        trouble="unsupported",
    ),
    Kind(
        name="megatron",
        title="checkpoint of Megatron-LM",
        recognized_by="`latest_checkpointed_iteration.txt`, or `mp_rank_XX/model_optim_rng.pt`",
        sign=megatron,
        statement="is a checkpoint of Megatron-LM ({evidence})",
        remedy="Megatron-LM's tools/checkpoint/convert.py converts it",
        refusal="{statement}, which ckpt does not read: {remedy}",
        trouble="unsupported",
    ),
    Kind(
        name="lightning-fsdp",
        title="sharded FSDP checkpoint of Lightning",
        recognized_by="`meta.pt` and `.metadata`",
        sign=lightning_folder,
        statement="is a checkpoint of FSDP or torch.distributed.checkpoint that Lightning "
        "saved ({evidence})",
        remedy=_CROSSES,
        reader=_DCP,
        trouble="unsupported",
    ),
    Kind(
        name="fsdp",
        title="FSDP checkpoint of Accelerate or the Trainer",
        recognized_by="`pytorch_model_fsdp_0/` with `.metadata` or `__*_*.distcp`",
        sign=fsdp_folder,
        statement="is a checkpoint of FSDP or torch.distributed.checkpoint that Accelerate "
        "saved ({evidence})",
        remedy=_CROSSES,
        reader=_FSDP,
        trouble="unsupported",
    ),
    Kind(
        name="dcp-of-ranks",
        title="checkpoint of torch.distributed.checkpoint, saved without collectives",
        recognized_by="`__R.metadata` of each rank, and no `.metadata`",
        sign=dcp_of_ranks,
        statement="is a checkpoint of FSDP or torch.distributed.checkpoint, saved without "
        "collectives ({evidence})",
        remedy=_CROSSES,
        reader=_DCP,
        trouble="unsupported",
    ),
    Kind(
        name="dcp",
        title="checkpoint of FSDP or torch.distributed.checkpoint",
        recognized_by="`.metadata` and `__*_*.distcp`",
        sign=dcp,
        statement="is a checkpoint of FSDP or torch.distributed.checkpoint ({evidence})",
        remedy=_CROSSES,
        reader=_DCP,
        trouble="unsupported",
    ),
    Kind(
        name="dcp-parts",
        title="model and optimizer, each a checkpoint of torch.distributed.checkpoint",
        recognized_by="`model/.metadata`, and that of `optim/` or `optimizer/`",
        sign=dcp_parts,
        statement="is a checkpoint of FSDP or torch.distributed.checkpoint with a folder for each "
        "part, as composer saves it ({evidence})",
        remedy=_CROSSES,
        reader="converters.dcp.parts:read",
        trouble="unsupported",
    ),
    Kind(
        name="dcp-safetensors",
        title="checkpoint of torch.distributed.checkpoint in safetensors",
        recognized_by="`shard-R-model-N-of-M.safetensors`",
        sign=dcp_safetensors,
        statement="is a checkpoint of torch.distributed.checkpoint in safetensors ({evidence}), "
        "whose files may hold pieces of tensors",
        remedy=_READS,
        reader="converters.dcp.reader:read_safetensors",
        trouble="unsupported",
    ),
    Kind(
        name="fsdp-of-ranks",
        title="FSDP checkpoint with a file a rank",
        recognized_by="`pytorch_model_fsdp_0_rankR.bin`",
        sign=fsdp_of_ranks,
        statement="is a checkpoint of FSDP with a file a rank ({evidence})",
        remedy=_CROSSES,
        reader=_FSDP,
        trouble="unsupported",
    ),
    Kind(
        name="fsdp-full",
        title="FSDP checkpoint with the weights in one file",
        recognized_by="`pytorch_model_fsdp.bin`",
        sign=fsdp_full,
        reader=_FSDP,
        statement="is a checkpoint of FSDP with the weights in one file ({evidence})",
        remedy=_CROSSES,
    ),
    Kind(
        name="dcp-file",
        title="single file of a distributed checkpoint",
        recognized_by="`.metadata` or `__*_*.distcp`",
        sign=dcp_part,
        statement="is one file of a checkpoint of FSDP or torch.distributed.checkpoint",
        remedy="the checkpoint is its folder: {evidence}",
        refusal="{statement}; {remedy}",
        trouble="unsupported",
    ),
)
# checkpoints of a training that are read for their weights: no engine of ZeRO loads them
READ = tuple(kind.name for kind in KINDS if kind.reader)
