"""The names of files by which checkpoints are recognised.

Sources: DeepSpeed 0.3 to 0.19.8 (``runtime/engine.py``: ``_get_*_ckpt_name``), torch 2.13
(``distributed/checkpoint/filesystem.py``), accelerate 1.15 (``utils/constants.py``,
``utils/fsdp_utils.py``), transformers 5.24, PEFT 0.21, Lightning 2.6, Megatron-LM core
0.16 (``training/checkpointing.py``).
"""

from __future__ import annotations

import re
from pathlib import PurePath

from converters.lazy_pattern import LazyPattern
from converters.words import shell_word

# DeepSpeed. Up to 0.3.13 no underscore stood before optim_states; the fast writer appends
# -RANK.COUNT.
_SUFFIX = r"\.pt(?:-(?P<writer>\d+)\.\d+)?"
OPTIMIZER = LazyPattern(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_?optim_states" + _SUFFIX
)
PARTITIONED = LazyPattern(r"zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_model_states" + _SUFFIX)
MODULE = LazyPattern(r"mp_rank_(?P<mp>\d+)_model_states" + _SUFFIX)
STATES = (OPTIMIZER, PARTITIONED, MODULE)
EXPERTS = LazyPattern(r"(layer_\d+_)?expert_\d+_.*|expp_rank_\d+_.*")
LAYER = LazyPattern(
    r"layer_(?P<layer>\d{1,9})(?:-model_(?P<tensor>\d{1,9}))?-model_states" + _SUFFIX
)
EXPERT = LazyPattern(
    r"layer_(?P<layer>\d{1,9})_expert_(?P<expert>\d{1,9})_mp_rank_(?P<mp>\d{1,9})_model_states"
    + _SUFFIX
)
EXPERT_OPTIMIZER = LazyPattern(
    r"expp_rank_(?P<rank>\d{1,9})_mp_rank_(?P<mp>\d{1,9})_optim_states" + _SUFFIX
)
STAGES = LazyPattern(r"layer_\d+(-model_\d+)?-model_states\.pt")
SWAPPED = ".tensor.swp"  # how the names of files end that were on NVMe
LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
UNIVERSAL = "zero"  # the folder of a universal checkpoint's tensors
SCRIPT = "zero_to_fp32.py"  # which DeepSpeed lays beside every checkpoint

# Models and adapters.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
TORCH_BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Of weights that lie in a zip file, which is no archive: torch's, and those of another
# such format.
ZIP_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER = "adapter_model.safetensors"
ADAPTERS = (ADAPTER, "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
TRAINER_STATE = "trainer_state.json"
# What the Trainer and Accelerate keep beside the weights by torch.save (transformers
# 5.24 ``trainer.py``, accelerate 1.15 ``utils/constants.py``).
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
OF_TRAINER = LazyPattern(
    r"(optimizer|scheduler|scaler|sampler)(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth"
    r"|random_states_\d+\.pkl|training_args\.bin"
)

# What lies beside weights, in the folder of a model or a checkpoint.
OF_MODEL = LazyPattern(
    r"(\w+_)?config\.json|.+\.(safetensors|bin)\.index\.json|modules\.json|zero_to_fp32\.py"
    r"|(tokenizer|vocab|added_tokens|special_tokens_map)\.json|(vocab|merges)\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(json|jinja)"
    r"|(manifest|conversion|rewriting)\.json"
)
POINTERS = (LATEST, LATEST_UNIVERSAL, "best")

# torch's distributed checkpoints (DCP), and what writes them.
DCP = ".metadata"
DCP_PART = LazyPattern(r"__\w+\.distcp")
DCP_OF_RANK = LazyPattern(r"__\d+\.metadata")
DCP_SAFETENSORS = LazyPattern(r"shard-\d+-model-\d+-of-\d+\.safetensors")
DCP_MODEL, DCP_OPTIMIZERS = "model", ("optim", "optimizer")  # folders of their own, as composer's
FSDP_FOLDER = LazyPattern(r"pytorch_model_fsdp_\d+")
FSDP_OF_RANK = LazyPattern(r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin")
FSDP_FULL = LazyPattern(r"pytorch_model_fsdp(_\d+)?\.bin")
RANDOM_STATES = LazyPattern(r"random_states_(\d+)\.pkl")
LIGHTNING_META = "meta.pt"

# Megatron.
MEGATRON_LATEST = "latest_checkpointed_iteration.txt"
MEGATRON_RANK = LazyPattern(r"mp_rank_\d+(_\d+){0,2}")
MEGATRON_STATE = ("model_optim_rng.pt", "model_rng.pt")
MEGATRON_COMMON = "common.pt"

# Runs of ckpt.
MANIFEST = "manifest.json"  # the commit record of a checkpoint, written last

ARCHIVE = LazyPattern(r".*\.(tar|tar\.\w+|tgz|tbz2?|txz|zip|7z|rar|gz|bz2|xz|zst)", re.I)
_TAR = LazyPattern(r".*\.(tar|tar\.\w+|tgz|tbz2?|txz)", re.I)
_TARGETS = {"tar xf": "-C ", "unzip": "-d "}  # the others write beside the file
_UNPACKERS = {
    "zip": "unzip",
    "7z": "7z x",
    "rar": "unrar x",
    "gz": "gunzip -k",
    "bz2": "bunzip2 -k",
    "xz": "unxz -k",
    "zst": "unzstd",
}

# The name of a repository of the Hugging Face Hub, and of no checkpoint of a run.
REPOSITORY = LazyPattern(
    r"[A-Za-z0-9][\w.-]{0,95}/(?!checkpoint-|global_step|step[-_]?\d|epoch[-_=]?\d|weights-\d)"
    r"[A-Za-z0-9][\w.-]{0,95}",
    re.ASCII,
)


def unpacking(path: PurePath) -> str:
    """The advice for an archive at this path,
    with the command: "unpack it first (tar xf X)".

    The command works from where the user stands, and unpacks beside the archive.
    """
    suffix = path.name.rpartition(".")[2].lower()
    unpacker = "tar xf" if _TAR.fullmatch(path.name) else _UNPACKERS.get(suffix)
    return f"unpack it first ({unpacked_by(unpacker, path)})" if unpacker else "unpack it first"


def unpacked_by(unpacker: str, path: PurePath) -> str:
    """The command with which an archive is unpacked beside itself."""
    command = f"{unpacker} {shell_word(path)}"
    target = _TARGETS.get(unpacker, "")
    is_here = not target or path.parent == PurePath()
    return command if is_here else f"{command} {target}{shell_word(path.parent)}"
