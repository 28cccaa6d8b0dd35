"""Whether tensor-parallel ranks can share the heads of a model equally.

AutoTP cuts attention between heads, unevenly where their number is not divisible by
that of the ranks (DeepSpeed 0.19.8 ``module_inject/tp_shard.py``: ``get_shard_size``).
A checkpoint of AutoTP is cut by this rule; where a file of rules says the cuts, they are
even, which such an engine does not load.
"""

from __future__ import annotations

from ckpt.weights.companions import surroundings
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.options import TP
from converters.zero.checkpoint import Checkpoint
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.parallel import engine_cuts

# the first one that is there, as DeepSpeed asks for them (_KV_HEAD_ATTRS), and GPT-2's
_KEYS = (
    *("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv", "kv_n_heads"),
    *("num_attention_heads", "n_heads", "attention_heads", "n_head"),
)


def key_heads(checkpoint: Checkpoint) -> int | None:
    """How many heads share the keys, as config.json says; ``None`` where it does not."""
    return _heads(checkpoint)[1] or None


def require_shared(
    checkpoint: Checkpoint, rank_count: int, tensor_ranks: TensorRanks | None
) -> None:
    """``CheckpointError`` where config.json counts heads that so many tensor-parallel ranks
    would have to cut apart.

    Those that the checkpoint was cut for, and those of an engine that says its cuts, do
    as they did; others cut as AutoTP does where its rule gave the saved cuts.
    """
    if tensor_ranks is not None and tensor_ranks.head_rule is not None:
        return
    dense = checkpoint.dense if isinstance(checkpoint, ExpertsCheckpoint) else checkpoint
    saved_count = dense.tensor_ranks if isinstance(dense, MergedCheckpoint) else 1
    if rank_count in (1, saved_count) or engine_cuts.are_known():
        return

    key, count = _heads(checkpoint)
    if count % rank_count:
        raise CheckpointError(
            f"{checkpoint.place.folder}: config.json says {key} {count}, which {rank_count} "
            "tensor-parallel ranks cannot share equally: an engine of AutoTP cuts between heads, "
            f"and does not load what is cut evenly; name another {TP}, which divides {count}, or "
            'use ckpt.resume(..., reshard="auto"), which cuts as the engine does',
            "unsupported",
        )


def _heads(checkpoint: Checkpoint) -> tuple[str, int]:
    """How many heads share the keys, and the entry that says so; 0 where none does."""
    config = surroundings.config_of(checkpoint.place) or {}
    inner_config = config.get("text_config")
    for section in (config, inner_config if isinstance(inner_config, dict) else {}):
        for key in _KEYS:
            if is_whole_number(section.get(key), 1):
                return key, section[key]
    return "", 0
