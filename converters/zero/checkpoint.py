"""A checkpoint of DeepSpeed, of any ZeRO stage or none, as ``Weights``.

The stages differ in where the fp32 master weights lie and how names find them
(``stage0``, ``stage12``, ``stage3``); what is the same for all is here and in
``parameters``: which files belong together, and that every name of the model's state is
accounted for, as a tensor, a tied name, or absent and why.

MiCS saves the first of its shard groups, whose ranks hold everything, as plain stage 3;
sequence parallelism partitions over all of its ranks. Tensor parallelism
(``parallel/``), pipelines, experts and universal checkpoints have readers of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converters import options, quantized
from converters.detect.deepspeed import READ_HERE
from converters.errors import CheckpointError, readable
from converters.names.rules import Names
from converters.source import EXCLUDED as EXCLUDED
from converters.source import STATES as STATES
from converters.source import Place, Source, SourceTopology
from converters.storage import misplaced_files, open_files
from converters.storage.store import Name
from converters.storage.stores import source_path
from converters.tensors import Weights
from converters.zero.files import all_ranks, discovery, several_models, state_files
from converters.zero.files.state_files import State
from converters.zero.naming.assemble import Parameters, assemble


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Checkpoint(Source):
    """One tag of a save_dir and what is true of it.

    ``model`` and ``ranks`` are the module's file and the optimizer files in rank order
    (``optimizer_state`` reads on in them). ``weights`` have the names of the state dict;
    ``names`` says how parameters are called that it has other names for. ``optimizer``
    is set by ``reader.read``.
    """

    kind: str = "deepspeed"
    topology: SourceTopology
    precision: str
    model: State
    ranks: tuple[State, ...]
    names: Names = field(default_factory=Names)

    @property
    def stage(self) -> int:
        """The ZeRO stage; 0 without ZeRO."""
        return self.topology.stage or 0

    @property
    def bf16_optimizer(self) -> bool:
        """Whether BF16_Optimizer saved it: partitions as in stage 1, no stage stated."""
        optimizer = self.ranks[0].optimizer if self.ranks else {}
        return "single_partition_of_fp32_groups" in optimizer and "zero_stage" not in optimizer


_ARGUMENTS = options.of_functions({"tag": "tag="})  # of ``read``, as errors name them


@open_files.once()
def read(path: Name, tag: str | None = None) -> Checkpoint:
    """Locates every tensor of the checkpoint; reads pickles only, no tensor data.

    ``path`` is a Trainer folder, a save_dir or a tag folder; ``tag`` always wins. Raises
    ``CheckpointError`` for what is damaged, incomplete or of a kind that is not read.
    """
    with options.using(_ARGUMENTS):
        return _read_or_explain(discovery.find(source_path(path), tag), require_all=True)


@open_files.once()
def weights(path: Name, tag: str | None = None) -> Checkpoint:
    """Reads a checkpoint that need not be whole, as long as its weights are.

    Of stage 3 the model file of rank 0 is enough where nothing is frozen.
    ``CheckpointError`` where ``path`` holds several models, of which only ``tag``
    can choose one.
    """
    return _read_or_explain(several_models.find(source_path(path), tag), require_all=False)


def _read_or_explain(place: Place, require_all: bool) -> Checkpoint:
    with readable(place.folder, "a file is damaged or of another save"):
        return _read(place, require_all)


def _read(place: Place, require_all: bool) -> Checkpoint:
    return read_files(place, discovery.scan(place), require_all)


def read_files(
    place: Place, files: discovery.Files, require_all: bool, model_rank: int | None = None
) -> Checkpoint:
    """The contents of some files of a tag: all, or those of one model-parallel rank,
    where the parameters are shards.

    ``CheckpointError`` for what is damaged, incomplete or of a kind that is not read.
    """
    optimizers = {rank: state_files.read(file) for rank, file in files.optimizer.items()}
    stage = stage_of(optimizers)
    model_files = _model_files(files, stage)
    refuse_foreign([*model_files, *optimizers.values()])
    if model_rank is None:
        require_one_model_rank(place, [*model_files, *optimizers.values()])
    if not model_files:
        raise _no_model_file(place, stage, model_rank or 0)

    rank_files = all_ranks.in_rank_order(
        place, optimizers, all_ranks.of_model_rank("optimizer", model_rank)
    )
    state_files.require_kinds(model_files, rank_files)
    notes = _require_ranks(place, files, model_files[0], len(rank_files), require_all, model_rank)
    if stage == 3 and files.module is not None:
        notes = [f"{files.module.name} is of another save and was left out", *notes]
    if not rank_files and (files.partitioned or has_partitions(model_files[0])):
        raise no_optimizer_files(place)

    parameters = _parameters(place, stage, model_files, rank_files)
    sources = [*model_files, *rank_files]
    weights = quantized.marked(assemble(model_files[0], parameters, sources))
    step = model_files[0].root.get("global_steps")

    return Checkpoint(
        place=place,
        topology=SourceTopology(len(rank_files) or _data_parallel_size(model_files[0]), stage),
        precision=precision(model_files[0], weights),
        step=step if isinstance(step, int) else None,
        version=model_files[0].version,
        files={state.path: state.file.digest for state in sources},
        weights=weights,
        entries=model_files[0].root,
        notes=(*notes, *parameters.notes),
        without_frozen=excludes_frozen(stage, model_files[0]),
        model=model_files[0],
        ranks=tuple(rank_files),
        names=parameters.names,
    )


def no_optimizer_files(place: Place) -> CheckpointError:
    """The error for a checkpoint of ZeRO that has model files only."""
    return CheckpointError(
        f"{place.folder} has no optimizer files, which hold the fp32 weights under "
        f"ZeRO; copy the *_optim_states.pt here{misplaced_files.missing(place.folder)}",
        "incomplete",
    )


def _model_files(files: discovery.Files, stage: int) -> list[State]:
    """The model files that are of use: those of stage 3, or the one of other stages."""
    if stage == 3 or (files.partitioned and not files.optimizer):
        return _partitioned_models(list(files.partitioned.values()))
    return [state_files.read(files.module)] if files.module else []


def require_one_model_rank(place: Place, states: Sequence[State]) -> None:
    """``CheckpointError`` where files
    of further model-parallel ranks should be here, too.

    Those of one alone have a part of the model, its model file as well.
    """
    for state in states:
        count = state.root.get("mp_world_size")
        if isinstance(count, int) and count > 1:
            raise CheckpointError(
                f"{state.path} was saved with tensor or pipeline parallelism (mp_world_size "
                f"{count}), and {place.folder} has files of mp_rank_00 alone; copy those of the "
                "other ranks here",
                "incomplete",
            )


def _no_model_file(place: Place, stage: int, model_rank: int) -> CheckpointError:
    name = f"mp_rank_{model_rank:02d}_model_states.pt"
    rank_prefix = "zero_pp_rank_0_" if stage == 3 else ""
    return CheckpointError(
        f"{place.folder} has no model file (expected {rank_prefix}{name}); "
        f"copy it from where the checkpoint was saved{misplaced_files.missing(place.folder)}",
        "incomplete",
    )


def _require_ranks(
    place: Place,
    files: discovery.Files,
    model: State,
    optimizer_count: int,
    require_all: bool,
    model_rank: int | None,
) -> list[str]:
    """Notes on model files of stage 3 that are missing;
    ``CheckpointError`` if they are needed."""
    if not files.partitioned:
        return []

    rank_count = optimizer_count or len(files.partitioned)
    missing_ranks: list[int] = []
    # the weights need no other model file where nothing is frozen
    if not require_all and 0 in files.partitioned and _nothing_frozen(model):
        missing_ranks = sorted(set(range(rank_count)) - set(files.partitioned))

    present_ranks = {*files.partitioned, *missing_ranks}
    file_kind = all_ranks.of_model_rank("model", model_rank)
    all_ranks.require_ranks(place, rank_count, present_ranks, file_kind)
    if not missing_ranks:
        return []

    return [
        f"the {all_ranks.missing_files(place, file_kind, missing_ranks)}: a "
        "resume needs them, the weights do not, since nothing is frozen"
    ]


def _parameters(
    place: Place, stage: int, model_files: Sequence[State], rank_files: Sequence[State]
) -> Parameters:
    """The places of the fp32 weights, and notes on what the user should know of them."""
    if not rank_files:
        from converters.zero import stage0

        parameters = stage0.parameters(model_files[0])
    elif stage == 3:
        from converters.zero import stage3

        parameters = stage3.parameters(place.folder, model_files, rank_files)
    else:
        from converters.zero import stage12

        parameters = stage12.parameters(model_files[0], rank_files)

    if model_files[0].setting("zero_optimization", "zenflow"):
        parameters.newer.update(parameters.copies)
        parameters.copies.clear()
        condition = ", where they were gathered beside the states" if stage == 3 else ""
        parameters.notes.append(
            "ZenFlow: the fp32 weights lag the 16-bit ones, so these were not compared; "
            f"ckpt to-fp32 --weights 16bit writes the newer ones{condition}"
        )

    if excludes_frozen(stage, model_files[0]):
        parameters.notes.append(EXCLUDED)

    return parameters


def excludes_frozen(stage: int, model: State) -> bool:
    """Whether the checkpoint was saved with exclude_frozen_parameters.

    Then it may lack weights that it does not name.
    """
    return stage >= 2 and model.root.get("frozen_param_shapes", ()) is None


def _nothing_frozen(model: State) -> bool:
    """Whether the model files of other ranks have nothing that this one has not."""
    return not model.root.get("frozen_param_shapes")


def _partitioned_models(paths: Sequence[Path]) -> list[State]:
    """The stage 3 model files.

    Beyond rank 0's only pieces of frozen parameters are of use.
    """
    if not paths:
        return []

    rank_0_model = state_files.read(paths[0])
    frozen_shapes = rank_0_model.root.get("frozen_param_shapes")
    other_paths = paths[1:] if frozen_shapes else ()
    return [rank_0_model, *(state_files.read(path) for path in other_paths)]


def stage_of(optimizers: Mapping[int, State]) -> int:
    """The ZeRO stage that the optimizer files state; 0 without such files.

    BF16_Optimizer states none: it works as stage 1, whatever the configuration
    says. Until 0.6.7 stage 1 was saved as 2; where the configuration is saved, it
    knows better.
    """
    if not optimizers:
        return 0

    first_state = next(iter(optimizers.values()))
    if "fp32_flat_groups" in first_state.optimizer:
        return 3

    stated_stage = first_state.optimizer.get("zero_stage")
    configured_stage = first_state.setting("zero_optimization", "stage")
    if stated_stage is None:
        return configured_stage if configured_stage in (0, 1) else 1
    if stated_stage not in (1, 2):
        raise first_state.fail(
            f"zero_stage is {state_files.shown(stated_stage)}, expected 1, 2 or 3"
        )

    return 1 if configured_stage == 1 else int(stated_stage)


class ExpertsError(CheckpointError):
    """The error for experts that are dealt out to ranks,
    which the files' names did not show."""


def refuse_foreign(states: Iterable[State]) -> None:
    """Raises for parallelism beyond ZeRO, which the files' names did not give away."""
    for state in states:
        root, optimizer = state.root, state.root.get("optimizer_state_dict")
        inner_optimizer = optimizer if isinstance(optimizer, dict) else {}
        has_expert_groups = bool(inner_optimizer.get("ds_zero_partition_groups"))

        if root.get("ds_autoep_layers") or has_expert_groups:
            parallelism = "AutoEP (expert parallelism)"
        elif root.get("num_experts"):
            parallelism = "DeepSpeed-MoE (expert parallelism)"
        else:
            continue

        raise ExpertsError(
            f"{state.path} was saved with {parallelism}, not by ZeRO alone; {READ_HERE}",
            "unsupported",
        )


def has_partitions(model: State) -> bool:
    """Whether the run kept the optimizer's state in files of its own.

    Some must be there then. Only then the module file names ``param_shapes`` (since
    0.6.0) without an optimizer inside.
    """
    under_zero = model.setting("zero_optimization", "stage") in (1, 2, 3)
    shapes, optimizer = model.root.get("param_shapes"), model.root.get("optimizer")
    return under_zero or (shapes is not None and optimizer is None)


def _data_parallel_size(model: State) -> int:
    """The ranks of a run without ZeRO, each of which held everything."""
    world_size = model.root.get("dp_world_size")
    return world_size if isinstance(world_size, int) and world_size > 0 else 1


def precision(model: State, weights: Weights) -> str:
    """The precision that the run trained in: bf16, fp16, fp32 or fp32 (autocast).

    By its configuration; where that names none, by the type of the 16-bit copies.
    """
    for setting_name in ("bf16", "bfloat16", "fp16"):
        if model.setting(setting_name, "enabled") is True:
            return "bf16" if setting_name != "fp16" else setting_name

    if model.setting("torch_autocast", "enabled") is True:
        return "fp32 (autocast)"

    dtypes = {reference.dtype.value for reference in weights.copies.values()} - {"F32"}
    if not dtypes:
        return "fp32"
    return dtypes.pop().lower().replace("f16", "fp16").replace("bfp", "bf")
