"""A whole checkpoint cut for tensor-parallel ranks:
what the files of each are made from.

How parameters are cut is what the checkpoint itself was cut by, for another number of
ranks, or the user's rules. It is written down in every model file as DeepSpeed does it
(the affine map), so that ``ds_to_universal.py`` and we can read the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from converters import words
from converters.accessors import is_whole_number
from converters.errors import CheckpointError, MalformedError
from converters.options import STAGE, TP, TP_RULES
from converters.tensors import Listed, TensorRef
from converters.zero import muon
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.state_files import State
from converters.zero.merging import roots
from converters.zero.merging.checkpoint import (
    MergedCheckpoint,
    groups_of,
    model_paths,
    optimizer_entries_of,
    original,
    whole_model,
)
from converters.zero.parallel import (
    affine_map,
    auto_tp,
    cut_table,
    cuts,
    degrees,
    engine_cuts,
    patterns,
    rules,
)
from converters.zero.parallel.auto_tp import HeadRule
from converters.zero.parallel.cuts import Cut, Shape
from converters.zero.param_groups import WEIGHTS, ParamGroup

_KEY_HEADS = "ckpt_key_heads"  # in universal_checkpoint_info: even cuts do not tell them
_VERSION = 0.4  # of universal_checkpoint_info, DeepSpeed 0.19.8 checkpoint/constants.py


@dataclass(frozen=True, slots=True)
class TensorRanks:
    """A whole checkpoint, and how its parameters are cut for tensor-parallel ranks."""

    checkpoint: Checkpoint
    rank_count: int
    layouts: Mapping[str, Cut]
    head_rule: HeadRule | None = None

    @staticmethod
    def of(checkpoint: Checkpoint, rank_count: int, key_heads: int | None = None) -> TensorRanks:
        """The cuts for ``rank_count`` ranks, of AutoTP by the rule that it has for heads.

        ``key_heads`` are those that the model's configuration counts, if it is there.
        ``CheckpointError`` where nothing says how a parameter is cut, or it cannot be
        cut for that many ranks.
        """
        _require(checkpoint)
        recorded: Mapping[str, Cut] = {}
        saved_count = 1
        if isinstance(checkpoint, MergedCheckpoint):
            recorded, saved_count = checkpoint.cuts, checkpoint.tensor_ranks

        rule = _head_rule(checkpoint, rank_count, key_heads)
        layouts: dict[str, Cut] = {}
        unknown: dict[str, str] = {}
        engine_table = engine_cuts.table_for(checkpoint.model, rank_count)
        for name, tensor in checkpoint.weights.tensors.items():
            layout = None
            if engine_table is not None and name not in checkpoint.weights.buffers:
                layout = engine_cuts.cut_of(engine_table, name, tensor.shape)
            if layout is None:
                layout = _layout(
                    checkpoint, name, recorded.get(name), saved_count, rank_count, rule
                )
            if layout is None:
                unknown[name] = words.shape(checkpoint.weights.tensors[name].shape)
            else:
                layouts[name] = layout

        if unknown:
            advice = cut_table.template(unknown, rules.current())
            raise CheckpointError(
                f"{checkpoint.model.path} does not say how parameters are cut for {rank_count} "
                f"tensor-parallel ranks; {advice}",
                "unsupported",
            )
        return TensorRanks(checkpoint, rank_count, layouts, rule)

    def shapes_of(self, rank: int) -> dict[str, Shape]:
        """The shapes of the shards that a tensor-parallel rank has."""
        return {name: layout.shard_shapes[rank] for name, layout in self.layouts.items()}

    def require_elements(self) -> None:
        """Raises where a rank would have nothing of a parameter, which stage 3 does not train."""
        for name, layout in self.layouts.items():
            if any(0 in shape for shape in layout.shard_shapes.values()) and 0 not in layout.shape:
                raise CheckpointError(
                    f"{self.checkpoint.place.folder}: {self.rank_count} tensor-parallel ranks are "
                    f"more than there is of {name} to share, and DeepSpeed trains no such ranks "
                    f"under stage 3; name {STAGE} 1 or 2, or another {TP}",
                    "unsupported",
                )

    def rank(self, rank: int) -> MergedCheckpoint:
        """The source of a tensor-parallel rank's files: a checkpoint of its shards."""
        checkpoint = self.checkpoint

        def shard(name: str, tensor: TensorRef) -> TensorRef:
            return degrees.shard(self.layouts[name], rank, tensor)

        tensors = {name: shard(name, ref) for name, ref in checkpoint.weights.tensors.items()}
        without_elements = {name for name, ref in tensors.items() if not ref.numel}
        for name in without_elements:  # no optimizer has them: they are of the module's type
            value = checkpoint.model.module.get(name)
            if isinstance(value, TensorRef):
                tensors[name] = TensorRef(value.dtype, tensors[name].shape, Listed())
        weights = replace(
            checkpoint.weights,
            tensors=tensors,
            frozen=checkpoint.weights.frozen | without_elements - checkpoint.weights.buffers,
            copies={name: shard(name, ref) for name, ref in checkpoint.weights.copies.items()},
        )
        groups = tuple(_group(group, shard) for group in groups_of(checkpoint))
        model = whole_model(
            checkpoint.model, weights, groups, checkpoint.model.module, checkpoint.topology
        )
        changes = self._changes()
        values = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}

        return MergedCheckpoint(
            **{**values, "weights": weights, "model": State(model.file, {**model.root, **changes})},
            source=original(checkpoint),
            groups=groups,
            model_paths=tuple(model_paths(checkpoint)),
            layer_nodes=checkpoint.layer_nodes if isinstance(checkpoint, MergedCheckpoint) else {},
            changes=changes,
            optimizer_entries=optimizer_entries_of(checkpoint),
        )

    def _changes(self) -> dict[str, Any]:
        """What model files say of the tensor parallelism."""
        checkpoint, source = self.checkpoint, original(self.checkpoint)
        info: dict[str, Any] = {"universal_checkpoint_version": _VERSION}
        merged_changes: Mapping[str, Any] = {}
        if isinstance(checkpoint, MergedCheckpoint):
            merged_changes = checkpoint.changes
        records = source.entries.get(roots.INFO)
        info |= records if isinstance(records, dict) else {}
        info.pop(patterns.WIDTHS, None)

        entries = {
            cut_table.key_of(name): affine_map.entry_of(layout)
            for name, layout in self.layouts.items()
            if name not in checkpoint.weights.buffers
        }
        if self.head_rule is not None and self.head_rule.known_heads is not None:
            info[_KEY_HEADS] = self.head_rule.known_heads
        info["affine_map"] = {"version": affine_map.VERSION, "params": entries}
        config = dict(checkpoint.model.config)
        saved_config = source.entries.get(roots.CONFIGURATION)
        section = saved_config.get(roots.AUTOTP) if isinstance(saved_config, dict) else None
        if isinstance(section, dict):
            config[roots.AUTOTP] = {**section, "autotp_size": self.rank_count}

        return {
            **merged_changes,
            roots.INFO: info,
            roots.DEGREES: {"pp_degree": 1, "tp_degree": self.rank_count},
            roots.CONFIGURATION: config,
            "mp_world_size": self.rank_count,
        }


def _require(checkpoint: Checkpoint) -> None:
    """Raises for what is not cut for tensor-parallel ranks."""
    if muon.is_deepspeed_muon(checkpoint.model):
        raise CheckpointError(
            f"{checkpoint.place.folder} was trained by Muon, which would orthogonalize shards from "
            f"here on; it is written for ZeRO alone, without {TP}",
            "unsupported",
        )


def _head_rule(checkpoint: Checkpoint, rank_count: int, key_heads: int | None) -> HeadRule | None:
    """The rule of AutoTP that the checkpoint was cut by, for so many ranks, if it was."""
    if not isinstance(checkpoint, MergedCheckpoint) or checkpoint.tensor_ranks in (1, rank_count):
        return None
    if not _is_of_auto_tp(checkpoint):
        return None
    info = original(checkpoint).entries.get(roots.INFO)
    if key_heads is None and isinstance(info, dict) and is_whole_number(info.get(_KEY_HEADS), 1):
        key_heads = info[_KEY_HEADS]
    return auto_tp.rule_for(checkpoint.cuts, checkpoint.tensor_ranks, rank_count, key_heads)


def _is_of_auto_tp(checkpoint: Checkpoint) -> bool:
    """Whether AutoTP cut a checkpoint, as its configuration tells."""
    config = original(checkpoint).entries.get(roots.CONFIGURATION)
    return isinstance(config, dict) and isinstance(config.get(roots.AUTOTP), dict)


def _layout(
    checkpoint: Checkpoint,
    name: str,
    recorded: Cut | None,
    saved_count: int,
    rank_count: int,
    rule: HeadRule | None,
) -> Cut | None:
    """How a parameter or buffer is cut; ``None`` where nothing says it."""
    shape = checkpoint.weights.tensors[name].shape
    if name in checkpoint.weights.buffers:
        return cuts.replicated([shape] * rank_count)

    user_rules = rules.current()
    by_rule = user_rules.cut_whole(name, shape, rank_count) if user_rules else None
    if by_rule is not None or recorded is None:
        return by_rule

    by_heads = rule.cut_of(name, recorded) if rule is not None else None
    if by_heads is not None:
        return by_heads

    try:
        return degrees.for_ranks(recorded, saved_count, rank_count)
    except MalformedError as error:
        # rules have to fit the saved shards, too, so that none cuts these otherwise
        is_uneven = isinstance(error, degrees.UnevenCutError)
        advice = "" if is_uneven else f"{TP_RULES('FILE')} may say how, or "
        if is_uneven and rule is None and _is_of_auto_tp(checkpoint):
            advice = "put the model's config.json, which counts the key heads, beside it, or "
        raise CheckpointError(
            f"{checkpoint.place.folder}: {name} is not cut for {rank_count} tensor-parallel ranks: "
            f"{error}; {advice}name another {TP}, or make a folder with ckpt to-universal, "
            "which engines of AutoTP cut themselves",
            "unsupported",
        ) from error


def _group(group: ParamGroup, shard: Callable[[str, TensorRef], TensorRef]) -> ParamGroup:
    """What a rank has of a param group:
    DeepSpeed leaves out what the rank has nothing of."""
    shards = {name: shard(name, group.values[WEIGHTS][name]) for name in group.shapes}
    shapes = {name: tensor.shape for name, tensor in shards.items() if tensor.numel}
    values = {
        key: {name: shard(name, tensor) for name, tensor in tensors.items() if name in shapes}
        for key, tensors in group.values.items()
    }
    return replace(group, shapes=shapes, values=values)
