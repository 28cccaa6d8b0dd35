"""A checkpoint of DeepSpeed, of any ZeRO stage or none, as ``Weights``.

The stages differ in where the fp32 master weights lie and how names find them (``zero0``,
``zero12``, ``zero3``); what is the same for all is here and in ``parameters``: which files belong
together, and that every name of the model's state is accounted for, as a tensor, a tied name, or
absent and why.

Tensor and pipeline parallelism, experts, MiCS and universal checkpoints are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters import folder, states, zero0, zero3, zero12
from converters.errors import CheckpointError
from converters.parameters import assemble
from converters.states import State
from converters.tensors import Weights


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One tag of a save_dir and what is true of it.

    ``stage`` is the ZeRO stage (0: none) and ``world_size`` the ranks that share the optimizer
    state; ``precision`` is what was trained in. ``files`` maps the state files to their digests
    (``TorchFile.digest``). ``notes`` are what a user should know of it. ``model`` and ``ranks`` are
    the module's file and the optimizer files in rank order (``moments`` reads on in them).
    """

    place: folder.Place
    stage: int
    world_size: int
    precision: str
    step: int | None
    version: str | None
    files: Mapping[Path, str | None]
    weights: Weights
    notes: tuple[str, ...]
    model: State
    ranks: tuple[State, ...]

    @property
    def bf16_optimizer(self) -> bool:
        """Whether BF16_Optimizer saved it: partitions as in stage 1, and no stage stated."""
        held = self.ranks[0].optimizer if self.ranks else {}
        return "single_partition_of_fp32_groups" in held and "zero_stage" not in held


def read(path: Path, tag: str | None = None) -> Checkpoint:
    """Locates every tensor of the checkpoint; reads pickles only, no tensor data.

    ``path`` is a Trainer folder, a save_dir or a tag folder; ``tag`` always wins. Raises
    ``CheckpointError`` for what is damaged, incomplete or of a kind that is not read.
    """
    place = folder.find(path, tag)
    try:
        return _read(place)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"{place.folder} contradicts itself ({error}): a file is damaged or of another save"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{error.filename or place.folder}: {error.strerror}") from error


def _read(place: folder.Place) -> Checkpoint:
    found = folder.scan(place)
    optimizers = {rank: states.read(file) for rank, file in found.optimizer.items()}
    stage = _stage(optimizers)
    notes: list[str] = []
    if stage == 3 and found.module is not None:
        notes.append(f"{found.module.name} is of another save and was left out")
    if stage == 3 or (found.partitioned and not optimizers):
        models = _partitioned(list(found.partitioned.values()))
    else:
        models = [states.read(found.module)] if found.module else []
    refuse_foreign([*models, *optimizers.values()])
    if not models:
        raise CheckpointError(
            f"{place.folder} has no model file (expected "
            f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt); "
            "copy it from where the checkpoint was saved",
            "incomplete",
        )
    ranks = _whole(place, optimizers)
    states.require_kinds(models, ranks)
    if stage == 3 or found.partitioned:
        _require_ranks(place, len(ranks) or len(found.partitioned), found.partitioned, "model")
    if not ranks and (found.partitioned or _partitions(models[0])):
        raise CheckpointError(
            f"{place.folder} has no optimizer files, which hold the fp32 weights under ZeRO; "
            "copy the *_optim_states.pt here",
            "incomplete",
        )
    if not ranks:
        parameters = zero0.parameters(models[0])
    elif stage == 3:
        parameters = zero3.parameters(place.folder, models, ranks)
    else:
        parameters = zero12.parameters(models[0], ranks)
    if models[0].setting("zero_optimization", "zenflow"):
        parameters.copies.clear()
        parameters.notes.append("ZenFlow: the fp32 weights lag the 16-bit ones; not compared")
    if stage >= 2 and models[0].root.get("frozen_param_shapes", ()) is None:
        parameters.notes.append(
            "saved with exclude_frozen_parameters: frozen weights, if any, are not in it"
        )
    weights = assemble(models[0], parameters, [*models, *ranks])
    return Checkpoint(
        place,
        stage,
        len(ranks) or _data_parallel(models[0]),
        precision(models[0], weights),
        step if isinstance(step := models[0].root.get("global_steps"), int) else None,
        models[0].version,
        {state.path: state.file.digest for state in (*models, *ranks)},
        weights,
        (*notes, *parameters.notes),
        models[0],
        tuple(ranks),
    )


def _partitioned(paths: Sequence[Path]) -> list[State]:
    """The stage 3 model files. Beyond rank 0's only pieces of frozen parameters are of use."""
    if not paths:
        return []
    first = states.read(paths[0])
    frozen = first.root.get("frozen_param_shapes")
    return [first, *(states.read(path) for path in (paths[1:] if frozen else ()))]


def _stage(optimizers: Mapping[int, State]) -> int:
    """The ZeRO stage that the optimizer files state; 0 without such files.

    BF16_Optimizer states none: it works as stage 1, whatever the configuration says. Until 0.6.7
    stage 1 was saved as 2; where the configuration is saved, it knows better.
    """
    if not optimizers:
        return 0
    state = next(iter(optimizers.values()))
    stage = state.optimizer.get("zero_stage")
    if "fp32_flat_groups" in state.optimizer:
        return 3
    configured = state.setting("zero_optimization", "stage")
    if stage is None:
        return configured if configured in (0, 1) else 1
    if stage not in (1, 2):
        raise state.fail(f"zero_stage is {states.shown(stage)}, expected 1, 2 or 3")
    return 1 if configured == 1 else int(stage)


def refuse_foreign(found: Iterable[State]) -> None:
    """Raises for parallelism beyond ZeRO, which the files' names did not give away."""
    for state in found:
        root, optimizer = state.root, state.root.get("optimizer_state_dict")
        inner = optimizer if isinstance(optimizer, dict) else {}
        mics = state.setting("zero_optimization", "mics_shard_size")
        if root.get("ds_autoep_layers") or inner.get("ds_zero_partition_groups"):
            what = "AutoEP (expert parallelism)"
        elif root.get("num_experts"):
            what = "DeepSpeed-MoE (expert parallelism)"
        elif isinstance(mics, int) and mics > 0:
            what = f"MiCS (mics_shard_size {mics}), which saves the first shard group only"
        elif isinstance(mp := root.get("mp_world_size"), int) and mp > 1:
            what = f"tensor or pipeline parallelism (mp_world_size {mp})"
        else:
            continue
        raise CheckpointError(
            f"{state.path} was saved with {what}; merging that is not supported yet", "unsupported"
        )


def _whole(place: folder.Place, optimizers: Mapping[int, State]) -> list[State]:
    """The optimizer files in rank order; raises unless they are all there and of one save."""
    if not optimizers:
        return []
    first, *others = optimizers.values()
    count = first.optimizer.get("partition_count", len(optimizers))
    if isinstance(count, list):
        count = max((n for n in count if isinstance(n, int)), default=len(optimizers))
    if not isinstance(count, int) or not 1 <= count <= states.MOST_RANKS:
        raise first.fail(f"partition_count is {states.shown(count)}, expected a number of ranks")
    local = first.setting("checkpoint", "use_node_local_storage") is True
    _require_ranks(place, count, optimizers, "optimizer", local)
    expected = states.progress(first)
    for state in others:
        found = states.progress(state)
        for key in expected.keys() & found.keys():
            if found[key] != expected[key]:
                raise CheckpointError(
                    f"{state.path} is of another save than {first.path.name}: its {key} is "
                    f"{found[key]}, expected {expected[key]}; copy the file of this save here"
                )
    return list(optimizers.values())


def _require_ranks(
    place: folder.Place, count: int, found: Iterable[int], kind: str, local: bool = False
) -> None:
    missing = sorted(set(range(count)) - set(found))
    extra = sorted(set(found) - set(range(count)))
    if missing:
        where = "the folders of the other nodes (use_node_local_storage)" if local else "the save"
        raise CheckpointError(
            f"{place.folder} was saved by {count} ranks, but the {kind} files of rank "
            f"{_ranks(missing)} are missing; copy them here from {where}",
            "incomplete",
        )
    if extra:
        raise CheckpointError(
            f"{place.folder} was saved by {count} ranks, but has {kind} files of rank "
            f"{_ranks(extra)} too: they are of another save; move them away"
        )


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + more


def _partitions(model: State) -> bool:
    """Whether the run kept the optimizer's state in files of its own, so that some must be there.

    Only then the module file names ``param_shapes`` (since 0.6.0) without an optimizer inside.
    """
    configured = model.setting("zero_optimization", "stage") in (1, 2, 3)
    shapes, optimizer = model.root.get("param_shapes"), model.root.get("optimizer")
    return configured or (shapes is not None and optimizer is None)


def _data_parallel(model: State) -> int:
    """The ranks of a run without ZeRO, each of which held everything."""
    found = model.root.get("dp_world_size")
    return found if isinstance(found, int) and found > 0 else 1


def precision(model: State, weights: Weights) -> str:
    for name in ("bf16", "bfloat16", "fp16"):
        if model.setting(name, "enabled") is True:
            return "bf16" if name != "fp16" else name
    if model.setting("torch_autocast", "enabled") is True:
        return "fp32 (autocast)"
    kinds = {copy.dtype.value for copy in weights.copies.values()} - {"F32"}
    return kinds.pop().lower().replace("f16", "fp16").replace("bfp", "bf") if kinds else "fp32"
